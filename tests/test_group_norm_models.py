"""The GroupNorm surgery on every classification and detection model of torchvision."""

import inspect
from typing import Any
from unittest import mock

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import detection, regnet

from ws_algorithm import apply_group_normalization, apply_weight_standardization

# Of the families with nothing but LayerNorm one each
CLASSIFICATION = [
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if not name.startswith(("vit_", "swin_", "convnext_")) or name in ("vit_b_16", "swin_t", "convnext_tiny")
]
DETECTION = torchvision.models.list_models(module=detection)
STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")
# By default these two warn about the initialization that they would choose
ARGUMENTS: dict[str, Any] = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}


def build(name: str, device: str = "meta", **arguments: Any) -> Any:
    widths = regnet.BlockParams.from_init_params

    def widths_on_cpu(*args: Any, **kwargs: Any) -> Any:  # numbers computed with tensors
        with torch.device("cpu"):
            return widths(*args, **kwargs)

    builder = torchvision.models.get_model_builder(name)
    no_weights = {key: None for key in inspect.signature(builder).parameters if key.startswith("weights")}
    with mock.patch.object(regnet.BlockParams, "from_init_params", widths_on_cpu), torch.device(device):
        return builder(**no_weights, **ARGUMENTS.get(name, {}), **arguments)


@pytest.mark.parametrize("name", [*CLASSIFICATION, *DETECTION])
def test_every_batch_norm_of_torchvision_becomes_a_group_norm(name):
    model = build(name)
    before = model.state_dict()
    batch_norms = sum(key.endswith(".running_mean") for key in before)  # each has one
    group_norms = sum(isinstance(layer, nn.GroupNorm) for layer in model.modules())

    assert apply_group_normalization(model, indivisible="largest_divisor") == batch_norms

    layers = list(model.modules())
    assert not any("BatchNorm" in type(layer).__name__ for layer in layers)
    assert sum(isinstance(layer, nn.GroupNorm) for layer in layers) == group_norms + batch_norms
    assert list(model.state_dict()) == [key for key in before if not key.endswith(STATISTICS)]
    assert apply_group_normalization(model) == 0


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121", "googlenet"])
def test_classification_models_compute_and_do_not_depend_on_the_batch(name):
    model = build(name, "cpu", num_classes=3).eval()
    images = torch.randn(2, 3, 64, 64)

    apply_group_normalization(model, indivisible="largest_divisor")

    with torch.no_grad():
        both, one = model(images), model(images[:1])
    assert both.shape == (2, 3) and both.isfinite().all()
    torch.testing.assert_close(both[:1], one, rtol=1e-3, atol=1e-4)  # rounding of a hundred layers in float32


def test_a_detector_computes():
    model = build("ssdlite320_mobilenet_v3_large", "cpu", num_classes=3)

    apply_group_normalization(model, indivisible="largest_divisor")

    boxes = {"boxes": torch.tensor([[10.0, 10.0, 60.0, 60.0]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 96, 96)], [boxes])
    assert all(loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(
        p.grad is not None for layer in model.modules() if type(layer) is nn.GroupNorm for p in layer.parameters()
    )


def test_a_detector_with_frozen_batch_norms():
    model = build("maskrcnn_resnet50_fpn", norm_layer=torchvision.ops.FrozenBatchNorm2d)

    assert apply_group_normalization(model) == 53
    assert not any(isinstance(layer, torchvision.ops.FrozenBatchNorm2d) for layer in model.modules())


@pytest.mark.parametrize("layers", ["all", "normalized"])
@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v3_large", "deeplabv3_resnet50"])
def test_the_order_with_weight_standardization_does_not_matter(name, layers):
    first, last = build(name), build(name)

    counts = {
        apply_group_normalization(first, indivisible="largest_divisor"),
        apply_weight_standardization(first, layers=layers),
    }

    assert counts == {
        apply_weight_standardization(last, layers=layers),
        apply_group_normalization(last, indivisible="largest_divisor"),
    }
    assert list(first.state_dict()) == list(last.state_dict())
