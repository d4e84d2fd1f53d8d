"""ResNeXts for small images."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck

from ws_algorithm.recipes.classifier import ImageClassifier
from ws_algorithm.recipes.initialization import initialize_convolutions
from ws_algorithm.recipes.network_arguments import blocks_per_stage, check_at_least
from ws_algorithm.recipes.norm_layers import Norm, NormLayer, resolve_norm_layer
from ws_algorithm.recipes.pretrained import load_pretrained


class CifarResNeXt(nn.Module):
    """ResNeXt for small images: bottlenecks whose 3x3 convolution is in `cardinality` groups.

    A 3x3 stem of 64 channels, ``(depth - 2) / 9`` blocks per stage, global average pooling. The stages have 256, 512
    and 1024 channels, and within a block `cardinality` groups of 1, 2 and 4 times `base_width`. Attribute names are
    torchvision's. Convolutions start from N(0, 2 / (k k C_out)), the classifier from N(0, 2 / 1024) with bias zero.

    Args:
        depth: 9 n + 2 with n blocks per stage: 11, 20, 29.
        cardinality: Groups of the 3x3 convolutions.
        base_width: Channels of a group in the first stage.
        num_classes: Number of outputs, at least 2.
        in_channels: Channels of an image.
        norm_layer: Makes a normalization layer from a number of channels.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, num_classes)``.

    Raises:
        ValueError: If `depth` is not 9 n + 2 with n of at least 1, or a number is too small.

    Source: Xie et al. 2017, https://arxiv.org/abs/1611.05431, section 5.3, as in
    https://github.com/bearpaw/pytorch-classification.
    """

    def __init__(
        self,
        depth: int,
        cardinality: int,
        base_width: int,
        num_classes: int,
        in_channels: int,
        norm_layer: NormLayer,
    ) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth, step=9, others=2)
        check_at_least(1, cardinality=cardinality, base_width=base_width, in_channels=in_channels)
        check_at_least(2, num_classes=num_classes)
        stage = partial(_stage, blocks=blocks, cardinality=cardinality, base_width=base_width, norm_layer=norm_layer)
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        self.bn1 = norm_layer(64)
        self.layer1 = stage(64, 64, stride=1)
        self.layer2 = stage(256, 128, stride=2)
        self.layer3 = stage(512, 256, stride=2)
        self.fc = nn.Linear(1024, num_classes)
        initialize_convolutions(self)
        nn.init.kaiming_normal_(self.fc.weight, nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def build_cifar_resnext(
    num_classes: int,
    depth: int = 29,
    cardinality: int = 8,
    base_width: int = 64,
    in_channels: int = 3,
    norm: Norm = "group",
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    pretrained: str | None = None,
) -> ImageClassifier:
    """A :class:`CifarResNeXt` as a ``ComposerModel``.

    Args:
        num_classes: Number of classes, at least 2.
        depth: 9 n + 2. Default: ``29``.
        cardinality: Groups of the 3x3 convolutions. Default: ``8``.
        base_width: Channels of a group in the first stage. Default: ``64``.
        in_channels: Channels of an image. Default: ``3``.
        norm: ``"group"``, ``"batch"`` or ``"frozen"``; see :func:`resolve_norm_layer`. Default: ``"group"``.
        num_groups: Groups of each GroupNorm; must divide 64 and `cardinality` times `base_width`. Default: 32.
        channels_per_group: In place of `num_groups`: channels in each group; must divide the same numbers.
        pretrained: A file of weights; see :func:`load_pretrained`. Default: ``None``, random weights.

    Raises:
        ValueError: If an argument is not one of these, the groups do not divide a layer, or the file does not fit.
    """
    norm_layer = resolve_norm_layer(norm, num_groups, channels_per_group)
    network = CifarResNeXt(depth, cardinality, base_width, num_classes, in_channels, norm_layer)
    if pretrained is not None:
        load_pretrained(network, pretrained)
    return ImageClassifier(network, num_classes)


def _stage(
    in_channels: int,
    channels: int,
    *,
    blocks: int,
    stride: int,
    cardinality: int,
    base_width: int,
    norm_layer: NormLayer,
) -> nn.Sequential:
    out_channels = channels * Bottleneck.expansion
    block = partial(Bottleneck, groups=cardinality, base_width=base_width, norm_layer=norm_layer)
    shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm_layer(out_channels))
    first = block(in_channels, channels, stride, shortcut)
    return nn.Sequential(first, *(block(out_channels, channels) for _ in range(blocks - 1)))
