"""Where contexts of ``standardize_once`` begin and end: exceptions, contexts in contexts, zeroing around them.

As ``exact_twins`` says, every loop runs with the context and without.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_twins import Context, Pair, assert_near, check, gradients, images, l2, loss_of, tiny
from torch import Tensor, nn

from ws_algorithm import standardize_once
from ws_algorithm.parametrization import raw_weight

# Exceptions


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop, GeneratorExit])
@pytest.mark.parametrize("place", ["between", "forward", "backward"])
def test_an_exception_leaves_the_gradients_so_far(place, error):
    def fail(*args: Any) -> None:
        raise error("stop")

    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        with pytest.raises(error), context(model):
            loss_of(model, first).backward()
            loss_of(model, second).backward()
            if place == "between":
                fail()
            if place == "forward":
                handle = model[4].register_forward_pre_hook(fail)
                try:
                    model(third)
                finally:
                    handle.remove()
            hidden = model[:3](third)
            hidden.register_hook(fail)
            model[3:](hidden).square().mean().backward()  # past the last two convolutions, not to the first
        after = gradients(model)
        loss_of(model, third).backward()  # goes on as if nothing had happened
        return after

    check(tiny, loop)


@pytest.mark.parametrize("are_tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("has_penalty", [False, True])
def test_a_backward_that_fails_and_is_caught_inside(are_tied, has_penalty):
    """Of two convolutions in a row the second has its gradient, and maybe waits for the first to have its own."""

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("stop")

    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        with context(model):
            loss_of(model, first).backward()
            hidden = model.first(second)
            hidden.register_hook(fail)
            loss = model.second(hidden).square().mean()
            with pytest.raises(RuntimeError, match="stop"):
                (loss + l2(model) if has_penalty else loss).backward()
            loss_of(model, third).backward()
        after = gradients(model)
        loss_of(model, third).backward()
        return after

    check(lambda: Pair(("composer", "composer"), are_tied, is_plain_shared=False), loop)


def test_a_backward_that_fails_between_two_ways_to_a_raw_weight():
    """The gradient of the convolution is there, that of the penalty fails, and none of them is accumulated."""

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("stop")

    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        with context(model):
            loss_of(model, first).backward()
            penalty = raw_weight(model[3]).square()
            penalty.register_hook(fail)
            early = penalty.sum()  # operations are differentiated from the latest to the earliest
            with pytest.raises(RuntimeError, match="stop"):
                (loss_of(model, second) + early).backward()
            model.zero_grad()
            loss_of(model, third).backward()
        return gradients(model)

    check(tiny, loop)


def test_an_exception_before_any_forward():
    def loop(model: Any, context: Context) -> None:
        with contextlib.suppress(RuntimeError), context(model):
            raise RuntimeError
        for batch in images():
            loss_of(model, batch).backward()

    check(tiny, loop)


def test_the_model_is_as_before_after_the_context():
    model, exact = tiny(), tiny()
    keys, classes = list(model.state_dict()), [type(module).__name__ for module in model.modules()]

    with pytest.raises(RuntimeError), standardize_once(model):
        loss_of(model, images()[0]).backward()
        raise RuntimeError

    assert list(model.state_dict()) == keys
    assert [type(module).__name__ for module in model.modules()] == classes
    for both in (model, exact):
        both.zero_grad()
        optimizer = torch.optim.SGD(both.parameters(), lr=0.1)
        for batch in images():
            loss_of(both, batch).backward()
            optimizer.step()
    assert_near(gradients(model), gradients(exact))
    assert_near(model.state_dict(), exact.state_dict())


# Contexts in contexts, and one after the other


@pytest.mark.parametrize(
    "outer, inner",
    [(slice(None), slice(None)), (slice(None), slice(2, 5)), (slice(2, 5), slice(None)), (slice(0, 4), slice(2, 7))],
    ids=["same", "submodule inside", "submodule outside", "overlap"],
)
def test_nesting(outer, inner):
    def loop(model: Any, context: Context) -> Any:
        # Slices of a Sequential share its layers
        whole, part = (model if s == slice(None) else model[s] for s in (outer, inner))
        first, second, third = images()
        with context(whole):
            loss_of(model, first).backward()
            with context(part):
                loss_of(model, second).backward()
                loss_of(model, second).backward()
            after_inner = gradients(part)
            loss_of(model, third).backward()
        return after_inner, gradients(model)

    check(tiny, loop)


def test_an_exception_through_the_inner_of_two():
    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        with context(model):
            loss_of(model, first).backward()
            with pytest.raises(RuntimeError), context(model[2:5]):
                loss_of(model, second).backward()
                raise RuntimeError
            after_inner = gradients(model[2:5])
            loss_of(model, third).backward()
        return after_inner

    check(tiny, loop)


def test_two_models_in_turn():
    def loop(both: Any, context: Context) -> None:
        with context(both[0]), context(both[1]):
            for batch in images():
                (loss_of(both[0], batch) + loss_of(both[1], batch)).backward()
                loss_of(both[1], batch).backward()

    check(lambda: nn.ModuleList([tiny(), tiny("paper")]), loop)


def test_accumulation_across_contexts():
    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        loss_of(model, first).backward()
        steps = []
        for batch in (second, third):
            with context(model):
                loss_of(model, batch).backward()
                loss_of(model, first).backward()
            steps.append(gradients(model))
        loss_of(model, first).backward()
        return steps

    check(tiny, loop)


# Zeroing


def zero_nothing(model: Any) -> None:
    pass


ZEROS: dict[str, Callable[[Any], None]] = {
    "to None": lambda model: model.zero_grad(set_to_none=True),
    "to zero": lambda model: model.zero_grad(set_to_none=False),
    "by the optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=1.0).zero_grad(),
    "one": lambda model: setattr(raw_weight(model[3]), "grad", None),
}


@pytest.mark.parametrize("zero", ZEROS.values(), ids=ZEROS)
@pytest.mark.parametrize("place", ["before", "at the start", "in the middle", "between backwards of one", "at the end"])
@pytest.mark.parametrize("are_there_gradients", [False, True], ids=["from nothing", "from gradients"])
def test_zeroing(place, zero, are_there_gradients):
    def at(where: str) -> Callable[[Any], None]:
        return zero if where == place else zero_nothing

    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        if are_there_gradients:
            loss_of(model, first).backward()
        at("before")(model)
        with context(model):
            at("at the start")(model)
            loss_of(model, second).backward()
            at("in the middle")(model)
            loss = loss_of(model, third)
            loss.backward(retain_graph=True)
            at("between backwards of one")(model)
            loss.backward()
            at("at the end")(model)
        return gradients(model)

    check(tiny, loop)


def test_zeroing_between_two_contexts():
    def loop(model: Any, context: Context) -> Any:
        steps = []
        for batch in images():
            model.zero_grad()
            with context(model):
                loss_of(model, batch).backward()
                loss_of(model, batch + 1).backward()
            steps.append(gradients(model))
        return steps

    check(tiny, loop)
