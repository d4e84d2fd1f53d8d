"""Where pretrained weights come from, against what a recipe does with them: its formula, and its images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ws_algorithm.checkpoints.sources import ImageInput
from ws_algorithm.formula import FORMULAS
from ws_algorithm.recipes.pretrained import Origin, input_difference, kernels_in, read_origin
from ws_algorithm.recipes.schema import Recipe
from ws_algorithm.selection import Rules, Selection, select_convolutions

_ALGORITHM = "WeightStandardization"
_FITTED = ("num_classes", "norm")  # options that the names and shapes of weights show, which loading compares
_KEEPS_FUNCTION = "affine"  # the formula under which a network that was trained without any computes the same


def take_formula(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with the formula that its pretrained weights were trained with, where it names none itself.

    Returns:
        The recipe, and the mistakes: another formula, or no Weight Standardization for weights that need it.
    """
    origin = _origin_of(recipe)
    if origin is None or origin.formula is None:
        return recipe, []
    algorithms: dict[str, Any] = recipe.algorithms or {}
    weights = f"`model.pretrained` (={recipe.model['pretrained']!r}) was trained with"
    if _ALGORITHM not in algorithms:
        which = "layers: normalized" if origin.include is None else "include: [...]"
        line = f"{_ALGORITHM}: {{{which}, formula: {origin.formula}}}"
        return recipe, [
            f"`algorithms`: {weights} Weight Standardization, and without it the network would be another one. "
            f"Add `{line}`, as the file that `ws-algorithm convert` wrote beside the weights has it."
        ]
    block = algorithms[_ALGORITHM]
    if not isinstance(block, dict):
        return recipe, []
    formula = block.get("formula")
    if formula is None:
        block = {**block, "formula": origin.formula}
        return replace(recipe, algorithms={**algorithms, _ALGORITHM: block}), []
    if formula in FORMULAS and FORMULAS[formula] != FORMULAS[origin.formula]:
        return recipe, [
            f"`algorithms.{_ALGORITHM}.formula` (={formula!r}) must be {origin.formula!r}: {weights} that. Leave it "
            "out, and it is taken from there."
        ]
    return recipe, []


def misfitting_options(recipe: Recipe, builder: Callable[..., Any]) -> list[str]:
    """Mistakes in arguments of the model under which its pretrained weights would compute something else.

    Args:
        recipe: Whose `model` has the arguments.
        builder: Of the model, whose defaults stand for arguments that are not given.
    """
    origin = _origin_of(recipe)
    if origin is None:
        return []
    mistakes = []
    parameters = inspect.signature(builder).parameters
    for name, theirs in origin.options.items():
        if name in _FITTED or name not in parameters:
            continue
        ours = recipe.model.get(name, parameters[name].default)
        if ours != theirs:
            given = f"={ours!r}" if name in recipe.model else f"={ours!r}, the default"
            value = str(theirs).lower() if isinstance(theirs, bool) else theirs
            mistakes.append(
                f"`model.{name}` ({given}) must be {theirs!r}: `model.pretrained` (={recipe.model['pretrained']!r}) "
                f"was trained with that. Set model.{name}={value}."
            )
    return mistakes


def check_standardized(recipe: Recipe, model: nn.Module, selection: Selection) -> None:
    """Check that of the convolutions that pretrained weights are for, those are standardized that were in training.

    Args:
        recipe: Whose `model` names the weights.
        model: Before it is standardized.
        selection: What the recipe chooses of `model`.

    Raises:
        ValueError: If they are others; names the first of them.
    """
    origin = _origin_of(recipe)
    if origin is None or origin.formula is None:
        return
    places = _places_of(kernels_in(recipe.model["pretrained"]), model)
    chosen = {choice.name for choice in selection.chosen}
    if origin.include is None:
        wanted = {choice.name for choice in select_convolutions(model, Rules(layers="normalized")).chosen}
        rule = "`layers: normalized`"
    else:
        wanted = {name for name, own in places.items() if own in origin.include}
        rule = "the `include` of the file that `ws-algorithm convert` wrote beside the weights"
    more = [name for name in places if name in chosen - wanted]
    fewer = [name for name in places if name in wanted - chosen]
    if more or fewer:
        taken = [f"with {_first(more)}, which were not standardized then"] if more else []
        taken += [f"without {_first(fewer)}, which were"] if fewer else []
        raise ValueError(
            f"these rules choose other convolutions than `model.pretrained` (={recipe.model['pretrained']!r}) was "
            f"trained with: {' and '.join(taken)}. Give {rule}, and no other rules for these"
        )


def _places_of(kernels: Sequence[str], model: nn.Module) -> dict[str, str]:
    """The layers of a model that those of a file are for, each with its name in the file, in the order of the file."""
    names = {name for name, _ in model.named_modules()}
    starts = {name.removesuffix(kernels[0]) for name in names if name.endswith(kernels[0])} if kernels else set()
    fitting = [start for start in starts if all(f"{start}{own}" in names for own in kernels)]
    return {f"{start}{own}": own for start in sorted(fitting, key=len)[:1] for own in kernels}


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def mean_and_std(seen: ImageInput) -> tuple[list[float], list[float]]:
    """What data must subtract from RGB images from 0 to 1, and divide them by, to be what weights expect."""
    mean, std = ([float(f"{value / seen.scale:.6g}") for value in values] for values in (seen.mean, seen.std))
    return (mean, std) if seen.channels == "rgb" else (mean[::-1], std[::-1])


def function_that_changes(recipe: Recipe) -> str | None:
    """A line for weights that were trained without Weight Standardization and get it; ``None`` for others."""
    origin, block = _origin_of(recipe), (recipe.algorithms or {}).get(_ALGORITHM)
    if origin is None or origin.formula is not None or block is None or block.get("formula") == _KEEPS_FUNCTION:
        return None
    return (
        f"`model.pretrained` (={recipe.model['pretrained']!r}) was trained without Weight Standardization: with it, "
        f"the network begins with another function than those weights had. formula={_KEEPS_FUNCTION!r} keeps it."
    )


def unchecked_origin(model: nn.Module) -> Origin | None:
    """Where the weights in a model are from, if they expect images that it takes as the data give them."""
    found = [getattr(module, "origin", None) for module in model.modules()]
    return next((origin for origin in found if isinstance(origin, Origin)), None)


def image_difference(origin: Origin, as_data: Callable[[Image.Image], Tensor]) -> str | None:
    """How data give images otherwise than weights expect them; ``None`` if they do not.

    Args:
        origin: Of the weights.
        as_data: A picture in RGB as one of the images of the data. What it does to a channel is read off a black and a
            white one.
    """
    black, white = (as_data(Image.new("RGB", (256, 256), colour)) for colour in ("black", "white"))
    low, high = (image.flatten(1).median(1).values.double() for image in (black, white))
    if len(low) != 3:
        return f"expect three channels; the data have {len(low)}"
    std = 1 / (high - low)
    mean = -low * std
    return input_difference(origin.image_input, ImageInput("rgb", 1.0, _three(mean), _three(std)))


def _three(values: Tensor) -> tuple[float, float, float]:
    red, green, blue = torch.round(values, decimals=6).tolist()
    return red, green, blue


def _origin_of(recipe: Recipe) -> Origin | None:
    """That of the pretrained weights; ``None`` too for a file with a mistake, which building the model finds."""
    pretrained = (recipe.model or {}).get("pretrained")
    if not isinstance(pretrained, str):
        return None
    try:
        return read_origin(pretrained)
    except ValueError:
        return None
