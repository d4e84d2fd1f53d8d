"""Steps of optimizers inside ``standardize_once`` and after it.

As ``exact_twins`` says, every loop runs with the context and without.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_twins import Context, check, dtypes, exactly, images, loss_of, tiny
from lamb import Lamb
from torch import Tensor, nn

from ws_algorithm.parametrization import raw_weight

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "LAMB": lambda parameters: Lamb(parameters, lr=0.01),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
}
optimizers = pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
SOME_STEPS = 1e-10  # roundings of a step enter the next forward


@optimizers
@pytest.mark.parametrize("zeroes", [False, True], ids=["accumulate", "zero"])
@pytest.mark.parametrize("per_step", [1, 2])
def test_steps_inside(build, zeroes, per_step):
    def loop(model: Any, context: Context) -> Any:
        optimizer = build(model.parameters())
        with context(model):
            for _ in range(3):
                for batch in images(count=per_step):
                    loss_of(model, batch).backward()
                optimizer.step()
                if zeroes:
                    optimizer.zero_grad()
            loss_of(model, images()[1]).backward()
        return model.state_dict()

    check(tiny, loop, tolerance=SOME_STEPS)


@optimizers
def test_steps_with_a_closure_inside(build):
    def loop(model: Any, context: Context) -> Any:
        optimizer = build(model.parameters())

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses = [loss_of(model, batch) for batch in images()]
            for loss in losses:
                loss.backward()
            return losses[0]

        with context(model):
            for _ in range(3):
                optimizer.step(closure)
        return model.state_dict()

    check(tiny, loop, tolerance=SOME_STEPS)


@pytest.mark.parametrize("is_around", [False, True], ids=["in the closure", "around the step"])
def test_an_optimizer_of_several_backwards_per_step(is_around):
    def loop(model: Any, context: Context) -> Any:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
        outside, inside = (context, exactly) if is_around else (exactly, context)

        def closure() -> Tensor:
            optimizer.zero_grad()
            with inside(model):
                loss = torch.stack([loss_of(model, batch) for batch in images()]).sum()
                loss.backward()
            return loss

        for _ in range(2):
            with outside(model):
                optimizer.step(closure)
        return model.state_dict()

    # Quotients of differences of gradients
    check(tiny, loop, tolerance=1e-6)


@optimizers
def test_steps_after_each_context(build):
    def loop(model: Any, context: Context) -> Any:
        optimizer = build(model.parameters())
        for step in range(4):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            with context(model):
                for batch in images():
                    loss_of(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        return model.state_dict()

    check(tiny, loop, tolerance=SOME_STEPS)


@dtypes
def test_twenty_steps_of_lamb(dtype):
    """Of four micro-batches each, with both of its clippings: of the norm of all gradients and of the ratio of one."""
    rate = 0.01
    lengths: dict[int, list[float]] = {0: [], 3: []}

    def build() -> Any:
        model = tiny(dtype=dtype)
        with torch.no_grad():
            raw_weight(model[3]).mul_(100)
        return model

    def loop(model: Any, context: Context) -> Any:
        optimizer = Lamb(model.parameters(), lr=rate)
        for _ in range(20):
            with context(model):
                for batch in images(dtype, count=4):
                    loss_of(model, batch).backward()
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1.0
            before = {index: raw_weight(model[index]).detach().clone() for index in lengths}
            optimizer.step()
            for index, old in before.items():
                step = (raw_weight(model[index]) - old).norm()
                lengths[index].append(float(step / (rate * old.norm())))
            optimizer.zero_grad()
        return model.state_dict()

    check(build, loop)
    assert lengths[0] == pytest.approx([1.0] * 40, rel=1e-4)
    assert len(lengths[3]) == 40 and max(lengths[3]) < 0.9  # clipped


def test_a_step_of_another_model_inside():
    def loop(model: Any, context: Context) -> None:
        other: Any = nn.Linear(2, 2).double()
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        with context(model):
            for batch in images():
                loss_of(model, batch).backward()
                other(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
                optimizer.step()

    check(tiny, loop)


def test_steps_by_hand_inside():
    """Without an optimizer nothing announces that gradients are read; by ``torch.autograd.grad`` they are asked for."""

    def loop(model: Any, context: Context) -> Any:
        parameters = list(model.parameters())
        with context(model):
            for batch in images():
                asked = torch.autograd.grad(loss_of(model, batch), parameters)
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, asked, strict=True):
                        parameter.sub_(0.1 * gradient)
        return model.state_dict()

    check(tiny, loop, tolerance=SOME_STEPS)
