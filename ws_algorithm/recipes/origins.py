"""Where pretrained weights come from, against what a recipe does with them: its formula, and its images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ws_algorithm.checkpoints.sources import ImageInput
from ws_algorithm.formula import FORMULAS
from ws_algorithm.recipes.pretrained import Origin, input_difference, read_origin
from ws_algorithm.recipes.schema import Recipe

_ALGORITHM = "WeightStandardization"
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
        line = f"{_ALGORITHM}: {{layers: normalized, formula: {origin.formula}}}"
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
