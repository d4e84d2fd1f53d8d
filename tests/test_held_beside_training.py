"""What is held for evaluation and the graphs of training leave each other alone, frozen weights among them."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from exact_twins import CONVOLUTIONS, images, loss_of, tiny
from held_weights import assert_right
from torch import nn
from torch.testing import assert_close
from weight_changes import CHANGES

from ws_algorithm import standardize_once, standardize_weight
from ws_algorithm.parametrization import raw_weight


def test_it_is_right_after_each_step_of_an_optimizer():
    model = tiny(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    for batch in images(torch.float32):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        for index in CONVOLUTIONS:
            assert_right(model[index])


def test_a_weight_that_is_held_takes_no_part_in_training():
    held, never = tiny(), tiny()
    with torch.no_grad():
        held(images()[0])

    for model in (held, never):
        weight = model[3].weight
        assert weight.requires_grad and weight.grad_fn is not None
        loss_of(model, images()[1]).backward()

    for one, other in zip(held.parameters(), never.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_training_a_frozen_convolution_after_inference_mode():
    """A tensor of inference mode cannot be saved for a backward."""
    model, expected = tiny(), tiny()
    for network in (model, expected):
        raw_weight(network[3]).requires_grad_(False)
    with torch.inference_mode():
        model(images()[0])

    for network in (model, expected):
        for batch in images():
            loss_of(network, batch).backward()

    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("second", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_one_mode_after_the_other_and_gradients_of_the_images(first, second, is_frozen):
    model = tiny().requires_grad_(not is_frozen)
    with first():
        model(images()[0])
    with second():
        output = model(images()[0]).clone()
    batch = images()[1].requires_grad_()

    loss_of(model, batch).backward()

    other = tiny().requires_grad_(not is_frozen)
    same_batch = images()[1].requires_grad_()
    loss_of(other, same_batch).backward()
    assert batch.grad is not None and same_batch.grad is not None
    assert_close(batch.grad, same_batch.grad)
    assert_close(output, other(images()[0]).detach())


def test_a_raw_weight_made_in_inference_mode():
    with torch.inference_mode():
        model = tiny()
        for _ in range(2):
            model(images()[0])
        nn.init.constant_(raw_weight(model[3]), 0.5)
        assert torch.equal(model[3].weight, torch.zeros_like(model[3].weight))


def test_a_frozen_convolution_in_training():
    model = tiny()
    raw_weight(model[3]).requires_grad_(False)
    for change in CHANGES:
        loss_of(model, images()[0]).backward()
        change(model)
        raw_weight(model[3]).requires_grad_(False)
        assert_close(model[3].weight, standardize_weight(raw_weight(model[3])))


def test_a_frozen_convolution_that_learns_again():
    model = tiny()
    raw_weight(model[3]).requires_grad_(False)
    loss_of(model, images()[0]).backward()
    raw_weight(model[3]).requires_grad_(True)

    loss_of(model, images()[0]).backward()

    other = tiny()
    loss_of(other, images()[0]).backward()
    learned: Any = [raw_weight(network[3]).grad for network in (model, other)]
    assert torch.equal(*learned)


@pytest.mark.parametrize("context", [nullcontext, standardize_once])
@pytest.mark.parametrize("is_frozen", [True, False], ids=["frozen", "not frozen"])
def test_what_is_set_on_the_tensor_that_is_returned_stays_there(is_frozen, context):
    """Flags, gradients and hooks: the next call returns another tensor, with the same values."""
    model, calls = tiny(), []
    raw_weight(model[3]).requires_grad_(not is_frozen)

    with context(model):
        with torch.no_grad():
            mine = model[3].weight.requires_grad_()
            mine.register_hook(calls.append)
            again = model[3].weight
            assert not again.requires_grad and not again._backward_hooks
            assert torch.equal(again, mine.detach())
        if is_frozen:
            assert not model[3].weight.requires_grad
            images_with_gradient = images()[0].requires_grad_()
            loss_of(model, images_with_gradient).backward()

    assert calls == [] and mine.grad is None
    assert not model[3].weight.requires_grad if is_frozen else model[3].weight.grad_fn is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_with_respect_to_what_is_returned(mode):
    """One call's own, though all calls return the same values."""
    model = tiny()
    with mode():
        model(images()[0])
    with torch.no_grad():
        first, second = model[3].weight.requires_grad_(), model[3].weight.requires_grad_()

    (first * 2).sum().backward()

    assert torch.equal(first.grad, torch.full_like(first, 2.0)) and second.grad is None
