"""Outside ``standardize_once`` nothing is cached: every read computes, so that every change is noticed.

Also a change that PyTorch does not count, in each mode, and without a call of ``train()`` or ``eval()`` in between.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cached_weights import modes
from exact_twins import KINDS, formulas, images, loss_of, of_kind, tiny
from gain_and_shift import gain_and_shift
from torch.testing import assert_close
from weight_changes import changes

from ws_algorithm import standardize_once, standardize_weight
from ws_algorithm.parametrization import raw_weight


def no_scope(model: Any) -> None:
    pass


def a_scope_of_evaluation(model: Any) -> None:
    with standardize_once(model), torch.no_grad():
        model(images(raw_weight(model[0]).dtype)[0])


def a_scope_of_training(model: Any) -> None:
    with standardize_once(model):
        for batch in images(raw_weight(model[0]).dtype, count=2):
            loss_of(model, batch).backward()


BEFORE: list[Callable[[Any], None]] = [no_scope, a_scope_of_evaluation, a_scope_of_training]
before_it = pytest.mark.parametrize("before", BEFORE)
training = pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
all_modes = pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])


@all_modes
@formulas
@pytest.mark.parametrize("kind", KINDS)
def test_every_read_computes(kind, formula, mode):
    conv = of_kind(kind, formula, torch.float32)[0]
    with standardize_once(conv), torch.no_grad():
        cached = conv.weight

    with mode():
        first, second = conv.weight, conv.weight

    # All are alive, so that memory that two of them shared would show
    assert len({cached.data_ptr(), first.data_ptr(), second.data_ptr()}) == 3
    expected = standardize_weight(raw_weight(conv), formula, **gain_and_shift(conv)).detach()
    for weight in (cached, first, second):
        assert_close(weight.detach().clone(), expected, rtol=1e-6, atol=1e-6)


@before_it
@all_modes
@changes
@training
def test_a_read_follows_every_change(change, mode, is_training, before):
    model = tiny().train(is_training)
    before(model)
    with mode():
        old = model[3].weight.detach().clone()
        output = model(images()[0])

    change(model)

    with mode():
        weight = model[3].weight.detach().clone()
        again = model[3].weight.detach().clone()
        changed = model(images()[0])
    expected = standardize_weight(raw_weight(model[3])).detach()
    assert_close(weight, expected)
    assert torch.equal(again, weight)
    # What scales a weight and shifts it changes its standardized value by rounding
    is_rounding = change.__name__ in ("scale", "swap", "change_all")
    assert is_rounding or not torch.allclose(weight, old)
    assert is_rounding or not torch.allclose(changed, output)


@before_it
@changes
@training
def test_gradients_follow_every_change(change, is_training, before):
    """As those of a model that has the same raw weights and has seen nothing."""
    model = tiny().train(is_training)
    before(model)
    loss_of(model, images()[1]).backward()
    change(model)
    model.zero_grad()
    fresh = tiny().train(is_training)
    fresh.load_state_dict(model.state_dict())

    for network in (model, fresh):
        loss_of(network, images()[2]).backward()

    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@modes
@changes
def test_a_scope_follows_every_change_before_it(change, mode):
    model = tiny()
    a_scope_of_evaluation(model)

    for _ in range(2):
        change(model)
        with standardize_once(model):
            for _ in range(2):
                with mode():
                    weight = model[3].weight.clone()
                assert_close(weight, standardize_weight(raw_weight(model[3])).detach())
                assert_close(model[3].weight.detach(), weight)
