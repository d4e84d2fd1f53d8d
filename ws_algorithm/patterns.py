"""The names and patterns by which a user says which layers are meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

Patterns = str | Sequence[str]


def check_patterns(argument: str, patterns: Any) -> tuple[str, ...] | None:
    """Return the value of `argument` as a tuple, or ``None`` for no such rule.

    Raises:
        ValueError: If it is not a pattern or several.
    """
    if patterns is None:
        return None
    items: list[Any] = [patterns]
    if isinstance(patterns, Iterable) and not isinstance(patterns, str):
        items = list(patterns)
    if not all(isinstance(item, str) for item in items):
        raise ValueError(
            f"`{argument}` (={patterns!r}) must be a name of a layer or a pattern such as 'head.*', or a list of them."
        )
    if not items:
        raise ValueError(f"`{argument}` (={patterns!r}) must name at least one layer. Use None for no such rule.")
    return tuple(items)


def names_of(module: nn.Module, layers: Iterable[nn.Module]) -> dict[nn.Module, list[str]]:
    """All qualified names in `module` of each of these layers of it, in the order of their definition."""
    wanted = set(layers)
    names: dict[nn.Module, list[str]] = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        if layer in wanted:
            names.setdefault(layer, []).append(name)
    return names


def reason_by_patterns(names: Iterable[str], include: Any, exclude: Any) -> str | None:
    """Why checked patterns leave out a layer with these names; ``None`` if they admit it."""
    for pattern in exclude or ():
        if _matches(pattern, names):
            return f"exclude={pattern!r}"
    if include is not None and not any(_matches(pattern, names) for pattern in include):
        return f"not in include={list(include)}"
    return None


def check_that_all_match(
    argument: str, patterns: Any, module: nn.Module, names: Mapping[nn.Module, list[str]], kind: str, listing: str
) -> None:
    """Check that each pattern means a layer.

    Args:
        argument: The name of the argument that has the patterns.
        patterns: Checked patterns, or ``None``.
        module: The model.
        names: The layers that can be meant, and their qualified names in it.
        kind: What these layers are, in the plural.
        listing: What lists their names, for a pattern that comes close to none.

    Raises:
        ValueError: If one matches none of the layers; it says what comes close.
    """
    for pattern in patterns or ():
        if any(_matches(pattern, aliases) for aliases in names.values()):
            continue
        every_name = [name for aliases in names.values() for name in aliases]
        containers = [name for name, _ in module.named_modules() if any(n.startswith(f"{name}.") for n in every_name)]
        behind = [name for name in containers + every_name if f".{name}".endswith(f".{pattern}")]
        behind += [name for name in containers + every_name if name and f".{pattern}".endswith(f".{name}")]
        close = behind[:3] or difflib.get_close_matches(pattern, every_name + containers, n=3)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"{listing} lists the names."
        raise ValueError(
            f"`{argument}` has {pattern!r}, which matches none of the {len(names)} {kind} of {type(module).__name__}. "
            f"{hint}"
        )


def _matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether a pattern matches one of the names, or is the name of a module that contains one of them."""
    return any(name == pattern or fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") for name in names)
