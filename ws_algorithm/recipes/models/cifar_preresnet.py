"""ResNets with pre-activation for small images."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ws_algorithm.recipes.classifier import ImageClassifier
from ws_algorithm.recipes.initialization import initialize_convolutions
from ws_algorithm.recipes.network_arguments import blocks_per_stage, check_at_least
from ws_algorithm.recipes.norm_layers import Norm, NormLayer, resolve_norm_layer
from ws_algorithm.recipes.pretrained import load_pretrained


class PreActBasicBlock(nn.Module):
    """Two times norm, ReLU, 3x3 convolution; the sum with the shortcut is neither normalized nor activated.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, channels, H / stride, W / stride)``.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.bn1 = norm_layer(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = norm_layer(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.downsample = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        return out + (x if self.downsample is None else self.downsample(x))


class PreActBottleneck(nn.Module):
    """Three times norm, ReLU, convolution: 1x1, 3x3 with the stride, and 1x1 to four times the channels.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, 4 channels, H / stride, W / stride)``.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, norm_layer: NormLayer) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.bn1 = norm_layer(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = norm_layer(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn3 = norm_layer(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        out = self.conv3(F.relu(self.bn3(out), inplace=True))
        return out + (x if self.downsample is None else self.downsample(x))


Block = type[PreActBasicBlock] | type[PreActBottleneck]
_BLOCKS: dict[str, Block] = {"basic": PreActBasicBlock, "bottleneck": PreActBottleneck}


class CifarPreResNet(nn.Module):
    """ResNet with pre-activation: in each block norm and ReLU come before the convolution.

    Stages, stem and pooling are those of :class:`CifarResNet`; shortcuts that change shape are 1x1 convolutions without
    a norm, and one norm and ReLU come after the last stage. Convolutions start from N(0, 2 / (k k C_out)). Attribute
    names are those of pytorch-classification.

    Args:
        depth: 6 n + 2 with n blocks per stage. A bottleneck counts two of its three layers, as in
            pytorch-classification; He et al. count all and call its PreResNet-110 164 layers deep.
        width: Channels of the stem; stages have 3x3 convolutions of `width`, 2 `width` and 4 `width`. 16 in the paper.
        num_classes: Number of outputs, at least 2.
        in_channels: Channels of an image.
        norm_layer: Makes a normalization layer from a number of channels.
        block: ``"basic"`` or ``"bottleneck"``.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, num_classes)``.

    Raises:
        ValueError: If `depth` is not 6 n + 2 with n of at least 1, `block` is not known, or a number is too small.

    Source: He et al. 2016, https://arxiv.org/abs/1603.05027.
    """

    def __init__(
        self, depth: int, width: int, num_classes: int, in_channels: int, norm_layer: NormLayer, block: str
    ) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth, step=6, others=2)
        check_at_least(1, width=width, in_channels=in_channels)
        check_at_least(2, num_classes=num_classes)
        if block not in _BLOCKS:
            raise ValueError(f"`block` (={block!r}) must be 'basic' or 'bottleneck'.")
        kind = _BLOCKS[block]
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.layer1 = _stage(kind, width, width, blocks, 1, norm_layer)
        self.layer2 = _stage(kind, width * kind.expansion, 2 * width, blocks, 2, norm_layer)
        self.layer3 = _stage(kind, 2 * width * kind.expansion, 4 * width, blocks, 2, norm_layer)
        self.bn = norm_layer(4 * width * kind.expansion)
        self.fc = nn.Linear(4 * width * kind.expansion, num_classes)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.relu(self.bn(x), inplace=True).mean((2, 3)))


def build_cifar_preresnet(
    num_classes: int,
    depth: int = 110,
    width: int = 16,
    in_channels: int = 3,
    block: Literal["basic", "bottleneck"] = "bottleneck",
    norm: Norm = "group",
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    pretrained: str | None = None,
) -> ImageClassifier:
    """A :class:`CifarPreResNet` as a ``ComposerModel``.

    Args:
        num_classes: Number of classes, at least 2.
        depth: 6 n + 2. Default: ``110``; with bottlenecks the published 1.70 M parameters.
        width: Channels of the stem. Default: ``16``.
        in_channels: Channels of an image. Default: ``3``.
        block: ``"basic"`` or ``"bottleneck"``. Default: ``"bottleneck"``.
        norm: ``"group"``, ``"batch"`` or ``"frozen"``; see :func:`resolve_norm_layer`. Default: ``"group"``.
        num_groups: Groups of each GroupNorm; must divide `width`. Default: 8, two channels per group at width 16.
        channels_per_group: In place of `num_groups`: channels in each group; must divide `width`.
        pretrained: A file of weights; see :func:`load_pretrained`. Default: ``None``, random weights.

    Raises:
        ValueError: If an argument is not one of these, the groups do not divide a layer, or the file does not fit.
    """
    norm_layer = resolve_norm_layer(norm, num_groups, channels_per_group, default_num_groups=8)
    network = CifarPreResNet(depth, width, num_classes, in_channels, norm_layer, block)
    if pretrained is not None:
        load_pretrained(network, pretrained)
    return ImageClassifier(network, num_classes)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))


def _stage(
    block: Block, in_channels: int, channels: int, blocks: int, stride: int, norm_layer: NormLayer
) -> nn.Sequential:
    first = block(in_channels, channels, stride, norm_layer)
    others = [block(channels * block.expansion, channels, 1, norm_layer) for _ in range(blocks - 1)]
    return nn.Sequential(first, *others)
