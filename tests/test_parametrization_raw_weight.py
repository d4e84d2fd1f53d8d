"""What sets the raw weight of a standardized convolution: its own name, resetting, loading, converting.

Assigning to ``weight`` is refused.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import KINDS, OnesConv, put_a_class_in_front, standardized
from torch import nn
from torch.fx.experimental import optimization
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval
from torch.testing import assert_close

from ws_algorithm import fold_weight_standardization, standardize_once
from ws_algorithm.formula import standardize_weight
from ws_algorithm.functional import is_weight_standardized
from ws_algorithm.parametrization import raw_weight, register_weight_standardizer

RAW_KEY = "parametrizations.weight.original"
REFUSAL = (
    r"^`weight` of a standardized convolution cannot be assigned.*`conv\.parametrizations\.weight\.original`.*"
    r"fold_weight_standardization\(model\)"
)
VALUES: dict[str, Callable[[Any], Any]] = {
    "tensor": lambda conv: torch.randn_like(raw_weight(conv)),
    "Parameter": lambda conv: nn.Parameter(torch.randn_like(raw_weight(conv))),
    "its raw weight": raw_weight,
    "its weight": lambda conv: conv.weight,
    "wrong shape": lambda conv: torch.zeros(6),
    "None": lambda conv: None,
    "number": lambda conv: 1.0,
    "list": lambda conv: [1.0],
}
kinds = pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)


class NewParameterConv(nn.Conv2d):
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.weight = nn.Parameter(torch.full_like(self.weight, 3.0))


def images_for(conv: nn.Module) -> torch.Tensor:
    return torch.randn(2, 4, *[8] * (raw_weight(conv).ndim - 2))


def with_batch_norm(build: Callable[[], Any]) -> Any:
    """A standardized convolution and a batch norm that does something, in evaluation."""
    conv = standardized(build)
    norm = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[raw_weight(conv).ndim](6)
    for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(values, 0.5, 2)
    return nn.Sequential(conv, norm).eval()


@kinds
@pytest.mark.parametrize("in_front", [False, True], ids=["itself", "class in front"])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_assigning_to_weight_is_refused_whatever_the_value_and_changes_nothing(build, in_front, value):
    conv = standardized(build)
    if in_front:
        put_a_class_in_front(conv)
    raw, cls, images = raw_weight(conv), type(conv), images_for(conv)
    values, output, keys = raw.detach().clone(), conv(images), list(conv.state_dict())

    with pytest.raises(ValueError, match=REFUSAL):
        conv.weight = value(conv)

    assert raw_weight(conv) is raw and raw.requires_grad and torch.equal(raw, values)
    assert torch.equal(conv(images), output)
    assert type(conv) is cls and list(conv.state_dict()) == keys and "weight" not in vars(conv)


def test_an_augmented_assignment_to_weight_is_refused_inside_a_scope_and_outside_of_one():
    conv = standardized()
    images, values = images_for(conv), raw_weight(conv).detach().clone()
    with torch.no_grad():
        output = conv(images)

        with pytest.raises(ValueError, match=REFUSAL):
            conv.weight *= 2  # doubles what `conv.weight` is now, then assigns it
        assert torch.equal(conv(images), output)
        with standardize_once(conv):
            before = conv(images)
            with pytest.raises(ValueError, match=REFUSAL):
                conv.weight *= 2  # of the tensor that the scope has cached
            assert torch.equal(conv(images), before)

    assert_close(before, output)
    assert torch.equal(raw_weight(conv), values)


@kinds
def test_fusing_with_a_batch_norm_is_refused_until_the_convolution_is_folded(build):
    """``fuse_conv_bn_eval`` assigns an effective weight: standardized once more, it would be another."""
    model = with_batch_norm(build)
    conv, norm = model
    images, raw = images_for(conv), raw_weight(conv)
    values, output = raw.detach().clone(), model(images)

    with pytest.raises(ValueError, match=REFUSAL):
        fuse_conv_bn_eval(conv, norm)

    assert raw_weight(conv) is raw and torch.equal(raw, values)
    assert is_weight_standardized(conv) and torch.equal(model(images), output)
    fold_weight_standardization(model)
    assert_close(fuse_conv_bn_eval(conv, norm)(images), output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "subclass"])
def test_fx_fuses_a_standardized_convolution_with_its_batch_norm_only_after_it_is_folded(kind):
    """``fuse`` takes convolutions whose class is ``Conv2d`` itself, so that it passes a standardized one by."""
    model = with_batch_norm(KINDS[kind])
    images = images_for(model[0])
    output = model(images)

    left = optimization.fuse(model)
    assert is_weight_standardized(left.get_submodule("0")) and torch.equal(left(images), output)
    fold_weight_standardization(model)
    fused = optimization.fuse(model)

    assert not any(isinstance(layer, _BatchNorm) for layer in fused.modules())
    assert_close(fused(images), output, rtol=1e-5, atol=1e-5)


@kinds
def test_the_raw_weight_is_set_in_place_by_its_own_name(build):
    conv = standardized(build)
    raw, tensor = raw_weight(conv), torch.randn_like(raw_weight(conv))

    with torch.no_grad():
        conv.parametrizations.weight.original.copy_(tensor)

    assert raw_weight(conv) is raw and torch.equal(raw, tensor)
    assert raw.requires_grad and raw.is_leaf
    assert torch.equal(conv.weight, standardize_weight(tensor))


@kinds
def test_a_parameter_that_is_given_the_name_of_the_raw_weight_becomes_the_raw_weight(build):
    conv = standardized(build)
    parameter, keys = nn.Parameter(torch.randn_like(raw_weight(conv))), list(conv.state_dict())

    conv.parametrizations.weight.original = parameter
    conv(images_for(conv)).square().sum().backward()

    assert raw_weight(conv) is parameter and parameter.grad is not None
    assert torch.equal(conv.weight, standardize_weight(parameter))
    assert parameter in set(conv.parameters()) and list(conv.state_dict()) == keys


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


@kinds
def test_a_state_dict_takes_a_convolution_from_the_meta_device(build):
    plain = build()
    with torch.device("meta"):
        conv = standardized(build)

    conv.load_state_dict(plain.state_dict(), assign=True)

    assert torch.equal(raw_weight(conv), plain.weight) and raw_weight(conv).requires_grad
    assert torch.equal(conv.weight, standardize_weight(plain.weight))


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
    conv.parametrizations.weight.original = parameter = nn.Parameter(torch.randn_like(plain.weight))
    assert raw_weight(conv) is parameter and torch.equal(conv.weight, standardize_weight(parameter))
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


@pytest.mark.parametrize("names", [("0.weight", "1.weight"), ("1.weight", "0.weight")], ids=["last", "first"])
def test_a_functional_call_takes_the_raw_name_and_refuses_the_plain_one(names):
    model: Any = nn.Sequential(nn.Conv2d(4, 4, 1), standardized())
    plain, raw = model[0].weight, raw_weight(model[1])
    values, images, weight = raw.detach().clone(), torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3, requires_grad=True)
    before, given = model(images), {"0.weight": torch.zeros(4, 4, 1, 1), "1.weight": weight}

    with pytest.raises(ValueError, match=REFUSAL):
        torch.func.functional_call(model, {name: given[name] for name in names}, images)
    assert model[0].weight is plain and raw_weight(model[1]) is raw and torch.equal(model(images), before)
    output = torch.func.functional_call(model, {f"1.{RAW_KEY}": weight}, images)
    output.sum().backward()

    assert_close(output, nn.functional.conv2d(model[0](images), standardize_weight(weight), model[1].bias))
    assert weight.grad is not None and raw.grad is None
    assert model[0].weight is plain and raw_weight(model[1]) is raw and torch.equal(raw, values)
