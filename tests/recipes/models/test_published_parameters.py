"""Numbers of parameters that others have published or that follow from the layers."""

from typing import Any

import pytest
import torch
from torchvision import models

from ws_algorithm.recipes import registry

from .small_networks import parameters

# In millions with ten classes: https://github.com/bearpaw/pytorch-classification
CIFAR: list[tuple[str, dict[str, Any], float]] = [
    ("cifar_alexnet", {"norm": "none"}, 2.47),
    ("cifar_vgg", {"depth": 19}, 20.04),
    ("cifar_resnet", {"depth": 110, "block": "bottleneck"}, 1.70),
    ("cifar_preresnet", {"depth": 110}, 1.70),
    ("cifar_wide_resnet", {"depth": 28, "widen_factor": 10}, 36.48),
    ("cifar_resnext", {"depth": 29, "cardinality": 8}, 34.43),
    ("cifar_resnext", {"depth": 29, "cardinality": 16}, 68.16),
    ("cifar_densenet", {"depth": 100, "growth_rate": 12}, 0.77),
    ("cifar_densenet", {"depth": 190, "growth_rate": 40}, 25.62),
]
# torchvision publishes theirs with its weights; it has no ResNeXt-101 of this width, which is by hand below
IMAGENET = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"]


@pytest.mark.parametrize(("name", "arguments", "millions"), CIFAR)
def test_cifar_networks_have_the_published_number_of_parameters(name, arguments, millions):
    with torch.device("meta"):
        model = registry.MODELS[name](num_classes=10, **arguments)

    assert round(parameters(model) / 1e6, 2) == millions


@pytest.mark.parametrize("arch", IMAGENET)
def test_imagenet_networks_have_the_published_number_of_parameters(arch):
    with torch.device("meta"):
        model = registry.MODELS["imagenet_resnet"](arch)

    published = {weights.meta["num_params"] for weights in models.get_model_weights(arch)}
    assert published == {parameters(model)}


def test_parameters_of_resnext_101_by_hand():
    def block(inputs: int, width: int) -> int:  # `width` in 32 groups, to `2 * width` channels
        convolutions = inputs * width + width * width // 32 * 9 + width * 2 * width
        return convolutions + 2 * (width + width + 2 * width)

    expected = 3 * 64 * 49 + 2 * 64
    inputs = 64
    for width, blocks in ((128, 3), (256, 4), (512, 23), (1024, 3)):
        shortcut = inputs * 2 * width + 2 * 2 * width
        expected += shortcut + block(inputs, width) + (blocks - 1) * block(2 * width, width)
        inputs = 2 * width
    with torch.device("meta"):
        model = registry.MODELS["imagenet_resnet"]("resnext101_32x4d")

    assert parameters(model) == expected + 2048 * 1000 + 1000
