"""Folding: a plain model that computes exactly what the standardized one did."""

import copy
from typing import Any

import pytest
import torch
from composer.functional import apply_weight_standardization as composers_apply
from gain_and_shift import gain_and_shift
from small_models import conv
from torch import nn

from ws_algorithm import (
    FORMULAS,
    apply_weight_standardization,
    fold_weight_standardization,
    is_weight_standardized,
    standardize_weight,
)

PADDING_MODES = ["zeros", "reflect", "replicate", "circular"]


def rank(layer: Any) -> int:
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d).index(layer) + 1


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_folding_keeps_the_function_and_the_parameter(layer, formula):
    model: Any = nn.Sequential(layer(2, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), layer(6, 3, 1, bias=False))
    images = torch.randn(2, 2, *[7] * rank(layer))
    parameters = list(model.parameters())
    keys, classes = list(model.state_dict()), [type(m) for m in model]
    raw = model[0].weight.detach().clone()
    apply_weight_standardization(model, formula=formula)
    expected, rescaling = model(images), gain_and_shift(model[0])

    assert fold_weight_standardization(model) == 2

    assert torch.equal(model(images), expected)
    assert torch.equal(model[0].weight, standardize_weight(raw, formula, **rescaling))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert (list(model.state_dict()), [type(m) for m in model]) == (keys, classes)
    assert not is_weight_standardized(model)
    assert fold_weight_standardization(model) == 0


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("groups", [1, 2, 4], ids=["dense", "grouped", "depthwise"])
def test_folding_every_kind_of_convolution(layer, padding_mode, groups):
    model = layer(4, 8, 3, padding=1, stride=2, groups=groups, padding_mode=padding_mode)
    images = torch.randn(2, 4, *[6] * rank(layer))
    apply_weight_standardization(model)
    expected = model(images)

    fold_weight_standardization(model)

    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_folding_in_any_dtype(dtype):
    model = nn.Conv2d(4, 6, 3).to(dtype)
    apply_weight_standardization(model)
    expected = model.weight.detach().clone()

    fold_weight_standardization(model)

    assert model.weight.dtype == dtype and torch.equal(model.weight, expected)


def test_folding_a_copy_leaves_the_training_model_alone():
    model = nn.Sequential(conv(), nn.ReLU(), conv())
    apply_weight_standardization(model)
    images = torch.randn(1, 2, 5, 5)
    expected, raw = model(images), copy.deepcopy(model.state_dict())

    folded = copy.deepcopy(model)
    fold_weight_standardization(folded)

    assert torch.equal(folded(images), expected) and torch.equal(model(images), expected)
    assert is_weight_standardized(model)
    assert all(torch.equal(model.state_dict()[key], raw[key]) for key in raw)
    folded.load_state_dict(folded.state_dict())


def test_the_folded_model_goes_through_torchscript():
    model = nn.Sequential(conv(), nn.ReLU(), conv())
    apply_weight_standardization(model)
    images = torch.randn(1, 2, 5, 5)
    expected = model(images)

    fold_weight_standardization(model)

    assert torch.equal(torch.jit.script(model)(images), expected)


def tied(formulas: tuple[str, str]) -> nn.Sequential:
    model = nn.Sequential(conv(), conv())
    model[1].weight = model[0].weight
    for layer, formula in zip(model, formulas, strict=True):
        apply_weight_standardization(layer, formula=formula)
    return model


def test_tied_convolutions_stay_tied():
    model = tied(("paper", "paper"))
    images = torch.randn(1, 2, 5, 5)
    expected = model(images)

    assert fold_weight_standardization(model) == 2

    assert model[0].weight is model[1].weight
    assert torch.equal(model(images), expected)


def test_tied_convolutions_of_different_formulas_cannot_be_folded():
    """One parameter cannot hold two standardized weights."""
    model = tied(("paper", "composer"))
    images = torch.randn(1, 2, 5, 5)
    expected = model(images)

    with pytest.raises(ValueError, match="shares"):
        fold_weight_standardization(model)

    assert torch.equal(model(images), expected) and is_weight_standardized(model)


def test_a_convolution_with_two_names():
    layer = conv()
    model = nn.ModuleDict({"first": layer, "again": nn.ModuleList([layer])})
    raw = layer.weight

    assert apply_weight_standardization(model) == 1
    assert fold_weight_standardization(model) == 1
    assert layer.weight is raw and type(layer) is nn.Conv2d


def with_transposed_convolution() -> nn.Sequential:
    model = nn.Sequential(conv(), nn.Sequential(nn.ConvTranspose2d(2, 2, 3, padding=1)))
    model[1][0].weight = model[0].weight
    apply_weight_standardization(model)
    return model


def with_a_plain_convolution() -> nn.Sequential:
    model = nn.Sequential(conv(), nn.Sequential(conv()))
    model[1][0].weight = model[0].weight
    apply_weight_standardization(model, n_last_layers_ignore=1)
    return model


@pytest.mark.parametrize(
    "build, name", [(with_transposed_convolution, "ConvTranspose2d"), (with_a_plain_convolution, "Conv2d")]
)
def test_a_raw_weight_that_another_layer_uses_is_not_overwritten(build, name):
    model = build()
    images = torch.randn(1, 2, 5, 5)
    expected = model(images)
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]

    with pytest.raises(ValueError, match=rf"`module` shares the raw weight .* with '1\.0' \({name}\)"):
        fold_weight_standardization(model)

    assert torch.equal(model(images), expected)
    assert (list(model.state_dict()), [type(m) for m in model.modules()]) == (keys, classes)


@pytest.mark.parametrize("times", [1, 2])
def test_composers_own_can_be_folded(times):
    model = nn.Sequential(conv(), nn.ReLU(), conv())
    images = torch.randn(1, 2, 5, 5)
    for _ in range(times):  # Composer's stacks one standardization on the other
        composers_apply(model)
    expected = model(images)

    assert fold_weight_standardization(model) == 2

    assert torch.equal(model(images), expected)
    assert {type(m) for m in model} == {nn.Conv2d, nn.ReLU} and not is_weight_standardized(model)
