"""Models of torchvision and timm by name."""

import builtins

import pytest
import torch

from ws_algorithm.recipes.named_models import build_named_model, names_a_model


@pytest.mark.parametrize("source", ["torchvision:resnet18", "timm:resnet18", "torchvision:", "timm:a:b"])
def test_names_of_models(source):
    assert names_a_model(source)


@pytest.mark.parametrize("source", ["quickstart", "yamls/quickstart.yaml", "C:/recipe.yaml", "torchvision", "torch:x"])
def test_other_names(source):
    assert not names_a_model(source)


@pytest.mark.parametrize(
    "source, convolutions",
    [
        ("torchvision:resnet18", 20),  # stem, 8 blocks of 2, 3 shortcuts
        ("torchvision:maskrcnn_resnet50_fpn", 69),  # 53, FPN 8, RPN 3, mask head 4 and predictor 1
        ("torchvision:googlenet", 59),  # 57 and one in each of the two auxiliary heads
        ("timm:resnet18", 20),
    ],
)
def test_a_model_takes_no_memory(source, convolutions, recwarn):
    model = build_named_model(source)

    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in model.modules()) == convolutions
    assert not recwarn


def test_a_model_that_computes_numbers_with_tensors_is_built_on_the_cpu():
    model = build_named_model("torchvision:regnet_y_400mf")

    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


@pytest.mark.parametrize(
    "source, message",
    [
        ("torchvision:resnet51", "torchvision has no model 'resnet51'. Did you mean resnet"),
        ("torchvision:", "torchvision has no model ''"),
        ("timm:resnet51d", "timm has no model 'resnet51d'. Did you mean resnet"),
    ],
)
def test_a_wrong_name(source, message):
    with pytest.raises(ValueError, match=message):
        build_named_model(source)


def test_without_timm_the_extra_is_named(monkeypatch):
    real_import = builtins.__import__

    def without_timm(name, *args, **kwargs):
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'", name="timm")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_timm)

    with pytest.raises(ValueError, match=r'pip install "ws-algorithm\[timm\]"'):
        build_named_model("timm:resnet18")
