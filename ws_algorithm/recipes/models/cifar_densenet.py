"""DenseNets for small images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ws_algorithm.recipes.classifier import ImageClassifier
from ws_algorithm.recipes.initialization import initialize_convolutions
from ws_algorithm.recipes.network_arguments import blocks_per_stage, check_at_least
from ws_algorithm.recipes.norm_layers import Norm, NormLayer, resolve_norm_layer
from ws_algorithm.recipes.pretrained import load_pretrained


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 convolution to four times `growth_rate`; norm, ReLU, 3x3 convolution; joined to the input.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, in_channels + growth_rate, H, W)``.
    """

    def __init__(self, in_channels: int, growth_rate: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.bn1 = norm_layer(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth_rate, 1, bias=False)
        self.bn2 = norm_layer(4 * growth_rate)
        self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        return torch.cat((x, out), 1)


class Transition(nn.Module):
    """Norm, ReLU, 1x1 convolution to half the channels, 2x2 average pooling.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, in_channels // 2, H // 2, W // 2)``.
    """

    def __init__(self, in_channels: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.bn1 = norm_layer(in_channels)
        self.conv1 = nn.Conv2d(in_channels, in_channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x), inplace=True)), 2)


class CifarDenseNet(nn.Module):
    """DenseNet-BC: three dense blocks, and transitions that halve channels and image between them.

    A 3x3 stem of ``2 * growth_rate`` channels, ``(depth - 4) / 6`` layers per block, norm and ReLU after the last,
    global average pooling. Convolutions start from N(0, 2 / (k k C_out)). Attribute names are those of
    pytorch-classification.

    Args:
        depth: 6 n + 4 with n dense layers, of two convolutions each, per block: 10, 16, 22, 40, 100, 190.
        growth_rate: Channels that each layer adds: k of the paper.
        num_classes: Number of outputs, at least 2.
        in_channels: Channels of an image.
        norm_layer: Makes a normalization layer from a number of channels.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, num_classes)``.

    Raises:
        ValueError: If `depth` is not 6 n + 4 with n of at least 1, or a number is too small.

    Source: Huang et al. 2017, https://arxiv.org/abs/1608.06993, as in
    https://github.com/bearpaw/pytorch-classification.
    """

    def __init__(self, depth: int, growth_rate: int, num_classes: int, in_channels: int, norm_layer: NormLayer) -> None:
        super().__init__()
        check_at_least(1, in_channels=in_channels)
        check_at_least(2, num_classes=num_classes)
        layers = blocks_per_stage(depth, step=6, others=4)
        first, second, third = _block_inputs(depth, growth_rate)
        grown = layers * growth_rate
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.dense1 = _dense_block(first, growth_rate, layers, norm_layer)
        self.trans1 = Transition(first + grown, norm_layer)
        self.dense2 = _dense_block(second, growth_rate, layers, norm_layer)
        self.trans2 = Transition(second + grown, norm_layer)
        self.dense3 = _dense_block(third, growth_rate, layers, norm_layer)
        self.bn = norm_layer(third + grown)
        self.fc = nn.Linear(third + grown, num_classes)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trans1(self.dense1(self.conv1(x)))
        x = self.dense3(self.trans2(self.dense2(x)))
        return self.fc(F.relu(self.bn(x), inplace=True).mean((2, 3)))


def build_cifar_densenet(
    num_classes: int,
    depth: int = 100,
    growth_rate: int = 12,
    in_channels: int = 3,
    norm: Norm = "group",
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    pretrained: str | None = None,
) -> ImageClassifier:
    """A :class:`CifarDenseNet` as a ``ComposerModel``.

    Args:
        num_classes: Number of classes, at least 2.
        depth: 6 n + 4. Default: ``100``.
        growth_rate: Channels that each layer adds. Default: ``12``.
        in_channels: Channels of an image. Default: ``3``.
        norm: ``"group"``, ``"batch"`` or ``"frozen"``; see :func:`resolve_norm_layer`. Default: ``"group"``.
        num_groups: Groups of each GroupNorm.
        channels_per_group: In place of `num_groups`: channels in each group. Default: the greatest number that divides
            the channels of every normalized layer: 6 at depth 100 and growth rate 12, 10 at depth 190 and growth
            rate 40, and at worst 1, which is instance normalization.
        pretrained: A file of weights; see :func:`load_pretrained`. Default: ``None``, random weights.

    Raises:
        ValueError: If an argument is not one of these, the groups do not divide a layer, or the file does not fit.
    """
    norm_layer = resolve_norm_layer(
        norm,
        num_groups,
        channels_per_group,
        default_channels_per_group=_greatest_common_group(depth, growth_rate),
    )
    network = CifarDenseNet(depth, growth_rate, num_classes, in_channels, norm_layer)
    if pretrained is not None:
        load_pretrained(network, pretrained)
    return ImageClassifier(network, num_classes)


def _greatest_common_group(depth: int, growth_rate: int) -> int:
    # Within a block layers are `growth_rate` apart, and the last of them is what the transition or the head gets
    return math.gcd(growth_rate, *_block_inputs(depth, growth_rate))


def _block_inputs(depth: int, growth_rate: int) -> tuple[int, int, int]:
    """Channels at the input of each dense block."""
    grown = blocks_per_stage(depth, step=6, others=4) * growth_rate
    check_at_least(1, growth_rate=growth_rate)
    first = 2 * growth_rate
    second = (first + grown) // 2
    return first, second, (second + grown) // 2


def _dense_block(in_channels: int, growth_rate: int, layers: int, norm_layer: NormLayer) -> nn.Sequential:
    inputs = range(in_channels, in_channels + layers * growth_rate, growth_rate)
    return nn.Sequential(*(DenseLayer(channels, growth_rate, norm_layer) for channels in inputs))
