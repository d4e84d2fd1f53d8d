"""A recipe file, the files that it is based on and overrides, merged into one recipe."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ws_algorithm.recipes.catalogue import find_recipe, name_of
from ws_algorithm.recipes.schema import (
    BASE,
    DATA_BLOCKS,
    REFERRED_TO,
    Recipe,
    RecipeError,
    first_line,
    in_one_line,
    recipe_of,
)

log = logging.getLogger(__name__)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """Read a recipe with all that it is based on, and apply ``key=value`` overrides.

    Args:
        path: A YAML file. Its key ``base``, a path relative to the file, the name of a shipped recipe or a list of
            these, says what it is merged over; see :func:`merge`. Of a list, later ones are merged over earlier ones.
        overrides: ``key=value`` with dots in nested keys (``model.norm=batch``) and YAML values; later ones win.

    Returns:
        The recipe and the mistakes found in its shape, see :func:`~ws_algorithm.recipes.schema.recipe_of`.

    Raises:
        RecipeError: If the file, or one that it is based on, is not a YAML mapping or not there, or is based on itself.
    """
    values, errors = _apply_overrides(OmegaConf.create(_merged(_load(path))), overrides)
    return recipe_of(values, errors)


def lineage(path: Path) -> str:
    """The name of a recipe and of all that it is based on, such as ``cifar10/resnet20_gn on cifar10/resnet20_bn``.

    Raises:
        RecipeError: As :func:`read_recipe` does.
    """
    return _names(_load(path))


def merge(below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    """One mapping over another.

    Mappings merge key by key, and anything else replaces what is below. A mapping whose ``name`` is another than that
    of the one below replaces it whole: arguments of one builder say nothing to another. ``None`` removes the key below.

    Example:
        >>> merge({"model": {"name": "a", "depth": 8}, "seed": 1}, {"model": {"depth": 9}, "seed": None})
        {'model': {'name': 'a', 'depth': 9}}
        >>> merge({"model": {"name": "a", "depth": 8}}, {"model": {"name": "b"}})
        {'model': {'name': 'b'}}
    """
    if above.get("name") is not None and below.get("name", above["name"]) != above["name"]:
        return dict(above)
    merged = dict(below)
    for key, value in above.items():
        if value is None and key in below:
            del merged[key]
        elif isinstance(value, dict) and isinstance(below.get(key), dict):
            merged[key] = merge(below[key], value)
        else:
            merged[key] = value
    return merged


@dataclass(frozen=True)
class _File:
    """A recipe file as it stands, without its key ``base``, and the files that this key names."""

    path: Path
    values: dict[Any, Any]
    bases: list[_File]


def _load(path: Path, above: tuple[Path, ...] = ()) -> _File:
    """Read a file and all that it is based on; `above` are those that led to it, the first one first."""
    chain = (*above, path)
    if path.resolve() in [other.resolve() for other in above]:
        raise _refusal(chain, "a recipe cannot be based on itself.")
    values = _load_mapping(path, chain)
    named = values.pop(BASE, None)
    names = [named] if isinstance(named, str) else named or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        problem = f"`{BASE}` (={named!r}) must be the path of a recipe, the name of a shipped one, or a list of these."
        raise _refusal(chain, problem)
    try:
        found = [find_recipe(name, path.parent, BASE) for name in names]
    except ValueError as error:
        raise _refusal(chain, str(error)) from error
    return _File(path, values, [_load(base, chain) for base in found])


def _load_mapping(path: Path, chain: Sequence[Path]) -> dict[Any, Any]:
    try:
        config = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise _refusal(chain, f"not valid YAML: {in_one_line(error)}") from error
    except OSError as error:  # OmegaConf's error for a file that holds a scalar, or a file that cannot be read
        raise _refusal(chain, f"not a recipe: {first_line(error)}.") from error
    values = OmegaConf.to_container(config)
    if not isinstance(values, dict):
        raise _refusal(chain, "not a recipe: the file must hold `key: value` lines.")
    return values


def _refusal(chain: Sequence[Path], problem: str) -> RecipeError:
    """The error that says what is wrong with the last file of a chain, each based on the next."""
    way = f"`{BASE}` ({' -> '.join(map(str, chain))}): " if len(chain) > 1 else ""
    return RecipeError(str(chain[0]), [way + problem])


def _merged(file: _File) -> dict[Any, Any]:
    below: dict[Any, Any] = {}
    for base in file.bases:
        below = merge(below, _merged(base))
    return merge(below, file.values)


def _names(file: _File) -> str:
    if not file.bases:
        return name_of(file.path)
    names = [_names(base) for base in file.bases]
    if len(names) > 1:
        names = [f"({name})" if base.bases else name for name, base in zip(names, file.bases, strict=True)]
    return f"{name_of(file.path)} on {', '.join(names)}"


def _apply_overrides(config: Any, overrides: Sequence[str]) -> tuple[dict[Any, Any], list[str]]:
    """The plain values of a configuration after its overrides, interpolations resolved."""
    errors = []
    for override in overrides:
        key, equals, text = override.partition("=")
        try:
            if not equals or not key:
                raise ValueError("an override is written key=value")
            if re.split(r"[.\[]", key)[0] == BASE:
                raise ValueError(f"`{BASE}` stands in a recipe's file alone. Name the recipe that is to run instead")
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
            OmegaConf.update(config, key, parsed["value"], merge=False, force_add=True)  # pyright: ignore
        except (ValueError, OmegaConfBaseException, YAMLError) as error:
            errors.append(f"override {override!r}: {first_line(error)}.")
    errors += _without_effect(config, overrides)
    values = {}
    for key in config:
        if OmegaConf.is_missing(config, key):
            continue
        try:
            node = config[key]
            values[key] = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        except OmegaConfBaseException as error:
            errors.append(f"`{getattr(error, 'full_key', None) or key}`: {first_line(error)}.")
    return values, errors


def _without_effect(config: Any, overrides: Sequence[str]) -> list[str]:
    """A mistake for each override of a key that does nothing by itself, if the data have one of their own.

    Where the data have none, such as those that ship with a library, a warning tells.
    """
    values = OmegaConf.to_container(config)
    assert isinstance(values, dict), "a recipe is a mapping"
    overridden = {override.partition("=")[0] for override in overrides}
    errors = []
    for name in REFERRED_TO:
        if name not in overridden or re.search(rf"\$\{{\s*\.*{name}\s*\}}", str(values)):
            continue
        blocks = [key for key in DATA_BLOCKS if isinstance(values.get(key), dict) and name in values[key]]
        line = (
            f"`{name}` (={values.get(name)!r}): nothing in this recipe refers to it as ${{{name}}}, so the override "
            "would change nothing."
        )
        if blocks:
            errors.append(f"{line} Override {' and '.join(f'`{key}.{name}`' for key in blocks)}.")
        else:
            log.warning("%s Leave it out.", line)
    return errors
