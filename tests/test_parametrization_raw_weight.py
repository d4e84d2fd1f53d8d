"""What sets the weight of a standardized convolution sets its raw weight: assigning, resetting, loading, converting."""

from typing import Any

import pytest
import torch
from small_models import KINDS, OnesConv, put_a_class_in_front, standardized
from torch import nn
from torch.testing import assert_close

from ws_algorithm.formula import standardize_weight
from ws_algorithm.functional import is_weight_standardized
from ws_algorithm.parametrization import raw_weight, register_weight_standardizer

RAW_KEY = "parametrizations.weight.original"
kinds = pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)


class NewParameterConv(nn.Conv2d):
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.weight = nn.Parameter(torch.full_like(self.weight, 3.0))


@kinds
def test_assigning_a_tensor_copies_it_into_the_raw_weight(build):
    conv = standardized(build)
    raw, tensor = raw_weight(conv), torch.randn_like(raw_weight(conv))

    conv.weight = tensor

    assert raw_weight(conv) is raw and raw is not tensor
    assert torch.equal(raw, tensor)
    assert raw.requires_grad and raw.is_leaf


@kinds
def test_assigning_a_parameter_makes_it_the_raw_weight(build):
    conv = standardized(build)
    parameter = nn.Parameter(torch.randn_like(raw_weight(conv)))

    conv.weight = parameter

    assert raw_weight(conv) is parameter
    assert torch.equal(conv.weight, standardize_weight(parameter))
    assert parameter in set(conv.parameters())


@pytest.mark.parametrize("value", [None, 1.0, [1.0], torch.zeros(6, 4, 3), torch.zeros(6)], ids=str)
def test_assigning_anything_else(value):
    conv = standardized()
    before = raw_weight(conv).detach().clone()

    with pytest.raises(ValueError, match=r"`weight` must be a parameter, or a tensor of shape \(6, 4, 3, 3\); got "):
        conv.weight = value

    assert torch.equal(raw_weight(conv), before)


def test_other_attributes_are_assigned_as_ever():
    conv = standardized()
    bias = nn.Parameter(torch.zeros(6))

    conv.bias, conv.note = bias, "kept"

    assert conv.bias is bias and conv.note == "kept"


@kinds
def test_reset_parameters_sets_the_raw_weight(build):
    plain, conv = build(), standardized(build)
    cls, raw = type(conv), raw_weight(conv)

    torch.manual_seed(0)
    plain.reset_parameters()
    torch.manual_seed(0)
    conv.reset_parameters()

    assert type(conv) is cls and raw_weight(conv) is raw
    assert torch.equal(raw, plain.weight)
    assert conv.bias is None or torch.equal(conv.bias, plain.bias)


@pytest.mark.parametrize("cls", [OnesConv, NewParameterConv])
def test_reset_parameters_of_a_subclass(cls):
    conv = cls(4, 6, 3)
    register_weight_standardizer(conv)
    nn.init.normal_(raw_weight(conv))

    conv.reset_parameters()

    assert torch.equal(raw_weight(conv), torch.full((6, 4, 3, 3), 3.0))  # floor(U(1, 2)) * 3
    assert type(conv).__name__ == f"Parametrized{cls.__name__}"


def test_a_reset_that_fails_leaves_the_class_alone():
    class Failing(nn.Conv2d):
        broken = False

        def reset_parameters(self) -> None:
            super().reset_parameters()
            if self.broken:
                raise RuntimeError("broken")

    conv = standardized(lambda: Failing(4, 6, 3))
    cls = type(conv)
    conv.broken = True

    with pytest.raises(RuntimeError, match="broken"):
        conv.reset_parameters()

    assert type(conv) is cls and is_weight_standardized(conv)


@kinds
def test_from_the_meta_device(build):
    with torch.device("meta"):
        plain, conv = build(), standardized(build)
    assert conv.weight.is_meta

    for layer in (plain, conv):
        layer.to_empty(device="cpu")
        torch.manual_seed(0)
        layer.reset_parameters()

    assert torch.equal(raw_weight(conv), plain.weight)
    assert torch.equal(conv.weight, standardize_weight(plain.weight))


def test_assigning_to_a_weight_on_the_meta_device():
    with torch.device("meta"):
        conv = standardized()
    tensor = torch.randn(6, 4, 3, 3)

    conv.weight = tensor

    assert torch.equal(raw_weight(conv), tensor) and raw_weight(conv).requires_grad


@kinds
@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_state_dict_loads_strictly(build, assign):
    plain, conv = build(), standardized(build)
    state_dict = plain.state_dict()
    keys = list(state_dict)

    conv.load_state_dict(state_dict, assign=assign)

    assert torch.equal(raw_weight(conv), plain.weight)
    assert isinstance(raw_weight(conv), nn.Parameter)
    assert list(state_dict) == keys


@kinds
def test_a_standardized_state_dict_loads_strictly(build):
    source, conv = standardized(build), standardized(build)

    conv.load_state_dict(source.state_dict())

    assert torch.equal(raw_weight(conv), raw_weight(source))


def test_a_standardized_state_dict_does_not_load_into_a_plain_convolution():
    with pytest.raises(RuntimeError, match=RAW_KEY):
        KINDS["Conv2d"]().load_state_dict(standardized().state_dict())


def test_strict_loading_stays_strict():
    conv = standardized()
    state_dict = KINDS["Conv2d"]().state_dict()

    with pytest.raises(RuntimeError, match=f'Missing key.*"{RAW_KEY}"'):
        conv.load_state_dict({"bias": state_dict["bias"]})
    with pytest.raises(RuntimeError, match='Unexpected key.*"weight"'):
        conv.load_state_dict({**conv.state_dict(), "weight": state_dict["weight"]})
    with pytest.raises(RuntimeError, match="size mismatch"):
        conv.load_state_dict({**state_dict, "weight": torch.zeros(1, 4, 3, 3)})


@kinds
def test_a_class_put_in_front(build):
    plain, conv = build(), standardized(build)
    put_a_class_in_front(conv)
    cls = type(conv)

    conv.load_state_dict(plain.state_dict())
    assert torch.equal(raw_weight(conv), plain.weight)
    for layer in (plain, conv):
        torch.manual_seed(0)
        layer.reset_parameters()
    assert torch.equal(raw_weight(conv), plain.weight)
    conv.weight = torch.zeros_like(plain.weight)
    assert torch.equal(raw_weight(conv), torch.zeros_like(plain.weight))
    assert type(conv) is cls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_conversion_moves_the_raw_weight(dtype):
    conv = standardized()
    raw = raw_weight(conv)
    values = raw.detach().clone()

    conv.to(dtype)

    assert raw_weight(conv) is raw and torch.equal(raw, values.to(dtype))
    assert conv.weight.dtype == dtype
    assert torch.equal(conv.weight, standardize_weight(values.to(dtype)))


def test_memory_format():
    conv = standardized().to(memory_format=torch.channels_last)

    assert raw_weight(conv).is_contiguous(memory_format=torch.channels_last)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_functional_call_takes_the_raw_name_and_refuses_the_plain_one():
    model: Any = nn.Sequential(nn.Conv2d(4, 4, 1), standardized())
    plain, raw = model[0].weight, raw_weight(model[1])
    values, images, weight = raw.detach().clone(), torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3, requires_grad=True)

    with pytest.raises(ValueError, match=f"{RAW_KEY}"):
        torch.func.functional_call(model, {"0.weight": torch.zeros(4, 4, 1, 1), "1.weight": weight}, images)
    output = torch.func.functional_call(model, {f"1.{RAW_KEY}": weight}, images)
    output.sum().backward()

    assert_close(output, nn.functional.conv2d(model[0](images), standardize_weight(weight), model[1].bias))
    assert weight.grad is not None and raw.grad is None
    assert model[0].weight is plain and raw_weight(model[1]) is raw and torch.equal(raw, values)
