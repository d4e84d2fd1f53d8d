"""Wide ResNets for small images."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ws_algorithm.recipes.classifier import ImageClassifier
from ws_algorithm.recipes.initialization import initialize_convolutions
from ws_algorithm.recipes.network_arguments import blocks_per_stage, check_at_least
from ws_algorithm.recipes.norm_layers import Norm, NormLayer, resolve_norm_layer
from ws_algorithm.recipes.pretrained import load_pretrained


class WideBlock(nn.Module):
    """Norm, ReLU, 3x3 convolution, norm, ReLU, dropout, 3x3 convolution, and the shortcut.

    A shortcut that changes shape is a 1x1 convolution of the first ReLU's output.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, channels, H / stride, W / stride)``.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float, norm_layer: NormLayer) -> None:
        super().__init__()
        self.bn1 = norm_layer(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = norm_layer(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        changes = stride != 1 or in_channels != channels
        self.downsample = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.downsample is None else self.downsample(out)
        out = F.relu(self.bn2(self.conv1(out)), inplace=True)
        return self.conv2(self.dropout(out)) + shortcut


class CifarWideResNet(nn.Module):
    """Wide ResNet: a stem of 16 channels and three stages of 16, 32 and 64 times `widen_factor` channels.

    ``(depth - 4) / 6`` blocks per stage, norm and ReLU after the last, global average pooling. Convolutions start from
    N(0, 2 / (k k C_out)), the bias of the classifier from zero.

    Args:
        depth: 6 n + 4 with n blocks per stage: 10, 16, 22, 28, 40.
        widen_factor: Of the stages.
        dropout: Share of the activations between the convolutions of a block that training sets to zero.
        num_classes: Number of outputs, at least 2.
        in_channels: Channels of an image.
        norm_layer: Makes a normalization layer from a number of channels.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, num_classes)``.

    Raises:
        ValueError: If `depth` is not 6 n + 4 with n of at least 1, `dropout` is not a share, or a number is too small.

    Source: Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146, as in
    https://github.com/bearpaw/pytorch-classification.
    """

    def __init__(
        self,
        depth: int,
        widen_factor: int,
        dropout: float,
        num_classes: int,
        in_channels: int,
        norm_layer: NormLayer,
    ) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth, step=6, others=4)
        check_at_least(1, widen_factor=widen_factor, in_channels=in_channels)
        check_at_least(2, num_classes=num_classes)
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` (={dropout}) must be at least 0 and below 1.")
        first, second, third = (channels * widen_factor for channels in (16, 32, 64))
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(16, first, blocks, 1, dropout, norm_layer)
        self.layer2 = _stage(first, second, blocks, 2, dropout, norm_layer)
        self.layer3 = _stage(second, third, blocks, 2, dropout, norm_layer)
        self.bn = norm_layer(third)
        self.fc = nn.Linear(third, num_classes)
        initialize_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.relu(self.bn(x), inplace=True).mean((2, 3)))


def build_cifar_wide_resnet(
    num_classes: int,
    depth: int = 28,
    widen_factor: int = 10,
    dropout: float = 0.3,
    in_channels: int = 3,
    norm: Norm = "group",
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    pretrained: str | None = None,
) -> ImageClassifier:
    """A :class:`CifarWideResNet` as a ``ComposerModel``.

    Args:
        num_classes: Number of classes, at least 2.
        depth: 6 n + 4. Default: ``28``.
        widen_factor: Channels of the stages in multiples of 16, 32 and 64. Default: ``10``.
        dropout: Share of activations set to zero within a block. Default: ``0.3``.
        in_channels: Channels of an image. Default: ``3``.
        norm: ``"group"``, ``"batch"`` or ``"frozen"``; see :func:`resolve_norm_layer`. Default: ``"group"``.
        num_groups: Groups of each GroupNorm; must divide 16, the channels of the stem. Default: 8.
        channels_per_group: In place of `num_groups`: channels in each group; must divide 16.
        pretrained: A file of weights; see :func:`load_pretrained`. Default: ``None``, random weights.

    Raises:
        ValueError: If an argument is not one of these, the groups do not divide a layer, or the file does not fit.
    """
    norm_layer = resolve_norm_layer(norm, num_groups, channels_per_group, default_num_groups=8)
    network = CifarWideResNet(depth, widen_factor, dropout, num_classes, in_channels, norm_layer)
    if pretrained is not None:
        load_pretrained(network, pretrained)
    return ImageClassifier(network, num_classes)


def _stage(
    in_channels: int, channels: int, blocks: int, stride: int, dropout: float, norm_layer: NormLayer
) -> nn.Sequential:
    first = WideBlock(in_channels, channels, stride, dropout, norm_layer)
    return nn.Sequential(first, *(WideBlock(channels, channels, 1, dropout, norm_layer) for _ in range(blocks - 1)))
