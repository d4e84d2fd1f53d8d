"""Which parameters do not train."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ws_algorithm.recipes.parameter_names import named_parameters


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Set ``requires_grad=False`` on the parameters that patterns select.

    Frozen convolutions are standardized like all others. Frozen BatchNorm layers go on updating their running
    statistics, which are no parameters; for statistics that stay as well, build the model with ``norm: frozen``.

    Args:
        model: The model.
        patterns: Names of modules or parameters without a leading ``module.``, or ``fnmatch`` patterns on such names
            (``*`` crosses dots). What matches the name of a module selects all parameters below it.

    Raises:
        ValueError: If a pattern selects nothing, or all parameters would be frozen; nothing is changed then.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8))
        >>> freeze(model, ["0"])
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['1.weight', '1.bias']
    """
    mistakes = mistakes_in(model, patterns)
    if mistakes:
        raise ValueError(" ".join(mistakes))
    for name, parameter in named_parameters(model):
        if any(_selects(pattern, name) for pattern in patterns):
            parameter.requires_grad_(False)


def mistakes_in(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """What is wrong with patterns for :func:`freeze`, each a line that begins with its key."""
    names = [name for name, _ in named_parameters(model)]
    trainable = [name for name, parameter in named_parameters(model) if parameter.requires_grad]
    mistakes = [
        f"`freeze[{position}]` (={pattern!r}) selects no parameter.{_hint(pattern, names)}"
        for position, pattern in enumerate(patterns)
        if not any(_selects(pattern, name) for name in names)
    ]
    if patterns and all(any(_selects(pattern, name) for pattern in patterns) for name in trainable):
        mistakes.append(f"`freeze` (={list(patterns)!r}) leaves no parameter to train: all {len(names)} are frozen.")
    return mistakes


def _selects(pattern: str, name: str) -> bool:
    return any(fnmatchcase(whole, pattern) for whole in _name_and_modules(name))


def _name_and_modules(name: str) -> list[str]:
    """``a.b.weight`` and the modules that it is in: ``a.b`` and ``a``."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def _hint(pattern: str, names: Sequence[str]) -> str:
    known = dict.fromkeys(whole for name in names for whole in _name_and_modules(name))
    close = difflib.get_close_matches(pattern.removeprefix("module."), known, n=1)
    if close:
        return f" Did you mean `{close[0]}`?"
    return f" Choose from: {', '.join(dict.fromkeys(name.partition('.')[0] for name in names))}, or what is in them."
