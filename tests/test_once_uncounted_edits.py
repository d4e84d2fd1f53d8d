"""Edits of raw weights that PyTorch does not count, through ``.data``, of few elements.

Inside a scope nothing tells of them but the step of an optimizer that made them. Outside they are always noticed.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cached_weights import assert_right, contexts, modes
from exact_twins import TOLERANCES, Context, assert_near, check, dtypes, formulas, images, loss_of, tiny
from torch import Tensor, nn

from ws_algorithm import standardize_once, standardize_weight
from ws_algorithm.parametrization import raw_weight

EDITED = slice(1, 9)  # elements of convolution 3, of 108


def edit(model: Any) -> None:
    raw = raw_weight(model[3])
    raw.data.view(-1)[EDITED] += torch.linspace(-0.5, 0.7, 8, dtype=raw.dtype)


def evaluate(model: Any, batch: Tensor, mode: Callable[[], Any] = torch.no_grad) -> Tensor:
    with mode():
        return model(batch).clone()


class WritesToData(torch.optim.Optimizer):
    """As optimizers from before ``torch.no_grad`` do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.view(-1)[EDITED] -= 0.5 * parameter.grad.data.reshape(-1)[EDITED]
        return loss


def test_the_edit_is_one_that_nothing_tells_of():
    """Else the tests below prove nothing."""
    model = tiny()
    raw = raw_weight(model[3])
    state = raw._version, raw.data_ptr()
    with standardize_once(model), torch.no_grad():
        before = model[3].weight.clone()
        edit(model)
        assert raw_weight(model[3]) is raw and (raw._version, raw.data_ptr()) == state
        assert torch.equal(model[3].weight, before)
        assert not torch.allclose(standardize_weight(raw), before)


@pytest.mark.parametrize("zeroes", [True, False], ids=["zero", "accumulate"])
@dtypes
def test_an_optimizer_that_writes_to_data_inside(dtype, zeroes):
    def loop(model: Any, context: Context) -> Any:
        optimizer = WritesToData([raw_weight(model[3])])
        outputs = []
        with context(model):
            for batch in images(dtype):
                if zeroes:
                    optimizer.zero_grad()
                loss_of(model, batch).backward()
                optimizer.step()
                outputs.append(evaluate(model, batch))
        return model.state_dict(), outputs

    check(lambda: tiny(dtype=dtype), loop, tolerance=100 * TOLERANCES[dtype])  # steps enter the next forward


def test_an_optimizer_that_writes_to_data_inside_with_a_closure():
    def loop(model: Any, context: Context) -> Any:
        optimizer = WritesToData([raw_weight(model[3])])

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, images()[0])
            loss.backward()
            return loss

        with context(model):
            for _ in range(3):
                optimizer.step(closure)
            loss_of(model, images()[1]).backward()
        return model.state_dict()

    check(tiny, loop, tolerance=1e-10)


@modes
def test_evaluation_inside_right_after_an_optimizer_has_written_to_data(mode):
    def loop(model: Any, context: Context) -> Any:
        optimizer = WritesToData([raw_weight(model[3])])
        with context(model):
            loss_of(model, images()[0]).backward()
            before = evaluate(model, images()[1], mode)
            optimizer.step()
            return before, evaluate(model, images()[1], mode)

    check(tiny, loop)


# Outside


@modes
@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@formulas
def test_evaluation_outside(formula, is_training, mode):
    model = tiny(formula).train(is_training)
    for batch in images():
        before = evaluate(model, batch, mode)
        edit(model)
        assert_right(model[3])
        assert not torch.allclose(evaluate(model, batch, mode), before)


def test_training_outside():
    """As on a model that is given the edited weights and has seen nothing."""
    model = tiny()
    for batch in images():
        loss_of(model, batch).backward()
        edit(model)
        fresh = tiny()
        fresh.load_state_dict(model.state_dict())
        model.zero_grad()
        for network in (model, fresh):
            loss_of(network, batch).backward()
        for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)


# Between two scopes


@formulas
@dtypes
def test_training_in_scopes_with_edits_in_between(dtype, formula):
    def loop(model: Any, context: Context) -> Any:
        for batch in images(dtype):
            with context(model):
                loss_of(model, batch).backward()
                loss_of(model, batch + 1).backward()
            edit(model)
        return model.state_dict()

    check(lambda: tiny(formula, dtype), loop)


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@modes
@formulas
def test_evaluation_in_scopes_with_edits_in_between(formula, mode, is_training):
    def loop(model: Any, context: Context) -> Any:
        model.train(is_training)
        outputs = []
        for batch in images():
            with context(model):
                outputs += [evaluate(model, batch, mode), evaluate(model, batch, mode)]
            edit(model)
        return outputs

    check(lambda: tiny(formula), loop)


@modes
def test_evaluation_in_a_scope_under_autocast_after_an_edit(mode):
    model = tiny(dtype=torch.float32)
    for batch in images(torch.float32):
        with standardize_once(model), torch.autocast("cpu", torch.bfloat16), mode():
            model(batch)
            weight = model[3].weight.clone()
        expected = standardize_weight(raw_weight(model[3])).detach().bfloat16()
        torch.testing.assert_close(weight, expected)
        edit(model)


@pytest.mark.parametrize("formula", ["affine", "scaled"])
@modes
def test_edits_of_the_gain_between_scopes_and_outside(formula, mode):
    def loop(model: Any, context: Context) -> Any:
        outputs = []
        for batch in images():
            with context(model):
                outputs.append(evaluate(model, batch, mode))
            model[3].parametrizations["weight"][1].gain.data[1] += 0.5
            outputs.append(evaluate(model, batch, mode))
        return outputs

    check(lambda: tiny(formula), loop)


@contexts
@modes
def test_a_scope_of_training_between_edits_and_evaluation(mode, context):
    model = tiny()
    for batch in images():
        edit(model)
        with context(model):
            loss_of(model, batch).backward()
        assert_right(model[3])
        edit(model)
        evaluate(model, batch, mode)
        assert_right(model[3])


# Evaluation, a context, evaluation


@pytest.mark.parametrize("has_backward", [True, False], ids=["backward", "forward only"])
@formulas
def test_evaluation_after_a_forward_with_gradients_inside(formula, has_backward):
    def loop(model: Any, context: Context) -> Any:
        before = evaluate(model, images()[0])
        edit(model)
        with context(model):
            loss = loss_of(model, images()[1])
            if has_backward:
                loss.backward()
        after = evaluate(model, images()[0])
        edit(model)
        return before, after, evaluate(model, images()[0])

    check(lambda: tiny(formula), loop)


@modes
def test_evaluation_inside_after_a_forward_with_gradients(mode):
    def loop(model: Any, context: Context) -> Any:
        evaluate(model, images()[0], mode)
        edit(model)
        with context(model):
            loss_of(model, images()[1]).backward()
            return evaluate(model, images()[0], mode)

    check(tiny, loop)


def test_changes_of_mode_standardize_nothing_again():
    """The Trainer's metrics change it in every micro-batch."""
    model = tiny()
    with standardize_once(model):
        lent: list[nn.Parameter] = []
        for batch in images():
            model.eval().train()
            loss_of(model, batch).backward()
            lent.append(model[3].weight)
        assert len({weight.data_ptr() for weight in lent}) == 1
        assert_near(lent[0].detach(), standardize_weight(raw_weight(model[3])).detach())
