"""Weights of a source under the names of a target, with every tensor on both sides accounted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ws_algorithm.checkpoints.big_transfer import from_big_transfer, from_timm
from ws_algorithm.checkpoints.deeplabv3_pytorch import from_deeplabv3_pytorch
from ws_algorithm.checkpoints.detectron import from_detectron
from ws_algorithm.checkpoints.maskrcnn_benchmark import from_maskrcnn_benchmark
from ws_algorithm.checkpoints.mmdetection import from_mmdetection
from ws_algorithm.checkpoints.residual import (
    from_composer,
    from_mmdetection_backbone,
    from_weight_standardization,
    is_residual,
)
from ws_algorithm.checkpoints.sources import ImageInput, Renamed, StateDict
from ws_algorithm.checkpoints.targets import (
    KINDS,
    Norm,
    Shapes,
    fitting_model,
    kind_of,
    normalized_convolutions,
    target_shapes,
)
from ws_algorithm.formula import FORMULAS, Formula

NO_FORMULA = "none"  # of weights that were trained without standardization

SOURCES: dict[str, Callable[[StateDict], Renamed]] = {
    "weight_standardization": from_weight_standardization,
    "mmdetection": from_mmdetection,
    "mmdetection_backbone": from_mmdetection_backbone,
    "detectron": from_detectron,
    "maskrcnn_benchmark": from_maskrcnn_benchmark,
    "deeplabv3_pytorch": from_deeplabv3_pytorch,
    "timm": from_timm,
    "big_transfer": from_big_transfer,
    "composer": from_composer,
}


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """Weights for a model of torchvision or timm, and what they need so that the model computes what was published.

    Args:
        state_dict: Raw weights by the names of the model, in its order. The first convolution takes RGB.
        source: Where the weights are from; one of ``SOURCES``.
        model: What they are for.
        formula: Of the standardization: a name in ``FORMULAS``, a :class:`~ws_algorithm.formula.Formula`, or ``None``
            for a network without it.
        image_input: What the network with these weights sees of an image.
        options: Arguments of the model's builder: ``num_classes``, ``norm`` and, of detectors, how the source looks at
            anchors and regions.
        include: The convolutions that are standardized, for ``include`` of
            :func:`~ws_algorithm.functional.apply_weight_standardization`. ``None``, as of most: those that a norm
            follows, ``layers="normalized"``.
    """

    state_dict: dict[str, Tensor]
    source: str
    model: str
    formula: str | Formula | None
    image_input: ImageInput
    options: dict[str, Any]
    include: tuple[str, ...] | None = None


def convert_checkpoint(
    state_dict: StateDict, source: str | None = None, *, model: str, formula: str | None = None
) -> ConvertedCheckpoint:
    """Convert published weights to the names, the order of classes and the order of channels of a model.

    Args:
        state_dict: Tensors by the names of the source, as :func:`~ws_algorithm.checkpoints.reading.read_checkpoint`
            returns them.
        source: ``"weight_standardization"`` (the authors' classifiers), ``"mmdetection"`` (detectors of all versions),
            ``"mmdetection_backbone"`` (``open-mmlab://jhu/*_gn_ws``), ``"detectron"``, ``"maskrcnn_benchmark"`` (the
            authors' fork), ``"deeplabv3_pytorch"``, ``"timm"``, ``"big_transfer"`` or ``"composer"`` (models under
            Composer's own Weight Standardization). Default: ``None``, by the names in `state_dict`; see
            :func:`detect_source`.
        model: What the weights are for: ``"resnet50"``, ``"mask_rcnn_resnet50"`` and so on, ``"deeplabv3_resnet101"``,
            ``"resnetv2_50x1_bit"``. The message for an unknown one lists all.
        formula: The standardization that the weights were trained with, where it is not that of `source`: a name in
            ``FORMULAS``, or ``"none"``. Names of tensors do not tell it: ``configs/gn`` of mmdetection has those of
            ``configs/gn+ws``, and a network of this package those of Composer, whatever its formula. Default: ``None``,
            that of `source`.

    Returns:
        The converted weights. Tensors that need no change are those of `state_dict`.

    Raises:
        ValueError: If `state_dict` is empty or has other things than tensors by name; `source`, `model` or `formula` is
            not known; `source` is not where such names are from; or a tensor is left over, missing or of another shape.
            One message counts them all, and names the model that would fit, if there is one.

    Example:
        >>> import torch
        >>> shapes = target_shapes("resnet50", num_classes=1000)
        >>> published = {f"module.{name}": torch.zeros(shape) for name, shape in shapes.items()}
        >>> converted = convert_checkpoint(published, model="resnet50")
        >>> converted.source, converted.formula, len(converted.state_dict)
        ('weight_standardization', 'paper', 161)
    """
    kind = kind_of(model)
    _check_arguments(state_dict, source, formula)
    source = detect_source(state_dict) if source is None else source
    _check_source(state_dict, source)
    renamed = SOURCES[source](state_dict)
    norm: Norm = "batch" if any(name.endswith(".running_mean") for name in renamed.tensors) else "group"
    shapes = target_shapes(model, _number_of_classes(renamed, kind), norm if renamed.with_batch_norm else "group")
    _count_from_zero(renamed, shapes)
    _check(renamed, shapes, source, model)
    trained = renamed.formula if formula is None else None if formula == NO_FORMULA else formula
    include = renamed.include
    if trained is None or (include is not None and set(include) == normalized_convolutions(model, shapes)):
        include = None
    options = {"num_classes": _number_of_classes(renamed, kind), "norm": norm, **renamed.options}
    tensors = {name: renamed.tensors[name] for name in shapes if name in renamed.tensors}
    return ConvertedCheckpoint(tensors, source, model, trained, renamed.image_input, options, include)


def detect_source(state_dict: StateDict) -> str:
    """The source of weights by their names.

    Where two sources have the same names, the one is taken whose published files look like it:

    - A ResNet with ``fc`` and ``bn1`` is the authors', one without ``fc`` or with ``gn1`` mmdetection's backbone. Both
      have one formula and one input, so that the result is the same.
    - Blobs of a ResNet are Detectron's, those of a ResNeXt the authors'. Their ``R-50-GN-WS.pkl`` and
      ``R-101-GN-WS.pkl`` have the names of Detectron's, and another formula: give `source`.

    Raises:
        ValueError: If the names are of no source.
    """
    names = {name.removeprefix("module.") for name in state_dict}
    grouped = state_dict.get("res2_0_branch2b_w")
    if any(name.endswith("parametrizations.weight.original") for name in names):
        return "composer"
    if any(name.endswith("standardized_conv2d/kernel") for name in names) or "root.conv.weight" in names:
        return "big_transfer"
    if {"stem.conv.weight", "stages.0.blocks.0.norm1.weight"} <= names:
        return "timm"
    if "conv1_w" in names:
        is_resnext = grouped is not None and grouped.ndim == 4 and grouped.shape[0] != grouped.shape[1]
        return "maskrcnn_benchmark" if is_resnext else "detectron"
    if any(name.startswith(("rpn_head.", "roi_head.", "bbox_head.", "neck.")) for name in names):
        return "mmdetection"
    if any(name.startswith(("backbone.body.stem.", "roi_heads.box.")) for name in names):
        return "maskrcnn_benchmark"
    if any(name.startswith("aspp.") for name in names):
        return "deeplabv3_pytorch"
    if is_residual({name.removeprefix("backbone.") for name in names}):
        return "weight_standardization" if {"bn1.weight", "fc.weight"} <= names else "mmdetection_backbone"
    raise ValueError(_unknown(names))


def _check_arguments(state_dict: Any, source: Any, formula: Any) -> None:
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"`state_dict` must have tensors by name, got {type(state_dict).__name__}. `read_checkpoint` reads a file."
        )
    if not state_dict:
        raise ValueError("`state_dict` must have tensors by name, and it is empty.")
    others = [name for name, value in state_dict.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if others:
        raise ValueError(
            f"`state_dict` must have tensors by name, and {len(others)} of {len(state_dict)} are none, such as "
            f"{others[0]!r}, a {type(state_dict[others[0]]).__name__}. Give the weights alone."
        )
    if source is not None and (not isinstance(source, str) or source not in SOURCES):
        raise ValueError(f"`source` (={source!r}) must be one of {', '.join(SOURCES)}, or None to detect it.")
    names = [name for name, known in FORMULAS.items() if known.rescaling is None]  # others have gains, the files none
    if formula is not None and (not isinstance(formula, str) or formula not in (*names, NO_FORMULA)):
        raise ValueError(
            f"`formula` (={formula!r}) must be one of {', '.join(names)}, {NO_FORMULA!r} for weights that were trained "
            "without standardization, or None for that of the source."
        )


def _check_source(state_dict: StateDict, source: str) -> None:
    """Refuse weights of others under a source that has the names of its target: no rule would find them strange."""
    names = {name.removeprefix("module.") for name in state_dict}
    has_stages = "stem.conv.weight" in names and any(name.startswith("stages.") for name in names)
    has_raw = any(name.endswith(".parametrizations.weight.original") for name in names)
    needed = {
        "timm": (has_stages, "'stem.conv.weight' and others that start with 'stages.'"),
        "composer": (has_raw, "at least one that ends in '.parametrizations.weight.original'"),
    }
    fits, such = needed.get(source, (True, ""))
    if not fits:
        some = ", ".join(map(repr, sorted(names)[:3]))
        raise ValueError(
            f"`source` (={source!r}) must be where the names of `state_dict` are from. It has {such}; these are such "
            f"as {some}. Leave it out to have it told from the names."
        )


def _count_from_zero(renamed: Renamed, shapes: Shapes) -> None:
    """Give BatchNorm the counters that old versions of torch did not save; only its training reads them."""
    for name in shapes:
        layer, _, part = name.rpartition(".")
        if part == "num_batches_tracked" and f"{layer}.running_mean" in renamed.tensors:
            renamed.tensors.setdefault(name, torch.zeros((), dtype=torch.long))
            renamed.origin.setdefault(name, name)


def _unknown(names: set[str]) -> str:
    hint = ""
    if any(name.endswith(".running_mean") for name in names):
        hint = " It is of a network with BatchNorm and torchvision's weights need no conversion."
    some = ", ".join(map(repr, sorted(names)[:3])) or "none"
    return f"`source` cannot be told from the names, such as {some}.{hint} It must be one of {', '.join(SOURCES)}."


def _number_of_classes(renamed: Renamed, kind: str) -> int:
    name, default = KINDS[kind].classes
    tensor = renamed.tensors.get(name)
    return default if tensor is None or tensor.ndim == 0 else len(tensor)


def _check(renamed: Renamed, shapes: Shapes, source: str, model: str) -> None:
    """Raise ``ValueError`` unless the tensors are those of the target, all of them and in its shapes."""
    tensors = renamed.tensors
    missing = [name for name in shapes if name not in tensors and not _may_lack(renamed, name)]
    unknown = [*renamed.unknown, *(renamed.origin[name] for name in tensors if name not in shapes)]
    reshaped = [
        f"{renamed.origin[name]!r} {tuple(tensor.shape)} instead of {shapes[name]}"
        for name, tensor in tensors.items()
        if name in shapes and tuple(tensor.shape) != shapes[name]
    ]
    if not (missing or unknown or reshaped):
        return
    problems = [
        *_listed("missing", [repr(name) for name in missing]),
        *_listed("left over", [repr(name) for name in unknown]),
        *_listed("of another shape", reshaped),
    ]
    raise ValueError(
        f"`state_dict` (source {source!r}) must have the tensors of `model` {model!r}, all of them and no others. "
        f"{'. '.join(problems)}. {_advice(renamed, source, model)}"
    )


def _may_lack(renamed: Renamed, name: str) -> bool:
    """Whether a part of the model may be missing: it may if it is missing as a whole."""
    return any(name.startswith(part) and not _has(renamed, part) for part in renamed.may_lack)


def _has(renamed: Renamed, part: str) -> bool:
    return any(name.startswith(part) for name in renamed.tensors)


def _listed(what: str, items: list[str]) -> list[str]:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return [f"{len(items)} {what}: {', '.join(items[:3])}{more}"] if items else []


def _advice(renamed: Renamed, source: str, model: str) -> str:
    fitting = fitting_model(renamed.tensors)
    if fitting is not None and fitting != model:
        return f"`model` {fitting!r} would fit the names of its ResNet."
    if any(name.endswith(".running_mean") for name in renamed.tensors) and not renamed.with_batch_norm:
        return f"It has BatchNorm, and the networks of {source!r} have GroupNorm."
    return "Is the file whole, and of this source?"
