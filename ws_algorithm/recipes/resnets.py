"""ResNets and ResNeXts by name, with any normalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

# Blocks of each stage, and what a ResNeXt has besides
_ARCHITECTURES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], list[int], dict[str, Any]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2], {}),
    "resnet34": (BasicBlock, [3, 4, 6, 3], {}),
    "resnet50": (Bottleneck, [3, 4, 6, 3], {}),
    "resnet101": (Bottleneck, [3, 4, 23, 3], {}),
    "resnet152": (Bottleneck, [3, 8, 36, 3], {}),
    "resnext50_32x4d": (Bottleneck, [3, 4, 6, 3], {"groups": 32, "width_per_group": 4}),
    "resnext101_32x4d": (Bottleneck, [3, 4, 23, 3], {"groups": 32, "width_per_group": 4}),
}


def build_resnet(
    arch: str, names: tuple[str, ...], norm_layer: Callable[[int], nn.Module], num_classes: int = 1000
) -> ResNet:
    """torchvision's ResNet or ResNeXt, with the stride in the 3x3 convolution.

    Convolutions start from N(0, 2 / (k k C_out)), norms with a scale of one.

    Args:
        arch: One of `names`.
        names: The architectures to choose from.
        norm_layer: Makes a normalization layer from a number of channels.
        num_classes: Number of classes. Default: ``1000``.

    Raises:
        ValueError: If `arch` is not one of `names`.

    Source: He et al. 2016, https://arxiv.org/abs/1512.03385; Xie et al. 2017, https://arxiv.org/abs/1611.05431.
    """
    if arch not in names:
        raise ValueError(f"`arch` (={arch!r}) must be one of {', '.join(names)}.")
    block, layers, grouped = _ARCHITECTURES[arch]
    return ResNet(block, layers, num_classes=num_classes, norm_layer=norm_layer, **grouped)
