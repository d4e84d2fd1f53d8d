"""VGG for small images."""

from __future__ import annotations

from torch import Tensor, nn

from ws_algorithm.recipes.classifier import ImageClassifier
from ws_algorithm.recipes.initialization import initialize_convolutions
from ws_algorithm.recipes.network_arguments import check_at_least
from ws_algorithm.recipes.norm_layers import Norm, NormLayer, resolve_norm_layer
from ws_algorithm.recipes.pretrained import load_pretrained

_CHANNELS = (64, 128, 256, 512, 512)
# 3x3 convolutions of each stage; the depth of the paper counts three fully connected layers too
_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class CifarVGG(nn.Module):
    """VGG with a norm after each convolution, five max-poolings and one ``Linear`` in place of three.

    Convolutions have a bias and start from N(0, 2 / (k k C_out)), the ``Linear`` from N(0, 0.01^2), biases from zero.
    Attribute names are those of torchvision's ``vgg19_bn`` and of pytorch-classification.

    Args:
        depth: 11, 13, 16 or 19.
        num_classes: Number of outputs, at least 2.
        in_channels: Channels of an image.
        norm_layer: Makes a normalization layer from a number of channels.

    Shapes: ``(N, in_channels, H, W)`` of at least 32x32 to ``(N, num_classes)``.

    Raises:
        ValueError: If `depth` is not known or a number is too small.

    Source: Simonyan and Zisserman 2015, https://arxiv.org/abs/1409.1556, as in
    https://github.com/bearpaw/pytorch-classification.
    """

    def __init__(self, depth: int, num_classes: int, in_channels: int, norm_layer: NormLayer) -> None:
        super().__init__()
        if depth not in _CONVOLUTIONS:
            raise ValueError(f"`depth` (={depth}) must be one of {', '.join(map(str, _CONVOLUTIONS))}.")
        check_at_least(1, in_channels=in_channels)
        check_at_least(2, num_classes=num_classes)
        layers: list[nn.Module] = []
        for channels, convolutions in zip(_CHANNELS, _CONVOLUTIONS[depth], strict=True):
            for _ in range(convolutions):
                convolution = nn.Conv2d(in_channels, channels, 3, padding=1)
                layers += [convolution, norm_layer(channels), nn.ReLU(inplace=True)]
                in_channels = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, num_classes)
        initialize_convolutions(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def build_cifar_vgg(
    num_classes: int,
    depth: int = 19,
    in_channels: int = 3,
    norm: Norm = "group",
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    pretrained: str | None = None,
) -> ImageClassifier:
    """A :class:`CifarVGG` as a ``ComposerModel``.

    Args:
        num_classes: Number of classes, at least 2.
        depth: 11, 13, 16 or 19. Default: ``19``; with `norm` ``"batch"`` the published VGG19-BN.
        in_channels: Channels of an image. Default: ``3``.
        norm: ``"group"``, ``"batch"`` or ``"frozen"``; see :func:`resolve_norm_layer`. Default: ``"group"``.
        num_groups: Groups of each GroupNorm; must divide 64. Default: 32.
        channels_per_group: In place of `num_groups`: channels in each group; must divide 64.
        pretrained: A file of weights; see :func:`load_pretrained`. Default: ``None``, random weights.

    Raises:
        ValueError: If an argument is not one of these, the groups do not divide a layer, or the file does not fit.
    """
    norm_layer = resolve_norm_layer(norm, num_groups, channels_per_group)
    network = CifarVGG(depth, num_classes, in_channels, norm_layer)
    if pretrained is not None:
        load_pretrained(network, pretrained)
    return ImageClassifier(network, num_classes)
