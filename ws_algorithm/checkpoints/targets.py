"""The networks that weights are converted to: names and shapes of their tensors, without building them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

Norm = Literal["group", "batch"]
Shapes = dict[str, tuple[int, ...]]

# Blocks of each stage, width of a stage's 3x3 convolution in stages of 64, and groups; `None`: two 3x3 instead of three
_BOTTLENECKS = {
    "resnet50": ([3, 4, 6, 3], 1, 1),
    "resnet101": ([3, 4, 23, 3], 1, 1),
    "resnet152": ([3, 8, 36, 3], 1, 1),
    "resnext50_32x4d": ([3, 4, 6, 3], 2, 32),
    "resnext101_32x4d": ([3, 4, 23, 3], 2, 32),
}
_BASIC = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3]}
_DETECTED = ("resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x4d")
_BIT = {
    f"resnetv2_{depth}x{width}_bit": (blocks, width)
    for depth, blocks, widths in (
        (50, [3, 4, 6, 3], (1, 3)),
        (101, [3, 4, 23, 3], (1, 3)),
        (152, [3, 8, 36, 3], (2, 4)),
    )
    for width in widths
}


class Kind(NamedTuple):
    """What the networks of one kind have in common.

    Args:
        prefix: What the names of the models start with.
        body: What the names of the tensors of the ResNet start with.
        classes: The tensor that has one row per class, and how many there are if nothing says.
    """

    prefix: str
    body: str
    classes: tuple[str, int]


KINDS = {
    "mask_rcnn": Kind("mask_rcnn_", "backbone.body.", ("roi_heads.box_predictor.cls_score.weight", 81)),
    "faster_rcnn": Kind("faster_rcnn_", "backbone.body.", ("roi_heads.box_predictor.cls_score.weight", 81)),
    # torchvision's head has one more 3x3 convolution, `classifier.1` to `.3`, which the authors' has not
    "deeplabv3": Kind("deeplabv3_", "backbone.", ("classifier.1.weight", 21)),
    "bit": Kind("", "", ("head.fc.weight", 1000)),
    "classifier": Kind("", "", ("fc.weight", 1000)),
}

MODELS: dict[str, tuple[str, str]] = {
    **{name: ("classifier", name) for name in (*_BASIC, *_BOTTLENECKS)},
    **{f"{kind}_{arch}": (kind, arch) for kind in ("faster_rcnn", "mask_rcnn") for arch in _DETECTED},
    "deeplabv3_resnet101": ("deeplabv3", "resnet101"),
    **{name: ("bit", name) for name in _BIT},
}


def kind_of(model: str) -> str:
    """The kind of a model by its name, one of ``KINDS``.

    Raises:
        ValueError: If `model` is not one of ``MODELS``.
    """
    if not isinstance(model, str) or model not in MODELS:
        raise ValueError(f"`model` (={model!r}) must be one of {', '.join(MODELS)}.")
    return MODELS[model][0]


def target_shapes(model: str, num_classes: int, norm: Norm = "group") -> Shapes:
    """Names and shapes of the tensors of a model, in the order of its state dict.

    Args:
        model: One of ``MODELS``. Names are torchvision's, those of ``resnetv2_*_bit`` timm's.
        num_classes: Rows of the last layer; the background of a detector is one of them.
        norm: ``"group"`` or ``"batch"``, whose statistics are tensors too.
    """
    kind = kind_of(model)
    arch = MODELS[model][1]
    if kind == "classifier":
        width = 512 if arch in _BASIC else 2048
        return {**_resnet(arch, norm), **_linear("fc", num_classes, width)}
    if kind == "bit":
        return _bit(*_BIT[arch], num_classes)
    body = {f"{KINDS[kind].body}{name}": shape for name, shape in _resnet(arch, norm).items()}
    if kind == "deeplabv3":
        return {**body, **_deeplab_head(num_classes, norm)}
    heads = {**_pyramid(norm), **_box_heads(num_classes, norm)}
    return {**body, **heads, **(_mask_heads(num_classes, norm) if kind == "mask_rcnn" else {})}


def normalized_convolutions(model: str, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The convolutions of a model that a normalization layer follows, as modules are named."""
    plain = ("rpn.", "roi_heads.mask_predictor.", "head.fc.", KINDS["deeplabv3"].classes[0])
    return {
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if len(shape) == 4 and not name.startswith(plain) and kind_of(model) != "bit"
    }


def fitting_model(tensors: Mapping[str, Tensor]) -> str | None:
    """The model that tensors, named as those of a target, are of by their ResNet; ``None`` if none of ``MODELS`` is."""
    kind = _kind_of_names(tensors)
    found = _body_convolutions(kind, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    for model, (own_kind, _) in MODELS.items():
        own = _body_convolutions(kind, target_shapes(model, 2)) if own_kind == kind else {}
        if own and found.items() <= own.items() and _blocks(found) == _blocks(own):
            return model
    return None


def _body_convolutions(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    body = KINDS[kind].body
    return {n: s for n, s in shapes.items() if len(s) == 4 and n.startswith(body) and not n.startswith("head.")}


def _blocks(names: Mapping[str, Any]) -> set[str]:
    return {re.sub(r"\.(conv|downsample).*", "", name) for name in names}


def _kind_of_names(names: Mapping[str, Any]) -> str:
    if any(name.startswith("roi_heads.mask") for name in names):
        return "mask_rcnn"
    if any(name.startswith(("roi_heads.", "rpn.")) for name in names):
        return "faster_rcnn"
    if any(name.startswith("classifier.") for name in names):
        return "deeplabv3"
    return "bit" if "stem.conv.weight" in names else "classifier"


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _conv(name: str, rows: int, columns: int, size: int) -> Shapes:
    return {f"{name}.weight": (rows, columns, size, size), f"{name}.bias": (rows,)}


def _norm(name: str, channels: int, norm: Norm) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}
    if norm == "batch":
        shapes |= {f"{name}.running_mean": (channels,), f"{name}.running_var": (channels,)}
        shapes[f"{name}.num_batches_tracked"] = ()
    return shapes


def _conv_norm(conv: str, after: str, rows: int, columns: int, size: int, norm: Norm) -> Shapes:
    return {f"{conv}.weight": (rows, columns, size, size), **_norm(after, rows, norm)}


def _resnet(arch: str, norm: Norm) -> Shapes:
    """A ResNet or ResNeXt without its classifier."""
    shapes = _conv_norm("conv1", "bn1", 64, 3, 7, norm)
    blocks, wide, groups = (_BASIC[arch], 1, 1) if arch in _BASIC else _BOTTLENECKS[arch]
    channels = 64
    for stage, count in enumerate(blocks):
        inner = 64 * wide * 2**stage
        outer = inner if arch in _BASIC else 256 * 2**stage
        # rows, columns and size of each convolution, given the channels that come in
        later = [(inner, inner // groups, 3), (outer, inner, 1)]
        for block in range(count):
            name = f"layer{stage + 1}.{block}"
            convs = [(inner, channels, 3), (inner, inner, 3)] if arch in _BASIC else [(inner, channels, 1), *later]
            for index, (rows, columns, size) in enumerate(convs, 1):
                shapes |= _conv_norm(f"{name}.conv{index}", f"{name}.bn{index}", rows, columns, size, norm)
            if block == 0 and (stage > 0 or channels != outer):
                down = f"{name}.downsample"
                shapes |= _conv_norm(f"{down}.0", f"{down}.1", outer, channels, 1, norm)
            channels = outer
    return shapes


def _pyramid(norm: Norm) -> Shapes:
    shapes: Shapes = {}
    for blocks, size in (("inner_blocks", 1), ("layer_blocks", 3)):
        for level in range(4):
            name = f"backbone.fpn.{blocks}.{level}"
            columns = 256 * 2**level if size == 1 else 256
            shapes |= _conv_norm(f"{name}.0", f"{name}.1", 256, columns, size, norm)
    proposals = _conv("rpn.head.conv.0.0", 256, 256, 3)
    return {**shapes, **proposals, **_conv("rpn.head.cls_logits", 3, 256, 1), **_conv("rpn.head.bbox_pred", 12, 256, 1)}


def _convs_of_head(head: str, norm: Norm) -> Shapes:
    shapes: Shapes = {}
    for index in range(4):
        shapes |= _conv_norm(f"{head}.{index}.0", f"{head}.{index}.1", 256, 256, 3, norm)
    return shapes


def _box_heads(num_classes: int, norm: Norm) -> Shapes:
    predictor = "roi_heads.box_predictor"
    return {
        **_convs_of_head("roi_heads.box_head", norm),
        **_linear("roi_heads.box_head.5", 1024, 256 * 7 * 7),
        **_linear(f"{predictor}.cls_score", num_classes, 1024),
        **_linear(f"{predictor}.bbox_pred", 4 * num_classes, 1024),
    }


def _mask_heads(num_classes: int, norm: Norm) -> Shapes:
    predictor = "roi_heads.mask_predictor"
    return {
        **_convs_of_head("roi_heads.mask_head", norm),
        **_conv(f"{predictor}.conv5_mask", 256, 256, 2),
        **_conv(f"{predictor}.mask_fcn_logits", num_classes, 256, 1),
    }


def _deeplab_head(num_classes: int, norm: Norm) -> Shapes:
    pooling = "classifier.0"
    shapes: Shapes = {}
    for index, size in enumerate((1, 3, 3, 3)):
        name = f"{pooling}.convs.{index}"
        shapes |= _conv_norm(f"{name}.0", f"{name}.1", 256, 2048, size, norm)
    shapes |= _conv_norm(f"{pooling}.convs.4.1", f"{pooling}.convs.4.2", 256, 2048, 1, norm)
    shapes |= _conv_norm(f"{pooling}.project.0", f"{pooling}.project.1", 256, 5 * 256, 1, norm)
    return {**shapes, **_conv(KINDS["deeplabv3"].classes[0].removesuffix(".weight"), num_classes, 256, 1)}


def _bit(blocks: list[int], width: int, num_classes: int) -> Shapes:
    """timm's ResNetV2 with norms before the convolutions, as Big Transfer has them."""
    channels = 64 * width
    shapes: Shapes = {"stem.conv.weight": (channels, 3, 7, 7)}
    for stage, count in enumerate(blocks):
        inner, outer = 64 * width * 2**stage, 256 * width * 2**stage
        for block in range(count):
            name = f"stages.{stage}.blocks.{block}"
            if block == 0:
                shapes[f"{name}.downsample.conv.weight"] = (outer, channels, 1, 1)
            for index, (rows, columns, size) in enumerate(
                [(inner, channels, 1), (inner, inner, 3), (outer, inner, 1)], 1
            ):
                shapes |= _norm(f"{name}.norm{index}", columns, "group")
                shapes[f"{name}.conv{index}.weight"] = (rows, columns, size, size)
            channels = outer
    return {**shapes, **_norm("norm", channels, "group"), **_conv("head.fc", num_classes, channels, 1)}
