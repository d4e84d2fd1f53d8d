"""What standardization does to the loss before the first step: why convolutions without a norm are left alone.

A standardized weight has unit variance, whatever the initialization chose. A norm behind the convolution takes that
scale away again; without one it stays, and grows with every such layer.
"""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from ws_algorithm import apply_weight_standardization

CLASSES = 21


def _classification(name: str) -> Callable[[], tuple[nn.Module, Callable[[Any], Tensor]]]:
    def build() -> tuple[nn.Module, Callable[[Any], Tensor]]:
        images, labels = torch.randn(4, 3, 64, 64), torch.randint(CLASSES, (4,))
        model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
        return model, lambda model: F.cross_entropy(model(images), labels)

    return build


def _segmentation(name: str) -> Callable[[], tuple[nn.Module, Callable[[Any], Tensor]]]:
    def build() -> tuple[nn.Module, Callable[[Any], Tensor]]:
        images, labels = torch.randn(4, 3, 64, 64), torch.randint(CLASSES, (4, 64, 64))
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES)
        return model, lambda model: F.cross_entropy(model(images)["out"], labels)

    return build


def _detection() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    images = list(torch.rand(2, 3, 128, 128))
    corners = torch.rand(2, 3, 2) * 64
    boxes = torch.cat([corners, corners + 16 + torch.rand(2, 3, 2) * 40], dim=-1)
    targets = [{"boxes": boxes[i], "labels": torch.randint(CLASSES, (3,))} for i in range(2)]
    model = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=128, max_size=160
    )
    return model, lambda model: sum(model(images, targets).values(), torch.zeros(()))


MODELS: dict[str, Callable[[], tuple[nn.Module, Callable[[Any], Tensor]]]] = {
    "deeplabv3_resnet50": _segmentation("deeplabv3_resnet50"),
    "efficientnet_b0": _classification("efficientnet_b0"),
    "fcn_resnet50": _segmentation("fcn_resnet50"),
    "retinanet_resnet50_fpn": _detection,
    "vgg11": _classification("vgg11"),
}


def initial_loss(name: str, layers: Literal["all", "normalized"] | None) -> float:
    """In training mode; the same images, labels, weights and dropout in every call."""
    torch.manual_seed(17)
    model, loss = MODELS[name]()
    if layers:
        apply_weight_standardization(model, layers=layers)
    torch.manual_seed(18)
    with torch.no_grad():
        return loss(model.train()).item()


@pytest.mark.parametrize("name", MODELS)
def test_convolutions_before_a_norm_keep_the_initial_loss(name):
    assert 0.5 < initial_loss(name, "normalized") / initial_loss(name, None) < 2


# In retinanet it is the pyramid and both heads, in efficientnet the squeeze-and-excitation
@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "fcn_resnet50", "retinanet_resnet50_fpn", "vgg11"])
def test_all_convolutions_do_not(name):
    assert initial_loss(name, "all") / initial_loss(name, None) > 2
