"""Backwards inside of backwards in ``standardize_once``, as reentrant checkpoints run them.

As ``exact_twins`` says, every loop runs with the context and without.
"""

from typing import Any

import pytest
import torch
from exact_twins import SEED, Context, assert_near, check, gradients, images, loss_of, tiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ws_algorithm import apply_weight_standardization, standardize_once


def one_convolution() -> Any:
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())
    apply_weight_standardization(model)
    return model.double()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("is_loss_between", [True, False])
@pytest.mark.parametrize("checkpointed", [[0], [1], [2], [0, 2], [0, 1, 2]], ids=str)
def test_checkpoints_among_three_calls_of_one_convolution(checkpointed, is_loss_between, use_reentrant):
    def loop(model: Any, context: Context) -> None:
        first, second, third = images()
        with context(model):
            for batch in (first, third):
                hidden: Any = batch.requires_grad_()
                for turn in range(3):
                    is_checkpointed = turn in checkpointed
                    hidden = (
                        checkpoint(model, hidden, use_reentrant=use_reentrant) if is_checkpointed else model(hidden)
                    )
                    if turn == 0 and is_loss_between:
                        loss_of(model, second).backward()  # so that the other calls have a node of their own
                hidden.square().mean().backward()

    check(one_convolution, loop)


def backward_of(model: Any, batch: Tensor) -> Any:
    """A hook that runs a backward of its own."""

    def hook(gradient: Tensor) -> None:
        with torch.enable_grad():
            loss_of(model, batch).backward()

    return hook


@pytest.mark.parametrize("index", [0, 2, 3, 5])
@pytest.mark.parametrize("uses", [1, 2])
def test_a_backward_inside_of_a_backward(uses, index):
    """Before any convolution has its gradient, between them, and after."""

    def loop(model: Any, context: Context) -> None:
        first, second, third = images()
        with context(model):
            for batch in (first, third):
                hidden = model[: index + 1](batch.requires_grad_())
                hidden.register_hook(backward_of(model, second))
                loss = model[index + 1 :](hidden).square().mean()
                for part in range(1, uses):
                    loss = loss + loss_of(model, batch + part)
                loss.backward()

    check(tiny, loop)


def test_a_backward_between_the_gradients_of_two_ways_to_one_raw_weight():
    def loop(model: Any, context: Context) -> None:
        first, second, third = images()
        with context(model):
            hidden = model(first)
            loss_of(model, third).backward()  # so that the second call has a node of its own
            hidden.register_hook(backward_of(model, second))
            loss_of(model, hidden).backward()

    check(one_convolution, loop)


def test_a_backward_inside_of_a_backward_that_fails():
    def fail(gradient: Tensor) -> None:
        raise RuntimeError("stop")

    def fail_inside(gradient: Tensor) -> None:
        with torch.enable_grad():
            hidden = model_of_loop[0][:4](images()[1])
            hidden.register_hook(fail)
            model_of_loop[0][4:](hidden).square().mean().backward()

    model_of_loop: list[Any] = []

    def loop(model: Any, context: Context) -> None:
        model_of_loop[:] = [model]
        with context(model):
            loss_of(model, images()[0]).backward()
            hidden = model[:2](images()[0])
            hidden.register_hook(fail_inside)
            with pytest.raises(RuntimeError, match="stop"):
                model[2:](hidden).square().mean().backward()
            loss_of(model, images()[2]).backward()

    check(tiny, loop)


def test_the_gradients_are_still_projected_once():
    """Right values are no proof of it: a gradient that waits is not yet a true one."""
    model, exact = one_convolution(), one_convolution()
    with standardize_once(model):
        for network in (model, exact):
            hidden: Any = checkpoint(network, images()[0].requires_grad_(), use_reentrant=True)
            hidden.square().mean().backward()
        with pytest.raises(AssertionError):
            assert_near(gradients(model), gradients(exact), tolerance=1e-3)
    assert_near(gradients(model), gradients(exact))
