"""Our networks with the weights that a conversion gave, and how they are compared with those of the source."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from ws_algorithm import apply_weight_standardization, convert_checkpoint, is_weight_standardized, read_checkpoint
from ws_algorithm.recipes.models.rcnn import build_faster_rcnn, build_mask_rcnn

GN = functools.partial(nn.GroupNorm, 32)
BLOCKS = {"50": [3, 4, 6, 3], "101": [3, 4, 23, 3]}
# Of the largest value, in float64. In float32, the roundings of a hundred layers with random weights alone make 1e-4
TOLERANCE = 1e-6


def converted_file(path: Path, model: str, source: str | None = None) -> Any:
    return convert_checkpoint(read_checkpoint(path), source, model=model)


def classifier(arch: str, norm: Callable[[int], nn.Module] = GN) -> nn.Module:
    """torchvision's network under a name such as ``resnext101_32x4d``, which it has no builder for."""
    family, _, width = arch.partition("_")
    groups, width_per_group = (32, 4) if width else (1, 64)
    depth = family.removeprefix("resnext").removeprefix("resnet")
    return ResNet(Bottleneck, BLOCKS[depth], groups=groups, width_per_group=width_per_group, norm_layer=norm)


def detector(model: str, options: dict[str, Any]) -> nn.Module:
    """The network within our detector of a name such as ``mask_rcnn_resnet50``."""
    kind, arch = model.split("_rcnn_")
    build: Any = {"faster": build_faster_rcnn, "mask": build_mask_rcnn}[kind]
    return build(arch, **options).module


def loaded(build: Callable[[], nn.Module], converted: Any, formula: str | None = None) -> Any:
    """The network of `build` with every converted tensor, standardized as the conversion says or under `formula`."""
    with torch.device("meta"):
        network = build()
    network.load_state_dict(converted.state_dict, strict=True, assign=True)
    network.double().eval()
    formula = formula or converted.formula
    if formula is not None:
        chosen: dict[str, Any] = {"include": converted.include} if converted.include else {"layers": "normalized"}
        apply_weight_standardization(network, formula=formula, **chosen)
    return network


def count_standardized(network: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) and is_weight_standardized(m) for m in network.modules())


def as_expected_by(converted: Any, images: Tensor) -> Tensor:
    """RGB images from 0 to 1 as the network with the converted weights takes them."""
    convention = converted.image_input
    seen = {"rgb": images, "bgr": images.flip(1)}[convention.channels] * convention.scale
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (convention.mean, convention.std)
    )
    return (seen - mean) / std


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert theirs.isfinite().all() and theirs.std() > 0.01 * theirs.abs().max(), "an output that could hide an error"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
