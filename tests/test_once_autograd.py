"""``standardize_once`` with the rest of autograd: ``torch.autograd.grad`` and hooks.

As ``exact_twins`` says, every loop runs with the context and without.
"""

from typing import Any

import pytest
import torch
from exact_twins import CONVOLUTIONS, Context, check, formulas, gradients, images, l2, loss_of, tiny
from torch import Tensor, nn

from ws_algorithm.parametrization import raw_weight


def raw_weights(model: Any) -> list[nn.Parameter]:
    return [raw_weight(model[index]) for index in CONVOLUTIONS]


@pytest.mark.parametrize("is_between_backwards", [False, True])
@formulas
def test_gradients_that_are_asked_for(formula, is_between_backwards):
    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        with context(model):
            if is_between_backwards:
                loss_of(model, first).backward()
            asked = list(torch.autograd.grad(loss_of(model, second), raw_weights(model)))
            asked += torch.autograd.grad(loss_of(model, second), list(model.parameters()))
            asked += torch.autograd.grad(loss_of(model, third) + l2(model), raw_weight(model[3]))
            if is_between_backwards:
                loss_of(model, third).backward()
        return asked

    check(lambda: tiny(formula), loop)


@formulas
@pytest.mark.parametrize("is_between_backwards", [False, True])
def test_gradients_that_are_asked_for_in_a_batch(is_between_backwards, formula):
    def loop(model: Any, context: Context) -> Any:
        with context(model):
            if is_between_backwards:
                loss_of(model, images()[0]).backward()
            outputs = model(images()[1]).mean((0, 2, 3))
            rows = torch.eye(len(outputs), dtype=outputs.dtype)
            asked = torch.autograd.grad(outputs, raw_weights(model), rows, is_grads_batched=True)
            if is_between_backwards:
                loss_of(model, images()[2]).backward()
        return list(asked)

    check(lambda: tiny(formula), loop)


def test_a_gradient_that_is_asked_for_after_the_context():
    def loop(model: Any, context: Context) -> Any:
        first, second, _ = images()
        with context(model):
            loss_of(model, first).backward()
            late = loss_of(model, second)
        return list(torch.autograd.grad(late, raw_weights(model)))

    check(tiny, loop)


def test_no_gradient_for_a_raw_weight_that_took_no_part():
    def loop(model: Any, context: Context) -> Any:
        with context(model):
            hidden = model[:3](images()[0]).square().mean()
            with pytest.raises(RuntimeError, match="unused|not have been used"):
                torch.autograd.grad(hidden, raw_weights(model), retain_graph=True)
            return list(torch.autograd.grad(hidden, raw_weights(model), allow_unused=True))

    check(tiny, loop)


def test_the_gradient_of_the_images():
    def loop(model: Any, context: Context) -> Any:
        batch = images()[0].requires_grad_()
        with context(model):
            loss_of(model, images()[1]).backward()
            (asked,) = torch.autograd.grad(loss_of(model, batch), batch)
            loss_of(model, batch).backward()
        return asked, batch.grad

    check(tiny, loop)


def test_backward_into_some_parameters_only():
    def loop(model: Any, context: Context) -> None:
        with context(model):
            for batch in images():
                loss_of(model, batch).backward(inputs=[raw_weight(model[0]), model[6].bias])

    check(tiny, loop)


@formulas
def test_a_penalty_on_the_gradients_of_the_raw_weights(formula):
    def loop(model: Any, context: Context) -> None:
        with context(model):
            for batch in images():
                loss = loss_of(model, batch)
                asked = torch.autograd.grad(loss, raw_weights(model), create_graph=True)
                (loss + torch.stack([gradient.square().sum() for gradient in asked]).sum()).backward()

    check(lambda: tiny(formula), loop, tolerance=1e-11)  # second derivatives take more roundings


@formulas
def test_a_penalty_on_the_gradients_of_the_images(formula):
    def loop(model: Any, context: Context) -> None:
        with context(model):
            for batch in images():
                batch.requires_grad_()
                loss = loss_of(model, batch)
                (asked,) = torch.autograd.grad(loss, batch, create_graph=True)
                (loss + asked.square().sum()).backward()

    check(lambda: tiny(formula), loop, tolerance=1e-11)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_backward_that_creates_a_graph():
    def loop(model: Any, context: Context) -> Any:
        with context(model):
            for batch in images():
                loss_of(model, batch).backward(create_graph=True)
        accumulated = gradients(model)
        for parameter in model.parameters():
            parameter.grad = None
        return accumulated

    check(tiny, loop)


# Hooks on raw weights


def clamp(gradient: Tensor) -> Tensor:
    return gradient.clamp(-1e-3, 1e-3)


@pytest.mark.parametrize("place", ["before", "at the start", "in the middle"])
@pytest.mark.parametrize("indices", [[3], [0, 3, 6]], ids=str)
def test_a_hook_that_clamps(place, indices):
    def loop(model: Any, context: Context) -> None:
        def hook_at(where: str) -> None:
            if where == place:
                for index in indices:
                    raw_weight(model[index]).register_hook(clamp)

        first, second, third = images()
        hook_at("before")
        with context(model):
            hook_at("at the start")
            loss_of(model, first).backward()
            hook_at("in the middle")
            loss_of(model, second).backward()
            loss_of(model, third).backward()

    model = check(tiny, loop)
    without = tiny()
    for batch in images():
        loss_of(without, batch).backward()
    clamped, free = raw_weight(model[3]).grad, raw_weight(without[3]).grad
    assert clamped is not None and free is not None and not torch.allclose(clamped, free)


def test_a_hook_that_is_removed_in_the_middle():
    def loop(model: Any, context: Context) -> None:
        first, second, third = images()
        handle = raw_weight(model[3]).register_hook(clamp)
        with context(model):
            loss_of(model, first).backward()
            loss_of(model, second).backward()
            handle.remove()
            loss_of(model, third).backward()

    check(tiny, loop)


def test_a_hook_sees_the_gradient_of_each_backward():
    def loop(model: Any, context: Context) -> Any:
        seen: list[Tensor] = []
        raw_weight(model[3]).register_hook(lambda gradient: seen.append(gradient.clone()))
        with context(model):
            for batch in images():
                loss_of(model, batch).backward()
        return seen

    check(tiny, loop)


def test_a_hook_after_accumulation_sees_the_true_gradient():
    def loop(model: Any, context: Context) -> Any:
        seen: list[Any] = []
        raw_weight(model[3]).register_post_accumulate_grad_hook(lambda raw: seen.append(raw.grad.clone()))
        with context(model):
            for batch in images():
                loss_of(model, batch).backward()
        return seen

    check(tiny, loop)


@pytest.mark.parametrize("is_registered_inside", [False, True])
def test_an_optimizer_in_the_backward(is_registered_inside):
    """A hook that makes the step of each parameter as soon as its gradient is there, and frees it."""

    def step(raw: Any) -> None:
        with torch.no_grad():
            raw.sub_(0.1 * raw.grad)
        raw.grad = None

    def loop(model: Any, context: Context) -> Any:
        def register() -> None:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(step)

        if not is_registered_inside:
            register()
        with context(model):
            if is_registered_inside:
                register()
            for batch in images():
                loss_of(model, batch).backward()
        return model.state_dict()

    check(tiny, loop)


def test_hooks_on_layers_and_activations():
    def loop(model: Any, context: Context) -> Any:
        seen: list[Tensor] = []
        model[3].register_full_backward_hook(lambda layer, inputs, outputs: seen.append(inputs[0].clone()))
        model[0].register_forward_hook(lambda layer, inputs, output: 2 * output)
        with context(model):
            for batch in images():
                loss_of(model, batch).backward()
        return seen

    check(tiny, loop)
