"""Edits of raw weights that PyTorch does not count, through ``.data``, of elements that are not compared.

Nothing tells of them but what comes after: the step of an optimizer, a change of mode, a forward with gradients.
"""

from typing import Any

import pytest
import torch
from exact_twins import TOLERANCES, Context, assert_near, check, dtypes, formulas, images, loss_of, tiny
from torch import Tensor, nn

from ws_algorithm import standardize_once, standardize_weight
from ws_algorithm.parametrization import raw_weight

EDITED = slice(1, 9)  # elements of convolution 3; of its 108, every 13th is compared


def edit(model: Any) -> None:
    raw = raw_weight(model[3])
    raw.data.view(-1)[EDITED] += torch.linspace(-0.5, 0.7, 8, dtype=raw.dtype)


def evaluate(model: Any, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model(batch)


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
    with torch.no_grad():
        before = model[3].weight.clone()
        edit(model)
        assert torch.equal(model[3].weight, before)
        assert not torch.allclose(standardize_weight(raw_weight(model[3])), before)


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
        return before, evaluate(model, images()[0])

    check(lambda: tiny(formula), loop)


def test_evaluation_inside_after_a_forward_with_gradients():
    def loop(model: Any, context: Context) -> Any:
        evaluate(model, images()[0])
        edit(model)
        with context(model):
            loss_of(model, images()[1]).backward()
            return evaluate(model, images()[0])

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
