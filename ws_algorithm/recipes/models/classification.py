"""Image classifiers, each with the normalization layer of your choice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from composer.models import ComposerClassifier
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

NormLayer = Callable[[int], nn.Module]


class CifarResNet(nn.Module):
    """ResNet for small images: three stages of ``width``, ``2 * width`` and ``4 * width`` channels.

    A 3x3 stem without pooling, ``(depth - 2) / 6`` basic blocks per stage, 1x1 convolutions on the shortcuts that
    change shape, global average pooling. Attribute names are torchvision's.

    Args:
        depth: Number of weighted layers, 6 n + 2: 8, 14, 20, 32, 44, 56, 110.
        width: Channels of the first stage; 16 in the paper.
        num_classes: Number of outputs.
        in_channels: Channels of an image: 1 for gray, 3 for RGB.
        norm_layer: Makes a normalization layer from a number of channels.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, num_classes)``.

    Raises:
        ValueError: If `depth` is not 6 n + 2 with n of at least 1, or another number is not positive.

    Source: He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2 (shortcut option B).
    """

    def __init__(self, depth: int, width: int, num_classes: int, in_channels: int, norm_layer: NormLayer) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"`depth` (={depth}) must be 6 n + 2 with n of at least 1: 8, 14, 20, 32, 44, 56 or 110.")
        for argument, value in (("width", width), ("num_classes", num_classes), ("in_channels", in_channels)):
            if value < 1:
                raise ValueError(f"`{argument}` (={value}) must be at least 1.")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = norm_layer(width)
        self.layer1 = _stage(width, width, blocks, stride=1, norm_layer=norm_layer)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2, norm_layer=norm_layer)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2, norm_layer=norm_layer)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def build_cifar_resnet(
    num_classes: int,
    depth: int = 20,
    width: int = 16,
    in_channels: int = 3,
    norm: Literal["batch", "group"] = "group",
    num_groups: int = 8,
) -> ComposerClassifier:
    """A :class:`CifarResNet` as a ``ComposerModel`` with cross-entropy loss and accuracy.

    Args:
        num_classes: Number of classes.
        depth: 6 n + 2. Default: ``20``.
        width: Channels of the first stage. Default: ``16``.
        in_channels: Channels of an image. Default: ``3``.
        norm: ``"group"`` for GroupNorm, ``"batch"`` for BatchNorm. Default: ``"group"``.
        num_groups: Groups of each GroupNorm; must divide `width`. Default: ``8``, two channels per group at width 16.

    Raises:
        ValueError: If `depth`, `norm` or `num_groups` does not fit.
    """
    norm_layer = resolve_norm_layer(norm, num_groups, width)
    return ComposerClassifier(CifarResNet(depth, width, num_classes, in_channels, norm_layer), num_classes=num_classes)


def resolve_norm_layer(norm: str, num_groups: int, narrowest: int) -> NormLayer:
    """A maker of normalization layers for a network whose narrowest layer has `narrowest` channels.

    Raises:
        ValueError: If `norm` is not known, or `num_groups` does not divide `narrowest`.
    """
    if norm == "batch":
        return nn.BatchNorm2d
    if norm != "group":
        raise ValueError(f"`norm` (={norm!r}) must be 'batch' or 'group'.")
    if num_groups < 1 or narrowest % num_groups:
        raise ValueError(f"`num_groups` (={num_groups}) must divide `width` (={narrowest}).")
    return partial(nn.GroupNorm, num_groups)


def _stage(in_channels: int, channels: int, blocks: int, stride: int, norm_layer: NormLayer) -> nn.Sequential:
    shortcut = None
    if stride != 1 or in_channels != channels:
        shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), norm_layer(channels))
    first = BasicBlock(in_channels, channels, stride, shortcut, norm_layer=norm_layer)
    others = [BasicBlock(channels, channels, norm_layer=norm_layer) for _ in range(blocks - 1)]
    return nn.Sequential(first, *others)
