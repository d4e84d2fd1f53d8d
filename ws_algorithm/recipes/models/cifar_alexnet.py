"""AlexNet for small images."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ws_algorithm.recipes.classifier import ImageClassifier
from ws_algorithm.recipes.network_arguments import check_at_least
from ws_algorithm.recipes.norm_layers import NormLayer, check_groups, resolve_norm_layer
from ws_algorithm.recipes.pretrained import load_pretrained


class CifarAlexNet(nn.Module):
    """Five convolutions of 64, 192, 384, 256 and 256 channels with bias, three of them max-pooled, and one ``Linear``.

    Weights start as torch's layers do: U(-1 / sqrt(n), 1 / sqrt(n)) with fan-in n. Without norm layers, attribute names
    are those of pytorch-classification.

    Args:
        num_classes: Number of outputs, at least 2.
        in_channels: Channels of an image.
        norm_layer: Makes a normalization layer, put after each convolution, from a number of channels; ``None`` for
            none, the published network.

    Shapes: ``(N, in_channels, H, W)`` of at least 29x29 to ``(N, num_classes)``.

    Raises:
        ValueError: If a number is too small.

    Source: Krizhevsky 2014, https://arxiv.org/abs/1404.5997, as in https://github.com/bearpaw/pytorch-classification.
    """

    def __init__(self, num_classes: int, in_channels: int, norm_layer: NormLayer | None) -> None:
        super().__init__()
        check_at_least(1, in_channels=in_channels)
        check_at_least(2, num_classes=num_classes)
        convolutions = [
            (nn.Conv2d(in_channels, 64, 11, stride=4, padding=5), True),
            (nn.Conv2d(64, 192, 5, padding=2), True),
            (nn.Conv2d(192, 384, 3, padding=1), False),
            (nn.Conv2d(384, 256, 3, padding=1), False),
            (nn.Conv2d(256, 256, 3, padding=1), True),
        ]
        layers: list[nn.Module] = []
        for convolution, pooled in convolutions:
            layers.append(convolution)
            if norm_layer is not None:
                layers.append(norm_layer(convolution.out_channels))
            layers.append(nn.ReLU(inplace=True))
            if pooled:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def build_cifar_alexnet(
    num_classes: int,
    in_channels: int = 3,
    norm: Literal["batch", "group", "frozen", "none"] = "group",
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    pretrained: str | None = None,
) -> ImageClassifier:
    """A :class:`CifarAlexNet` as a ``ComposerModel``.

    Args:
        num_classes: Number of classes, at least 2.
        in_channels: Channels of an image. Default: ``3``.
        norm: ``"group"``, ``"batch"`` or ``"frozen"``; see :func:`resolve_norm_layer`. ``"none"`` is the published
            network. Default: ``"group"``.
        num_groups: Groups of each GroupNorm. Default: 32.
        channels_per_group: In place of `num_groups`: channels in each group.
        pretrained: A file of weights; see :func:`load_pretrained`. Default: ``None``, random weights.

    Raises:
        ValueError: If an argument is not one of these, the groups do not divide a layer, or the file does not fit.
    """
    if norm == "none":
        check_groups(norm, num_groups, channels_per_group)
        norm_layer = None
    else:
        norm_layer = resolve_norm_layer(norm, num_groups, channels_per_group)
    network = CifarAlexNet(num_classes, in_channels, norm_layer)
    if pretrained is not None:
        load_pretrained(network, pretrained)
    return ImageClassifier(network, num_classes)
