"""Forwards and backwards of ``standardize_once`` that do not come in pairs.

As ``exact_twins`` says, every loop runs with the context and without.
"""

from typing import Any

import pytest
import torch
from exact_twins import SEED, Context, check, dtypes, gradients, images, loss_of, tiny
from torch import Tensor, nn

from ws_algorithm import apply_weight_standardization


@pytest.mark.parametrize("from_gradients", [False, True])
def test_a_context_without_backward(from_gradients):
    def loop(model: Any, context: Context) -> Any:
        if from_gradients:
            loss_of(model, images()[1]).backward()
        before = [parameter.grad for parameter in model.parameters()]
        with context(model):
            pass
        with context(model):
            loss_of(model, images()[0])
        with context(model), torch.no_grad():
            loss_of(model, images()[0])
        return [parameter.grad is old for parameter, old in zip(model.parameters(), before, strict=True)]

    check(tiny, loop)


def test_evaluation_between_micro_batches():
    def loop(model: Any, context: Context) -> Any:
        outputs = []
        with context(model):
            for batch in images():
                loss_of(model, batch).backward()
                with torch.no_grad():
                    outputs.append(model(batch))
                with torch.inference_mode():
                    outputs.append(model(batch).clone())
        return outputs

    check(tiny, loop)


def test_a_convolution_called_several_times_in_a_forward():
    def build() -> Any:
        torch.manual_seed(SEED)
        model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(3, 3), nn.Tanh())
        apply_weight_standardization(model)
        return model.double()

    def loop(model: Any, context: Context) -> None:
        with context(model):
            for batch in images():
                (model(model(batch)) + model(batch)).square().mean().backward()

    check(build, loop)


def two_forwards_before_one_backward(model: Any, first: Tensor, second: Tensor) -> None:
    (loss_of(model, first) * loss_of(model, second)).backward()


def two_forwards_then_two_backwards(model: Any, first: Tensor, second: Tensor) -> None:
    losses = loss_of(model, first), loss_of(model, second)
    for loss in reversed(losses):
        loss.backward()


def two_backwards_of_a_forward(model: Any, first: Tensor, second: Tensor) -> None:
    loss = loss_of(model, first)
    loss.backward(retain_graph=True)
    loss.backward()


def two_losses_of_a_forward(model: Any, first: Tensor, second: Tensor) -> None:
    outputs = model(first)
    outputs.square().mean().backward(retain_graph=True)
    outputs.sin().sum().backward()


def two_losses_in_one_call(model: Any, first: Tensor, second: Tensor) -> None:
    torch.autograd.backward([loss_of(model, first), loss_of(model, second).exp()])


def a_forward_that_is_dropped(model: Any, first: Tensor, second: Tensor) -> None:
    loss_of(model, first)
    loss_of(model, second).backward()


@pytest.mark.parametrize(
    "pass_through",
    [
        two_forwards_before_one_backward,
        two_forwards_then_two_backwards,
        two_backwards_of_a_forward,
        two_losses_of_a_forward,
        two_losses_in_one_call,
        a_forward_that_is_dropped,
    ],
)
@dtypes
def test_passes(pass_through, dtype):
    def loop(model: Any, context: Context) -> None:
        first, second, third = images(dtype)
        with context(model):
            pass_through(model, first, second)
            pass_through(model, second, third)

    check(lambda: tiny(dtype=dtype), loop)


def test_backward_after_the_context():
    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        with context(model):
            loss_of(model, first).backward()
            late = loss_of(model, second)
        inside = gradients(model)
        late.backward()
        after = gradients(model)
        loss_of(model, third).backward()
        return inside, after

    check(tiny, loop)


def test_only_backward_after_the_context():
    def loop(model: Any, context: Context) -> Any:
        with context(model):
            losses = [loss_of(model, batch) for batch in images()]
        steps = []
        for loss in losses:
            loss.backward(retain_graph=True)
            loss.backward()
            steps.append(gradients(model))
        return steps

    check(tiny, loop)


def test_backward_inside_the_next_context():
    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        with context(model):
            loss_of(model, first).backward()
            late = loss_of(model, second)
        with context(model):
            loss_of(model, third).backward()
            late.backward()
            loss_of(model, first).backward()
        return gradients(model)

    check(tiny, loop)


def test_backward_inside_of_a_graph_from_before():
    def loop(model: Any, context: Context) -> Any:
        first, second, _ = images()
        early = loss_of(model, first)
        with context(model):
            loss_of(model, second).backward()
            early.backward()
        return gradients(model)

    check(tiny, loop)


def test_zeroing_after_the_context_then_backward_of_a_graph_from_inside():
    def loop(model: Any, context: Context) -> Any:
        first, second, _ = images()
        with context(model):
            loss_of(model, first).backward()
            late = loss_of(model, second)
        model.zero_grad()
        late.backward()
        return gradients(model)

    check(tiny, loop)
