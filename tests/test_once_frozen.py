"""What is cached without gradients and the graphs of training leave each other alone, frozen weights among them.

Outside ``standardize_once`` nothing is cached, and the same holds.
"""

from typing import Any

import pytest
import torch
from cached_weights import assert_right, contexts, modes
from exact_twins import CONVOLUTIONS, Context, check, exactly, images, loss_of, tiny
from torch import nn
from torch.testing import assert_close
from weight_changes import CHANGES, COUNTED

from ws_algorithm import standardize_once, standardize_weight
from ws_algorithm.parametrization import raw_weight


def frozen_tiny() -> Any:
    """With the second convolution frozen."""
    model = tiny()
    raw_weight(model[3]).requires_grad_(False)
    return model


@contexts
def test_it_is_right_after_each_step_of_an_optimizer(context):
    model = tiny(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    with context(model):
        for batch in images(torch.float32):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            for index in CONVOLUTIONS:
                assert_right(model[index])


@contexts
def test_evaluation_takes_no_part_in_training(context):
    evaluated, never = tiny(), tiny()
    for model in (evaluated, never):
        with context(model):
            if model is evaluated:
                with torch.no_grad():
                    model(images()[0])
            weight = model[3].weight
            assert weight.requires_grad and weight.grad_fn is not None
            loss_of(model, images()[1]).backward()

    for one, other in zip(evaluated.parameters(), never.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@modes
def test_gradients_inside_after_an_evaluation(mode):
    def loop(model: Any, context: Context) -> None:
        with context(model):
            with mode():
                model(images()[0])
            for batch in images():
                loss_of(model, batch).backward()

    check(tiny, loop)


def test_training_a_frozen_convolution_after_inference_mode():
    """A tensor of inference mode cannot be saved for a backward."""
    model, expected = frozen_tiny(), frozen_tiny()
    with torch.inference_mode():
        model(images()[0])

    for network in (model, expected):
        for batch in images():
            loss_of(network, batch).backward()

    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


def test_training_a_frozen_convolution_after_inference_mode_inside():
    def loop(model: Any, context: Context) -> None:
        with context(model):
            with torch.inference_mode():
                model(images()[0])
            for batch in images():
                loss_of(model, batch).backward()

    model = check(frozen_tiny, loop)

    # All others learn
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["3.parametrizations.weight.original"]


@contexts
@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("second", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_one_mode_after_the_other_and_gradients_of_the_images(first, second, is_frozen, context):
    model = tiny().requires_grad_(not is_frozen)
    batch = images()[1].requires_grad_()
    with context(model):
        with first():
            model(images()[0])
        with second():
            output = model(images()[0]).clone()

        loss_of(model, batch).backward()

    other = tiny().requires_grad_(not is_frozen)
    same_batch = images()[1].requires_grad_()
    loss_of(other, same_batch).backward()
    assert batch.grad is not None and same_batch.grad is not None
    assert_close(batch.grad, same_batch.grad)
    assert_close(output, other(images()[0]).detach())


@contexts
def test_a_raw_weight_made_in_inference_mode(context):
    with torch.inference_mode():
        model = tiny()
        with context(model):
            for _ in range(2):
                model(images()[0])
            nn.init.constant_(raw_weight(model[3]), 0.5)
            assert torch.equal(model[3].weight, torch.zeros_like(model[3].weight))


@pytest.mark.parametrize(
    "context, changes", [(exactly, CHANGES), (standardize_once, COUNTED)], ids=["outside", "inside"]
)
def test_a_frozen_convolution_in_training(context, changes):
    model = frozen_tiny()
    with context(model):
        for change in changes:
            loss_of(model, images()[0]).backward()
            change(model)
            raw_weight(model[3]).requires_grad_(False)
            for _ in range(2):
                assert_close(model[3].weight, standardize_weight(raw_weight(model[3])))


def test_a_frozen_convolution_is_computed_once_for_training_and_evaluation_inside():
    model = frozen_tiny()
    with standardize_once(model):
        in_training = model[3].weight
        loss_of(model, images()[0]).backward()
        with torch.no_grad():
            in_evaluation = model[3].weight

    assert in_training.data_ptr() == in_evaluation.data_ptr()
    assert not in_training.requires_grad


def test_a_frozen_convolution_that_learns_again():
    model = frozen_tiny()
    loss_of(model, images()[0]).backward()
    raw_weight(model[3]).requires_grad_(True)

    loss_of(model, images()[0]).backward()

    other = tiny()
    loss_of(other, images()[0]).backward()
    learned: Any = [raw_weight(network[3]).grad for network in (model, other)]
    assert torch.equal(*learned)


@pytest.mark.parametrize("is_frozen_again", [False, True], ids=["to the end", "then is frozen again"])
def test_a_frozen_convolution_that_learns_inside(is_frozen_again):
    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        with context(model):
            loss_of(model, first).backward()
            raw_weight(model[3]).requires_grad_(True)
            loss_of(model, second).backward()
            loss_of(model, third).backward()
            raw_weight(model[3]).requires_grad_(not is_frozen_again)
            loss_of(model, first).backward()
        return raw_weight(model[3]).grad

    model = check(frozen_tiny, loop)

    assert raw_weight(model[3]).grad is not None


@contexts
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


@contexts
@modes
def test_gradients_with_respect_to_what_is_returned(mode, context):
    """One call's own, though all calls return the same values."""
    model = tiny()
    with context(model):
        with mode():
            model(images()[0])
        with torch.no_grad():
            first, second = model[3].weight.requires_grad_(), model[3].weight.requires_grad_()

        (first * 2).sum().backward()

    assert torch.equal(first.grad, torch.full_like(first, 2.0)) and second.grad is None
