"""Gain and shift of one convolution: what they are at first, and what becomes of them when the weight is set."""

import copy
from typing import Any

import pytest
import torch
from gain_and_shift import gain_and_shift
from small_models import KINDS
from timm.layers.std_conv import ScaledStdConv2d
from torch import Tensor, nn
from torch.testing import assert_close

from ws_algorithm import (
    Formula,
    apply_weight_standardization,
    fold_weight_standardization,
    is_weight_standardized,
    remove_weight_standardization,
    standardize_once,
    standardize_weight,
)
from ws_algorithm.formula import FORMULAS
from ws_algorithm.parametrization import raw_weight

RAW, GAIN, SHIFT = (f"parametrizations.weight.{name}" for name in ("original", "1.gain", "1.shift"))
kinds = pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)
both = pytest.mark.parametrize("formula", ["affine", "scaled"])


def rescaled(formula: Any, build: Any = KINDS["Conv2d"]) -> Any:
    conv = build()
    assert apply_weight_standardization(conv, formula=formula, optimizers=[]) == 1
    return conv


def by_mmcv(weight: Tensor, start: Tensor) -> Tensor:
    """ConvAWS2d._get_weight, with gamma and beta of the weight that was loaded; in float64."""

    def mean_and_std(values: Tensor) -> list[Tensor]:
        rows = values.flatten(1)
        shape = (-1, *[1] * (values.ndim - 1))
        return [part.view(shape) for part in (rows.mean(1), torch.sqrt(rows.var(1) + 1e-5))]

    (mean, std), (beta, gamma) = mean_and_std(weight.double()), mean_and_std(start.double())
    return gamma * ((weight.double() - mean) / std) + beta


def by_timm(weight: Tensor, gain: Any) -> Tensor:
    """ScaledStdConv2d; in float64."""
    rows = weight.double().flatten(1)
    rows = (rows - rows.mean(1, keepdim=True)) / torch.sqrt(rows.var(1, correction=0, keepdim=True) + 1e-6)
    return (rows / rows.shape[1] ** 0.5).view_as(weight) * gain


@kinds
def test_affine_keeps_the_weight_and_then_follows_mmcv(build):
    plain = build()
    conv = rescaled("affine", lambda: copy.deepcopy(plain))
    assert_close(conv.weight, plain.weight, rtol=1e-5, atol=1e-7)

    with torch.no_grad():
        raw_weight(conv).mul_(3).add_(torch.randn_like(plain.weight))

    assert_close(conv.weight, by_mmcv(raw_weight(conv), plain.weight).float())
    assert [name for name, _ in conv.named_parameters() if name != "bias"] == [RAW]
    assert set(conv.state_dict()) - {"bias"} == {RAW, GAIN, SHIFT}


@kinds
def test_scaled_follows_timm(build):
    conv = rescaled("scaled", build)
    gain = conv.parametrizations.weight[1].gain
    assert isinstance(gain, nn.Parameter) and torch.equal(gain, torch.ones_like(gain))
    assert_close(conv.weight, by_timm(raw_weight(conv), 1).float())

    nn.init.uniform_(gain, -2, 2)

    assert_close(conv.weight, by_timm(raw_weight(conv), gain.detach()).float())
    assert set(conv.state_dict()) - {"bias"} == {RAW, GAIN}


def test_scaled_equals_the_layer_of_timm_and_loads_its_state_dict():
    theirs, images = ScaledStdConv2d(4, 6, 3, padding=1).double(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    nn.init.uniform_(theirs.gain, 0.5, 2)
    ours = rescaled("scaled", lambda: nn.Conv2d(4, 6, 3, padding=1).double())

    ours.load_state_dict(theirs.state_dict())
    for conv in (ours, theirs):
        conv(images).square().sum().backward()

    assert_close(ours(images), theirs(images))
    assert_close(raw_weight(ours).grad, theirs.weight.grad)
    assert_close(ours.parametrizations.weight[1].gain.grad, theirs.gain.grad)


@pytest.mark.parametrize("eps_inside_root", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
def test_a_custom_formula_that_keeps_the_weight(eps_inside_root, unbiased):
    plain = KINDS["Conv2d"]()

    conv = rescaled(Formula(1e-3, eps_inside_root, unbiased, rescaling="affine"), lambda: copy.deepcopy(plain))

    assert_close(conv.weight, plain.weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [0.0, 0.3, -7.0])
def test_a_constant_filter_stays_what_it_was(value):
    conv: Any = KINDS["Conv2d"]()
    nn.init.constant_(conv.weight, value)

    apply_weight_standardization(conv, formula="affine")

    assert_close(conv.weight, torch.full_like(raw_weight(conv), value), rtol=1e-6, atol=0)
    conv.weight.pow(3).sum().backward()
    assert bool(conv.parametrizations.weight.original.grad.isfinite().all())


# In 16 bits the standardized weight, of up to about 4, is rounded to half a step before gain and shift
@pytest.mark.parametrize(
    "dtype, steps", [(torch.float64, 1e-14), (torch.float32, 1e-5), (torch.float16, 2**-8), (torch.bfloat16, 2**-5)]
)
def test_the_weight_is_kept_in_any_dtype(dtype, steps):
    plain = nn.Conv2d(8, 16, 3).to(dtype)
    conv = rescaled("affine", lambda: copy.deepcopy(plain))

    assert conv.weight.dtype == dtype
    assert (conv.weight - plain.weight).abs().max() <= steps * plain.weight.abs().max()
    assert conv.parametrizations.weight[1].gain.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@both
def test_converting_a_model(formula):
    conv = rescaled(formula).to(torch.float64).to(memory_format=torch.channels_last)

    assert conv.weight.dtype == torch.float64
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert {tensor.dtype for tensor in conv.state_dict().values()} == {torch.float64}


@pytest.mark.parametrize("formula", ["affine", "scaled"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_weights(formula, dtype):
    plain = nn.Conv1d(4, 6, 3, dtype=dtype)

    conv = rescaled(formula, lambda: copy.deepcopy(plain))

    assert not conv.parametrizations.weight[1].gain.is_complex()
    assert formula == "scaled" or (conv.weight - plain.weight).abs().max() < 1e-6


# What sets the weight


class NewParameterConv(nn.Conv2d):
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.weight = nn.Parameter(torch.randn_like(self.weight))


@kinds
def test_affine_computes_with_what_is_loaded_under_plain_keys_or_reset(build):
    conv = rescaled("affine", build)
    raw, tensor, parameter = raw_weight(conv), *(torch.randn_like(raw_weight(conv)) for _ in range(2))

    conv.load_state_dict({**build().state_dict(), "weight": tensor})
    assert raw_weight(conv) is raw and torch.equal(raw, tensor)
    assert_close(conv.weight, tensor, rtol=1e-5, atol=1e-6)

    conv.load_state_dict({**build().state_dict(), "weight": nn.Parameter(parameter.clone())}, assign=True)
    assert raw_weight(conv) is not raw and torch.equal(raw_weight(conv), parameter)
    assert_close(conv.weight, parameter, rtol=1e-5, atol=1e-6)

    conv.reset_parameters()
    assert not torch.equal(raw_weight(conv), parameter)
    assert_close(conv.weight, raw_weight(conv), rtol=1e-5, atol=1e-6)


def test_affine_computes_with_the_new_parameter_that_a_reset_of_a_subclass_assigns():
    conv = rescaled("affine", lambda: NewParameterConv(4, 6, 3))
    raw = raw_weight(conv)

    conv.reset_parameters()

    assert raw_weight(conv) is not raw
    assert_close(conv.weight, raw_weight(conv), rtol=1e-5, atol=1e-6)


def test_scaled_keeps_its_gains_when_the_raw_weight_is_set_by_its_name_and_begins_anew_when_it_is_reset():
    conv = rescaled("scaled")
    gain = conv.parametrizations.weight[1].gain
    nn.init.constant_(gain, 2)

    conv.parametrizations.weight.original = parameter = nn.Parameter(torch.randn(6, 4, 3, 3))
    assert conv.parametrizations.weight[1].gain is gain and torch.equal(gain, torch.full_like(gain, 2))
    assert_close(conv.weight, by_timm(parameter.detach(), 2).float())

    conv.reset_parameters()
    assert conv.parametrizations.weight[1].gain is gain and torch.equal(gain, torch.ones_like(gain))


@both
@pytest.mark.parametrize("how", ["in place", "new Parameter"])
def test_setting_the_raw_weight_by_its_name_leaves_gain_and_shift(formula, how):
    conv = rescaled(formula)
    start, before = raw_weight(conv).detach().clone(), copy.deepcopy(gain_and_shift(conv))

    if how == "in place":
        nn.init.normal_(conv.parametrizations.weight.original)
    else:
        conv.parametrizations.weight.original = nn.Parameter(torch.randn(6, 4, 3, 3))

    assert all(torch.equal(part, before[name]) for name, part in gain_and_shift(conv).items())
    raw = raw_weight(conv).detach()
    assert_close(conv.weight, (by_mmcv(raw, start) if formula == "affine" else by_timm(raw, 1)).float())


@both
def test_assigning_to_weight_is_refused_and_leaves_gain_and_shift(formula):
    conv = rescaled(formula)
    before = copy.deepcopy(conv.state_dict())

    for value in (torch.randn(6, 4, 3, 3), nn.Parameter(torch.randn(6, 4, 3, 3)), None):
        with pytest.raises(ValueError, match="^`weight` of a standardized convolution cannot be assigned"):
            conv.weight = value

    assert conv.state_dict().keys() == before.keys()
    assert all(torch.equal(part, before[name]) for name, part in conv.state_dict().items())


@both
@pytest.mark.parametrize("how", ["reset", "new Parameter, reset", "load", "load, assign"])
def test_from_the_meta_device(formula, how):
    with torch.device("meta"):
        conv = rescaled(formula)
    plain = nn.Conv2d(4, 6, 3)

    if how == "reset":
        conv.to_empty(device="cpu").reset_parameters()
    elif how == "new Parameter, reset":  # gain and shift are still on the meta device then
        conv.parametrizations.weight.original = nn.Parameter(torch.empty(6, 4, 3, 3))
        conv.bias = nn.Parameter(torch.empty(6))
        conv.reset_parameters()
    elif how == "load":
        conv.to_empty(device="cpu").load_state_dict(plain.state_dict())
    else:
        conv.load_state_dict(plain.state_dict(), assign=True)

    raw = raw_weight(conv).detach()
    expected = raw if formula == "affine" else by_timm(raw, 1).float()
    assert_close(conv.weight, expected, rtol=1e-5, atol=1e-6)
    assert "reset" in how or torch.equal(raw, plain.weight)


# Loading


@kinds
@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_state_dict_keeps_its_function_under_affine(build, assign):
    plain, conv = build(), rescaled("affine", build)
    state_dict = plain.state_dict()
    keys = list(state_dict)

    conv.load_state_dict(state_dict, assign=assign)

    assert torch.equal(raw_weight(conv), plain.weight)
    assert_close(conv.weight, plain.weight, rtol=1e-5, atol=1e-6)
    assert list(state_dict) == keys


def test_a_plain_state_dict_inside_a_model():
    plain, model = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)) for _ in range(2))
    apply_weight_standardization(model, formula="affine")
    images = torch.randn(1, 3, 8, 8)

    model.load_state_dict(plain.state_dict())

    assert_close(model(images), plain(images))


def test_a_plain_state_dict_sets_the_gains_of_scaled_to_one():
    plain, conv = KINDS["Conv2d"](), rescaled("scaled")
    nn.init.constant_(conv.parametrizations.weight[1].gain, 3)

    conv.load_state_dict(plain.state_dict())

    assert_close(conv.weight, by_timm(plain.weight.detach(), 1).float())


def test_the_state_dict_of_an_mmcv_layer_brings_its_gamma_and_beta():
    conv, start, trained = rescaled("affine"), torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    rows = start.flatten(1)
    theirs = {
        "weight": trained,
        "bias": torch.zeros(6),
        "weight_gamma": torch.sqrt(rows.var(1) + 1e-5).view(6, 1, 1, 1),
        "weight_beta": rows.mean(1).view(6, 1, 1, 1),
    }

    conv.load_state_dict(theirs)

    assert_close(conv.weight, by_mmcv(trained, start).float())
    for strict in (True, False):
        for there, lacking in (("gamma", "beta"), ("beta", "gamma")):
            half = {name: part for name, part in theirs.items() if name != f"weight_{lacking}"}
            with pytest.raises(RuntimeError, match=f"has 'weight_{there}' and lacks 'weight_{lacking}'") as caught:
                conv.load_state_dict(half, strict=strict)
            assert "key(s)" not in str(caught.value)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight_gamma"):
        rescaled("paper").load_state_dict(theirs)


@both
def test_its_own_state_dict_brings_gain_and_shift(formula):
    source, conv = rescaled(formula), rescaled(formula)
    with torch.no_grad():
        raw_weight(source).add_(torch.randn_like(raw_weight(source)))
        source.parametrizations.weight[1].gain.mul_(2)

    conv.load_state_dict(source.state_dict())

    assert torch.equal(conv.weight, source.weight)


@both
def test_loading_stays_strict(formula):
    conv = rescaled(formula)
    own, plain = conv.state_dict(), KINDS["Conv2d"]().state_dict()

    with pytest.raises(RuntimeError, match=f"Missing key.*{GAIN}"):
        conv.load_state_dict({name: part for name, part in own.items() if name != GAIN})
    with pytest.raises(RuntimeError, match=f"Missing key.*{GAIN}"):
        conv.load_state_dict(rescaled("paper").state_dict())
    with pytest.raises(RuntimeError, match=f"Unexpected key.*{GAIN}"):
        rescaled("paper").load_state_dict(own)
    with pytest.raises(RuntimeError, match="size mismatch"):
        conv.load_state_dict({**plain, "weight": torch.zeros(1, 4, 3, 3)})


# The whole life


@both
def test_applying_twice_and_taking_off(formula):
    conv = KINDS["Conv2d"]()
    weight, keys = conv.weight, list(conv.state_dict())

    counts = [apply_weight_standardization(conv, formula=name, optimizers=[]) for name in (formula, formula, "paper")]
    assert counts == [1, 0, 0] and len(conv.parametrizations.weight) == 2

    assert remove_weight_standardization(conv) == 1
    assert conv.weight is weight and list(conv.state_dict()) == keys and type(conv) is nn.Conv2d


@both
def test_folding_gives_the_weight_with_gain_and_shift(formula):
    conv, images = rescaled(formula), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        raw_weight(conv).add_(torch.randn_like(raw_weight(conv)))
        conv.parametrizations.weight[1].gain.mul_(2)
    expected = conv(images)

    assert fold_weight_standardization(conv) == 1

    assert torch.equal(conv(images), expected) and not is_weight_standardized(conv)


def test_tied_convolutions_of_different_gains_cannot_be_folded():
    model: Any = nn.Sequential(rescaled("scaled"), rescaled("scaled"))
    model[1].parametrizations.weight.original = raw_weight(model[0])  # afterwards: each has its gain already
    same = copy.deepcopy(model)
    assert fold_weight_standardization(same) == 2 and same[0].weight is same[1].weight
    nn.init.constant_(model[1].parametrizations.weight[1].gain, 2)

    with pytest.raises(ValueError, match="by different formulas or gains"):
        fold_weight_standardization(model)

    assert is_weight_standardized(model[0]) and is_weight_standardized(model[1])


@both
def test_a_deep_copy_is_on_its_own(formula):
    conv = rescaled(formula)
    with standardize_once(conv), torch.no_grad():
        cached = conv.weight  # so that there is something that must not be copied
        other = copy.deepcopy(conv)
        other.parametrizations.weight[1].gain.mul_(2)

        assert not torch.equal(other.weight, cached) and torch.equal(conv.weight, cached)


@both
def test_what_a_scope_caches_without_gradients_follows_the_gains(formula):
    conv = rescaled(formula)
    chain = conv.parametrizations.weight
    with standardize_once(conv), torch.no_grad():
        before = conv.weight
        assert conv.weight is before
        chain[1].gain.mul_(2)
        doubled = conv.weight.clone()
        chain[1].gain.data = torch.ones_like(chain[1].gain)
        ones = conv.weight.clone()
        conv.weight.zero_()  # read only, but noticed

        formula_of, shift = FORMULAS[formula], {} if formula == "scaled" else {"shift": chain[1].shift}
        raw = raw_weight(conv)
        assert torch.equal(ones, standardize_weight(raw, formula_of, gain=chain[1].gain, **shift))
        assert torch.equal(conv.weight, ones) and not torch.equal(doubled, ones)
        assert not torch.equal(doubled, before)
    with torch.no_grad():
        assert conv.weight is not conv.weight and torch.equal(conv.weight, ones)


@both
def test_a_functional_call_takes_gains(formula):
    conv, images = rescaled(formula), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        for factor in (2.0, 3.0):
            gain = torch.full((6, 1, 1, 1), factor)
            output = torch.func.functional_call(conv, {GAIN: gain}, images)
            parts = gain_and_shift(conv) | {"gain": gain}
            weight = standardize_weight(raw_weight(conv), formula, **parts)
            assert_close(output, nn.functional.conv2d(images, weight, conv.bias))


def test_repr():
    assert "WeightStandardizer(formula='affine')" in repr(rescaled("affine"))
    assert "Rescaler(rescaling='scaled')" in repr(rescaled("scaled"))


# The function


def test_gain_and_shift_of_the_function():
    weight, gain, shift = torch.randn(6, 4, 3, 3), torch.rand(6, 1, 1, 1) + 1, torch.randn(6, 1, 1, 1)
    plain = Formula(1e-5, eps_inside_root=True, unbiased=True)

    actual = standardize_weight(weight, "affine", gain=gain, shift=shift)

    assert_close(actual, standardize_weight(weight, plain) * gain + shift)
    assert torch.equal(standardize_weight(weight, "affine"), standardize_weight(weight, plain))
    with pytest.raises(ValueError, match=r"`gain` was given, but Formula\(.*has none"):
        standardize_weight(weight, "paper", gain=gain)
    with pytest.raises(ValueError, match="`shift` was given"):
        standardize_weight(weight, "scaled", shift=shift)
    with pytest.raises(ValueError, match=r"`gain` must be a tensor of shape \(6, 1, 1, 1\).*got shape \(6,\)"):
        standardize_weight(weight, "scaled", gain=gain.flatten())
    with pytest.raises(ValueError, match=r"`rescaling` \(='gain'\) must be 'affine', 'scaled' or None"):
        Formula(1e-5, eps_inside_root=True, unbiased=True, rescaling="gain")  # pyright: ignore[reportArgumentType]
