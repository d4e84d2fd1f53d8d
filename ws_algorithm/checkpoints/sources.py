"""What a source of published weights is: its names, its formula and how it sees an image."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ws_algorithm.formula import Formula

StateDict = Mapping[str, Tensor]
# A pattern of whole names, and what they become: a template of `re`, a function of the match, or `None`: left out
Rule = tuple[str, "str | Callable[[re.Match[str]], str] | None"]

PARTS_OF_NORM = "weight|bias|running_mean|running_var|num_batches_tracked"


@dataclass(frozen=True)
class ImageInput:
    """What a network sees of an image: ``(image * scale - mean) / std`` in each channel, the image from 0 to 1.

    Args:
        channels: The order of the channels, of `mean` and `std` too.
        scale: 1, or 255.
        mean: Of each channel, after scaling.
        std: Of each channel, after scaling.
    """

    channels: Literal["rgb", "bgr"]
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = ImageInput("rgb", 1.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Detectron's mean of BGR, in the order of RGB: the first convolution is turned round with it
DETECTRON = ImageInput("rgb", 255.0, (122.7717, 115.9465, 102.9801), (1.0, 1.0, 1.0))
HALF = ImageInput("rgb", 1.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass
class Renamed:
    """The tensors of a source under the names of a target, before they are checked against it.

    Args:
        tensors: By the names of the target.
        formula: A name in ``FORMULAS``, a :class:`Formula`, or ``None`` for a network without standardization.
        image_input: What the network sees of an image.
        unknown: Names of the source that no rule knows.
        origin: The name that the source has for each of `tensors`.
        options: Arguments of the target's builder that the source was trained with.
        may_lack: Starts of names that the target has and this source need not have.
        with_batch_norm: Whether networks of this source may have BatchNorm.
        include: The convolutions that are standardized, where they need not be those that a norm follows.
    """

    tensors: dict[str, Tensor]
    formula: str | Formula | None
    image_input: ImageInput
    unknown: list[str] = field(default_factory=list)
    origin: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    may_lack: tuple[str, ...] = ()
    with_batch_norm: bool = False
    include: tuple[str, ...] | None = None


def rename(
    state_dict: StateDict, rules: Iterable[Rule], formula: str | Formula | None, image_input: ImageInput, **others: Any
) -> Renamed:
    """Rename every tensor by the first rule that fits its whole name; the second of one new name counts as unknown."""
    compiled = [(re.compile(pattern), new) for pattern, new in rules]
    renamed = Renamed({}, formula, image_input, **others)
    for name, tensor in state_dict.items():
        matches = ((pattern.fullmatch(name), new) for pattern, new in compiled)
        found, new = next(((match, new) for match, new in matches if match), (None, None))
        if found and new is None:
            continue
        target = (found.expand(new) if isinstance(new, str) else new(found)) if found and new is not None else None
        if target is None or target in renamed.tensors:
            renamed.unknown.append(name)
            continue
        renamed.tensors[target] = tensor
        renamed.origin[target] = name
    return renamed


def without_prefix(state_dict: StateDict, prefix: str) -> dict[str, Tensor]:
    """Names without a prefix that most have; all as they are if two would have one name then."""
    prefixed = sum(name.startswith(prefix) for name in state_dict)
    stripped = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    return stripped if 2 * prefixed > len(state_dict) == len(stripped) else dict(state_dict)


def body_rules(source: str, target: str) -> list[Rule]:
    """Rules for the ResNet, without classifier, of sources with the names of torchvision or mmdetection."""
    here = re.escape(source)
    norm = f"({PARTS_OF_NORM})"
    return [
        (rf"{here}conv1\.weight", rf"{target}conv1.weight"),
        (rf"{here}(?:bn|gn)1\.{norm}", rf"{target}bn1.\1"),
        (rf"{here}(layer[1-4]\.\d+\.conv[123]\.weight)", rf"{target}\1"),
        (rf"{here}(layer[1-4]\.\d+)\.(?:bn|gn)([123])\.{norm}", rf"{target}\1.bn\2.\3"),
        (rf"{here}(layer[1-4]\.\d+\.downsample\.0\.weight)", rf"{target}\1"),
        (rf"{here}(layer[1-4]\.\d+\.downsample\.1\.{norm})", rf"{target}\1"),
    ]


def turn_channels_round(renamed: Renamed, stem: str) -> None:
    """The first convolution of a network of BGR images as it is for RGB."""
    weight = renamed.tensors.get(stem)
    if weight is not None and weight.ndim == 4:
        renamed.tensors[stem] = weight.flip(1)
