"""ResNets for small images."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from ws_algorithm.recipes.classifier import ImageClassifier
from ws_algorithm.recipes.initialization import initialize_convolutions
from ws_algorithm.recipes.network_arguments import blocks_per_stage, check_at_least
from ws_algorithm.recipes.norm_layers import Norm, NormLayer, resolve_norm_layer
from ws_algorithm.recipes.pretrained import load_pretrained

Block = type[BasicBlock] | type[Bottleneck]
_BLOCKS: dict[str, Block] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class CifarResNet(nn.Module):
    """ResNet for small images: three stages with 3x3 convolutions of `width`, 2 `width` and 4 `width` channels.

    A 3x3 stem without pooling, ``(depth - 2) / 6`` blocks per stage, 1x1 convolutions on the shortcuts that change
    shape, global average pooling. Attribute names are torchvision's. Convolutions start from N(0, 2 / (k k C_out)).

    Args:
        depth: 6 n + 2 with n blocks per stage: 8, 14, 20, 32, 44, 56, 110. With basic blocks it is the number of
            weighted layers. A bottleneck has three, but counts two, as in pytorch-classification, whose ResNet-110
            with bottlenecks has 164 layers.
        width: Channels of the stem and of the first stage; 16 in the paper.
        num_classes: Number of outputs, at least 2.
        in_channels: Channels of an image: 1 for gray, 3 for RGB.
        norm_layer: Makes a normalization layer from a number of channels.
        block: ``"basic"``, two 3x3 convolutions, or ``"bottleneck"``, 1x1, 3x3 and 1x1 to four times the channels.
            Default: ``"basic"``.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, num_classes)``.

    Raises:
        ValueError: If `depth` is not 6 n + 2 with n of at least 1, `block` is not known, or a number is too small.

    Source: He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2 (shortcut option B).
    """

    def __init__(
        self,
        depth: int,
        width: int,
        num_classes: int,
        in_channels: int,
        norm_layer: NormLayer,
        block: str = "basic",
    ) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth, step=6, others=2)
        check_at_least(1, width=width, in_channels=in_channels)
        check_at_least(2, num_classes=num_classes)
        if block not in _BLOCKS:
            raise ValueError(f"`block` (={block!r}) must be 'basic' or 'bottleneck'.")
        kind = _BLOCKS[block]
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = norm_layer(width)
        self.layer1 = _stage(kind, width, width, blocks, 1, norm_layer)
        self.layer2 = _stage(kind, width * kind.expansion, 2 * width, blocks, 2, norm_layer)
        self.layer3 = _stage(kind, 2 * width * kind.expansion, 4 * width, blocks, 2, norm_layer)
        self.fc = nn.Linear(4 * width * kind.expansion, num_classes)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def build_cifar_resnet(
    num_classes: int,
    depth: int = 20,
    width: int = 16,
    in_channels: int = 3,
    block: Literal["basic", "bottleneck"] = "basic",
    norm: Norm = "group",
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    pretrained: str | None = None,
) -> ImageClassifier:
    """A :class:`CifarResNet` as a ``ComposerModel``.

    Args:
        num_classes: Number of classes, at least 2.
        depth: 6 n + 2. Default: ``20``.
        width: Channels of the stem and of the first stage. Default: ``16``.
        in_channels: Channels of an image. Default: ``3``.
        block: ``"basic"`` or ``"bottleneck"``. The published ResNet-110 with 1.70 M parameters has `depth` 110 and
            bottlenecks. Default: ``"basic"``.
        norm: ``"group"``, ``"batch"`` or ``"frozen"``; see :func:`resolve_norm_layer`. Default: ``"group"``.
        num_groups: Groups of each GroupNorm; must divide `width`. Default: 8, two channels per group at width 16.
        channels_per_group: In place of `num_groups`: channels in each group; must divide `width`.
        pretrained: A file of weights; see :func:`load_pretrained`. Default: ``None``, random weights.

    Raises:
        ValueError: If an argument is not one of these, the groups do not divide a layer, or the file does not fit.
    """
    norm_layer = resolve_norm_layer(norm, num_groups, channels_per_group, default_num_groups=8)
    network = CifarResNet(depth, width, num_classes, in_channels, norm_layer, block)
    if pretrained is not None:
        load_pretrained(network, pretrained)
    return ImageClassifier(network, num_classes)


def _stage(
    block: Block, in_channels: int, channels: int, blocks: int, stride: int, norm_layer: NormLayer
) -> nn.Sequential:
    out_channels = channels * block.expansion
    shortcut = None
    if stride != 1 or in_channels != out_channels:
        shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm_layer(out_channels))
    first = block(in_channels, channels, stride, shortcut, norm_layer=norm_layer)
    others = [block(out_channels, channels, norm_layer=norm_layer) for _ in range(blocks - 1)]
    return nn.Sequential(first, *others)
