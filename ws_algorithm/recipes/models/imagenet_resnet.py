"""ResNets and ResNeXts for ImageNet."""

from __future__ import annotations

from typing import Literal, get_args

from ws_algorithm.recipes.classifier import ImageClassifier
from ws_algorithm.recipes.network_arguments import check_at_least
from ws_algorithm.recipes.norm_layers import Norm, resolve_norm_layer
from ws_algorithm.recipes.pretrained import load_pretrained
from ws_algorithm.recipes.resnets import build_resnet

Architecture = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x4d"
]


def build_imagenet_resnet(
    arch: Architecture,
    num_classes: int = 1000,
    norm: Norm = "group",
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    pretrained: str | None = None,
) -> ImageClassifier:
    """torchvision's ResNet or ResNeXt, with the stride in the 3x3 convolution, as a ``ComposerModel``.

    Convolutions, grouped ones too, start from N(0, 2 / (k k C_out)); the last norm of a block starts with a scale of
    one. Both are as in pytorch-classification, and so are the keys of the weights.

    Args:
        arch: ``"resnet18"``, ``34``, ``50``, ``101`` or ``152``, ``"resnext50_32x4d"`` or ``"resnext101_32x4d"``.
        num_classes: Number of classes, at least 2. Default: ``1000``.
        norm: ``"group"``, ``"batch"`` or ``"frozen"``; see :func:`resolve_norm_layer`. Default: ``"group"``.
        num_groups: Groups of each GroupNorm. Default: 32, as in the paper.
        channels_per_group: In place of `num_groups`: channels in each group.
        pretrained: A file of weights; see :func:`load_pretrained`. torchvision's own fit `norm` ``"batch"`` and
            ``"frozen"``, those of pytorch-classification ``"group"``. Default: ``None``, random weights.

    Shapes: images ``(N, 3, H, W)`` of at least 32x32 to ``(N, num_classes)``.

    Raises:
        ValueError: If an argument is not one of these, the groups do not divide a layer, or the file does not fit.

    Source: He et al. 2016, https://arxiv.org/abs/1512.03385; Xie et al. 2017, https://arxiv.org/abs/1611.05431; with
    GroupNorm and Weight Standardization https://github.com/joe-siyuan-qiao/pytorch-classification.
    """
    check_at_least(2, num_classes=num_classes)
    norm_layer = resolve_norm_layer(norm, num_groups, channels_per_group)
    network = build_resnet(arch, get_args(Architecture), norm_layer, num_classes)
    if pretrained is not None:
        load_pretrained(network, pretrained)
    return ImageClassifier(network, num_classes)
