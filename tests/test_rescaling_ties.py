"""Gain and shift of convolutions that share one raw weight."""

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ws_algorithm import (
    apply_weight_standardization,
    fold_weight_standardization,
    folded_copy,
    folded_state_dict,
    remove_weight_standardization,
    standardize_once,
    unfold_weight_standardization,
)
from ws_algorithm.parametrization import raw_weight

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8, dtype=torch.float64).reshape(2, 3, 8, 8)
both = pytest.mark.parametrize("formula", ["affine", "scaled"])


def plain() -> Any:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Tanh(), nn.Conv2d(3, 3, 3)).double()
    model[2].weight = model[0].weight
    return model


def tied(formula: str) -> Any:
    model = plain()
    assert apply_weight_standardization(model, formula=formula, optimizers=[]) == 2
    return model


def rescalers(model: Any) -> tuple[Any, Any]:
    return model[0].parametrizations.weight[1], model[2].parametrizations.weight[1]


def is_tied(model: Any) -> bool:
    first, second = rescalers(model)
    return raw_weight(model[0]) is raw_weight(model[2]) and first is second


def expected_weight(model: Any, formula: str) -> torch.Tensor:
    """The raw weight under affine; under scaled, what standardizes it, with a gain of 1."""
    raw = raw_weight(model[0]).detach()
    rows = raw.flatten(1)
    standardized = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    return raw if formula == "affine" else (standardized / 27**0.5).view_as(raw)


def weight_with_gain_of(start: torch.Tensor, conv: Any, formula: str) -> torch.Tensor:
    """A weight by a raw weight that was set by its name: the scale and mean that affine keeps are those of `start`."""
    rows, rows_then = raw_weight(conv).detach().flatten(1), start.flatten(1)
    if formula == "affine":
        scale, then = ((part.var(1, keepdim=True) + 1e-5).sqrt() for part in (rows, rows_then))
        rows = then * (rows - rows.mean(1, keepdim=True)) / scale + rows_then.mean(1, keepdim=True)
        return rows.view_as(start)
    return expected_weight([conv], formula)


def check_weights(model: Any, formula: str) -> None:
    assert torch.equal(model[0].weight, model[2].weight)
    assert_close(model[2].weight, expected_weight(model, formula), rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("how", ["reset", "load"])
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copy"])
def test_what_sets_the_weight_of_one_sets_that_of_both(formula, place, how, copied):
    model = tied(formula)
    model = copy.deepcopy(model) if copied else model
    before = raw_weight(model[0]).detach().clone()

    if how == "reset":
        model[place].reset_parameters()
    else:
        model[place].load_state_dict(nn.Conv2d(3, 3, 3).double().state_dict())

    assert is_tied(model) and not torch.equal(raw_weight(model[0]), before)
    check_weights(model, formula)


@both
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copy"])
def test_editing_the_raw_weight_of_one_sets_that_of_both_and_leaves_gain_and_shift(formula, place, copied):
    model = tied(formula)
    start = raw_weight(model[0]).detach().clone()
    model = copy.deepcopy(model) if copied else model

    nn.init.normal_(model[place].parametrizations.weight.original)

    assert is_tied(model) and not torch.equal(raw_weight(model[0]), start)
    for conv in (model[0], model[2]):
        assert_close(conv.weight, weight_with_gain_of(start, model[0], formula), rtol=1e-12, atol=1e-12)


@both
def test_a_copy_shares_nothing_with_the_model_it_was_made_of(formula):
    model = tied(formula)
    copied, alone = copy.deepcopy(model), copy.deepcopy(model[2])
    before = copied[2].weight.detach().clone()

    model[0].load_state_dict(nn.Conv2d(3, 3, 3).double().state_dict())

    assert not torch.equal(model[2].weight, before)
    assert is_tied(copied) and rescalers(copied)[0] is not rescalers(model)[0]
    assert torch.equal(copied[2].weight, before) and torch.equal(alone.weight, before)


@both
@pytest.mark.parametrize("pattern", ["0", "2"])
def test_one_that_is_standardized_by_a_later_call_joins(formula, pattern):
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    for one in (pattern, None):
        assert apply_weight_standardization(model, include=one, formula=formula, optimizers=optimizer) == 1

    assert is_tied(model)
    assert [id(p) for p in optimizer.param_groups[0]["params"]].count(id(rescalers(model)[0].gain)) == (
        formula == "scaled"
    )


def test_another_formula_has_a_gain_of_its_own():
    model = plain()

    for one, formula in (("0", "affine"), ("2", "scaled")):
        apply_weight_standardization(model, include=one, formula=formula, optimizers=[])

    assert rescalers(model)[0] is not rescalers(model)[1]


def test_the_tie_of_gains_outlives_training_and_can_be_folded():
    start = plain()
    models = [start, copy.deepcopy(start)]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        apply_weight_standardization(model, formula="scaled", optimizers=optimizer)
        params = optimizer.param_groups[0]["params"]
        assert len(params) == len({id(p) for p in params}) == 4  # one raw weight, one gain, two biases
        for _ in range(3):
            optimizer.zero_grad()
            if model is models[0]:
                (model(IMAGES) - 1).square().mean().backward()
            else:
                with standardize_once(model):
                    (model(IMAGES) - 1).square().mean().backward()
            optimizer.step()

    exact, once = models
    assert is_tied(exact) and not torch.equal(rescalers(exact)[0].gain, torch.ones(3, 1, 1, 1).double())
    for parameter, expected in zip(once.parameters(), exact.parameters(), strict=True):
        assert_close(parameter, expected, rtol=1e-12, atol=1e-12)
    expected, fresh = exact(IMAGES), plain()
    assert_close(folded_copy(exact)(IMAGES), expected, rtol=1e-12, atol=1e-12)
    fresh.load_state_dict(folded_state_dict(exact))
    assert_close(fresh(IMAGES), expected, rtol=1e-12, atol=1e-12)
    fold_weight_standardization(exact, keep_raw=True)
    unfold_weight_standardization(exact)
    assert is_tied(exact) and torch.equal(exact(IMAGES), expected)


@both
def test_its_state_dict_has_the_keys_of_both_and_loads_strictly(formula):
    source, model = tied(formula), tied(formula)
    with torch.no_grad():
        raw_weight(source[0]).mul_(3).add_(torch.randn(3, 3, 3, 3).double())
        rescalers(source)[0].gain.mul_(2)
    state = source.state_dict()
    assert {f"{place}.parametrizations.weight.1.gain" for place in (0, 2)} < set(state)

    model.load_state_dict(state)

    assert is_tied(model) and torch.equal(model(IMAGES), source(IMAGES))
    del state["2.parametrizations.weight.1.gain"]
    with pytest.raises(RuntimeError, match="Missing key.*2.parametrizations.weight.1.gain"):
        model.load_state_dict(state)


# As torch unties plain weights


@both
@pytest.mark.parametrize("place", [0, 2])
def test_a_new_parameter_of_one_leaves_the_other_as_it_is_until_both_have_it(formula, place):
    model = tied(formula)
    one, other = model[place], model[2 - place]
    start = raw_weight(one).detach().clone()
    with torch.no_grad():
        rescalers(model)[0].gain.mul_(2)
    before, parameter = other.weight.detach().clone(), nn.Parameter(torch.randn(3, 3, 3, 3).double())

    one.parametrizations.weight.original = parameter
    assert raw_weight(one) is parameter and torch.equal(other.weight, before)
    shift = start.flatten(1).mean(1).view(3, 1, 1, 1) if formula == "affine" else 0
    doubled = 2 * (weight_with_gain_of(start, one, formula) - shift) + shift  # the gain of 2 stays, and so does a shift
    assert_close(one.weight, doubled, rtol=1e-12, atol=1e-12)

    other.parametrizations.weight.original = parameter
    assert is_tied(model) and torch.equal(other.weight, one.weight)


@both
@pytest.mark.parametrize("how", ["reset", "load"])
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("set_place", [0, 2])
def test_gain_and_shift_of_one_that_got_a_new_parameter_are_set_without_those_of_the_other(
    formula, how, place, set_place
):
    model = tied(formula)
    with torch.no_grad():
        rescalers(model)[0].gain.mul_(2)
    model[place].parametrizations.weight.original = nn.Parameter(torch.randn(3, 3, 3, 3).double())
    one, other = model[set_place], model[2 - set_place]
    before = other.weight.detach().clone()

    if how == "reset":
        one.reset_parameters()
    else:
        one.load_state_dict(nn.Conv2d(3, 3, 3).double().state_dict())

    assert rescalers(model)[0] is not rescalers(model)[1] and torch.equal(other.weight, before)
    assert_close(one.weight, expected_weight([one], formula), rtol=1e-12, atol=1e-12)

    other.parametrizations.weight.original = raw_weight(one)  # tied again, and set again
    other.load_state_dict(nn.Conv2d(3, 3, 3).double().state_dict())
    assert is_tied(model)
    check_weights(model, formula)


class NewParameterConv(nn.Conv2d):
    def reset_parameters(self) -> None:
        self.weight = nn.Parameter(torch.randn_like(self.weight))


@both
def test_a_reset_that_assigns_a_new_parameter_leaves_the_other_as_it_is(formula):
    model: Any = nn.Sequential(NewParameterConv(3, 3, 3), nn.Tanh(), nn.Conv2d(3, 3, 3)).double()
    model[2].weight = model[0].weight
    apply_weight_standardization(model, formula=formula, optimizers=[])
    assert is_tied(model)
    raw, before = raw_weight(model[0]), model[2].weight.detach().clone()

    model[0].reset_parameters()

    assert raw_weight(model[2]) is raw and torch.equal(model[2].weight, before)
    assert raw_weight(model[0]) is not raw and rescalers(model)[0] is not rescalers(model)[1]
    assert_close(model[0].weight, expected_weight(model, formula), rtol=1e-12, atol=1e-12)


@both
def test_loading_by_assignment_gives_each_its_own(formula):
    model, source = tied(formula), nn.Sequential(nn.Conv2d(3, 3, 3), nn.Tanh(), nn.Conv2d(3, 3, 3)).double()
    reference = copy.deepcopy(source)
    apply_weight_standardization(reference, formula=formula, optimizers=[])

    model.load_state_dict(source.state_dict(), assign=True)

    assert not is_tied(model)
    assert_close(model(IMAGES), reference(IMAGES), rtol=1e-12, atol=1e-12)


@both
def test_from_the_meta_device(formula):
    with torch.device("meta"):
        model = tied(formula)
    model.to_empty(device="cpu")  # which unties weights

    for place in (0, 2):
        model[place].reset_parameters()

    for place in (0, 2):
        alone = nn.Sequential(model[place])
        assert_close(model[place].weight, expected_weight(alone, formula), rtol=1e-12, atol=1e-12)


@both
def test_one_of_them_taken_off_leaves_the_other(formula):
    model = tied(formula)
    assert remove_weight_standardization(model[0]) == 1
    gc.collect()
    before = model[0].weight.detach().clone()

    model[2].load_state_dict(nn.Conv2d(3, 3, 3).double().state_dict())

    assert model[0].weight is raw_weight(model[2]) and not torch.equal(model[0].weight, before)
    assert_close(model[2].weight, expected_weight(model, formula), rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("assign", [False, True])
def test_gains_of_their_own_load_into_convolutions_that_are_no_longer_tied(formula, assign):
    """Gain and shift are still shared when the keys of each arrive, until something asks whose raw weight they are."""
    source, other = tied(formula), tied(formula)
    for model in (source, other):
        model[0].parametrizations.weight.original = nn.Parameter(torch.randn(3, 3, 3, 3, dtype=torch.float64))
    source[0].reset_parameters()
    with torch.no_grad():
        rescalers(source)[0].gain.mul_(3)

    other.load_state_dict(source.state_dict(), assign=assign)

    assert_close(other(IMAGES), source(IMAGES), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(*[rescaler.gain for rescaler in rescalers(other)])
