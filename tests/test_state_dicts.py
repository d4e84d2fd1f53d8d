"""State dicts of standardized models with the keys of plain ones."""

import copy
from typing import Any

import pytest
import torch
from small_models import conv
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models import resnet18

from ws_algorithm import (
    apply_weight_standardization,
    fold_weight_standardization,
    folded_state_dict,
    plain_state_dict,
)

BOTH = [folded_state_dict, plain_state_dict]


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, channels)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    """A ResNet, and the same standardized; to look at, not to change."""
    torch.manual_seed(0)
    network = resnet18(norm_layer=group_norm, num_classes=5).eval()
    standardized = copy.deepcopy(network)
    apply_weight_standardization(standardized)
    return network, standardized


def test_a_plain_state_dict_is_that_before_the_standardization(pair):
    network, standardized = pair
    expected = network.state_dict()

    state = plain_state_dict(standardized)

    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_a_folded_state_dict_is_that_after_folding(pair):
    network, standardized = pair
    folded = copy.deepcopy(standardized)
    fold_weight_standardization(folded)

    state = folded_state_dict(standardized)

    assert list(state) == list(network.state_dict())
    assert all(torch.equal(state[key], value) for key, value in folded.state_dict().items())
    assert state._metadata == folded.state_dict()._metadata  # pyright: ignore


def test_they_load_strictly_into_a_network_that_was_never_standardized(pair):
    _, standardized = pair
    plain = resnet18(norm_layer=group_norm, num_classes=5).eval()
    images = torch.randn(1, 3, 32, 32)

    plain.load_state_dict(folded_state_dict(standardized), strict=True)
    assert torch.equal(plain(images), standardized(images))

    plain.load_state_dict(plain_state_dict(standardized), strict=True)
    apply_weight_standardization(plain)
    assert torch.equal(plain(images), standardized(images))


@pytest.mark.parametrize("of", BOTH)
def test_the_model_stays_as_it_is(of):
    model: Any = nn.Sequential(conv(), conv())
    apply_weight_standardization(model)
    before, images = copy.deepcopy(model.state_dict()), torch.randn(1, 2, 5, 5)
    expected = model(images)

    state = of(model)
    for name in ("0.weight", "1.weight"):
        assert not state[name].requires_grad

    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(images), expected)


def test_which_entries_share_memory_with_the_model():
    model: Any = nn.Sequential(conv())
    apply_weight_standardization(model)
    raw = model[0].parametrizations.weight.original

    assert plain_state_dict(model)["0.weight"].data_ptr() == raw.data_ptr()
    with torch.no_grad():
        held = model[0].weight
        assert folded_state_dict(model)["0.weight"].data_ptr() not in (raw.data_ptr(), held.data_ptr())
    assert folded_state_dict(model)["0.bias"].data_ptr() == model[0].bias.data_ptr()


@pytest.mark.parametrize("of", BOTH)
def test_ties_and_second_names(of):
    model: Any = nn.Sequential(conv(), conv())
    model[1].weight = model[0].weight
    model.again = model[0]
    expected = list(model.state_dict())
    apply_weight_standardization(model)

    state = of(model)

    assert list(state) == expected
    assert state["0.weight"].data_ptr() == state["1.weight"].data_ptr() == state["again.weight"].data_ptr()


class WithBuffers(nn.Conv2d):
    """A convolution with buffers, one of them in no state dict, and a convolution inside."""

    def __init__(self) -> None:
        super().__init__(2, 2, 3, padding=1, bias=False)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(()), persistent=False)
        self.inside = conv()


@pytest.mark.parametrize("of", BOTH)
def test_buffers_and_convolutions_in_convolutions(of):
    model = WithBuffers()
    expected = ["weight", "count", "inside.weight", "inside.bias"]
    assert list(model.state_dict()) == expected

    assert apply_weight_standardization(model) == 2

    assert list(of(model)) == expected


@pytest.mark.parametrize("of", BOTH)
def test_a_model_without_standardization_has_its_own_state_dict_and_a_warning(of, caplog):
    model = nn.Sequential(conv())

    assert list(of(model)) == list(model.state_dict())
    assert "has no standardized layer" in caplog.text


@pytest.mark.parametrize("of", BOTH)
def test_keys_that_are_renamed_are_refused(of):
    model = nn.Sequential(conv())
    apply_weight_standardization(model)
    model._register_state_dict_hook(lambda module, state, *_: {f"renamed.{key}": value for key, value in state.items()})

    with pytest.raises(ValueError, match=r"gives '0\.parametrizations\.weight\.original' another name"):
        of(model)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("of", BOTH)
def test_other_parametrizations_on_the_weight_are_refused(of):
    model = nn.Sequential(conv())
    apply_weight_standardization(model)
    parametrize.register_parametrization(model[0], "weight", Doubled())

    with pytest.raises(ValueError, match="other parametrizations beside the standardization: Doubled"):
        of(model)


@pytest.mark.parametrize("of", BOTH)
def test_a_parametrization_on_the_bias_stays(of):
    model = nn.Sequential(conv())
    parametrize.register_parametrization(model[0], "bias", Doubled())
    apply_weight_standardization(model)

    assert list(of(model)) == ["0.weight", "0.parametrizations.bias.original"]


def test_a_raw_weight_that_a_plain_layer_uses_has_no_folded_state_dict():
    model: Any = nn.Sequential(conv(), conv())
    model[1].weight = model[0].weight
    apply_weight_standardization(model, n_last_layers_ignore=1)

    assert torch.equal(plain_state_dict(model)["1.weight"], model[1].weight)
    with pytest.raises(ValueError, match="shares the raw weight of a standardized layer with '1'"):
        folded_state_dict(model)


def test_what_a_standardizer_has_beside_the_raw_weight_is_not_dropped_in_silence():
    model: Any = nn.Sequential(conv())
    apply_weight_standardization(model)
    model[0].parametrizations.weight[0].register_buffer("gain", torch.ones(()))

    assert list(folded_state_dict(model)) == ["0.weight", "0.bias"]
    with pytest.raises(ValueError, match=r"more to its .*: '0\.parametrizations\.weight\.0\.gain'"):
        plain_state_dict(model)
