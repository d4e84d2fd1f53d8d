"""A weight that is held is right after evaluation, training, edits and copies in any order."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from exact_twins import CONVOLUTIONS, images, loss_of, tiny
from held_weights import assert_right
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from ws_algorithm import standardize_once, standardize_weight
from ws_algorithm.parametrization import raw_weight

EVENTS: dict[str, Callable[[Any], Any]] = {}


def event(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    EVENTS[function.__name__] = function
    return function


@event
@torch.no_grad()
def edit_raw(model: Any) -> None:
    raw_weight(model[3]).add_(torch.linspace(-1, 1, 3).view(1, 1, 1, 3))


@event
def step_through_data(model: Any) -> None:
    """As an optimizer of old does."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data.add_(parameter.grad, alpha=-0.1)


@event
def step(model: Any) -> None:
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@event
def evaluate(model: Any) -> None:
    with torch.no_grad():
        model(images(torch.float32)[0])


@event
def evaluate_in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        model(images(torch.float32)[0])


@event
def evaluate_under_autocast(model: Any) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(images(torch.float32)[0])


@event
def train_once(model: Any) -> None:
    model.zero_grad()
    with standardize_once(model):
        for batch in images(torch.float32, count=2):
            loss_of(model, batch).backward()


@event
def train_exactly(model: Any) -> None:
    loss_of(model, images(torch.float32)[0]).backward()


@event
def train_once_with_a_step_inside(model: Any) -> None:
    with standardize_once(model):
        loss_of(model, images(torch.float32)[0]).backward()
        step(model)
        loss_of(model, images(torch.float32)[1]).backward()


@event
def round_trip(model: Any) -> None:
    model.load_state_dict(tiny(dtype=torch.float32).state_dict())


@event
def load_scaled(model: Any) -> None:
    state_dict = {name: value + 0.1 * torch.sign(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state_dict)


@event
def copy_deeply(model: Any) -> Any:
    return copy.deepcopy(model)


@event
def train_mode(model: Any) -> None:
    model.train()


@event
def eval_mode(model: Any) -> None:
    model.eval()


@event
def freeze_or_thaw(model: Any) -> None:
    raw = raw_weight(model[3])
    raw.requires_grad_(not raw.requires_grad)


@event
@torch.no_grad()
def write_to_the_held_weight(model: Any) -> None:
    model[3].weight.mul_(0)


def test_there_are_events():
    assert len(EVENTS) == 16


@given(st.lists(st.sampled_from(sorted(EVENTS)), min_size=1, max_size=8))
def test_any_order_of_events(names):
    model = tiny(dtype=torch.float32)

    for name in names:
        model = EVENTS[name](model) or model
        for index in CONVOLUTIONS:
            conv, expected = model[index], standardize_weight(raw_weight(model[index]))
            assert_close(conv.weight, expected)  # as training sees it
            if raw_weight(conv).requires_grad:
                weight = conv.weight
                assert weight.requires_grad


@given(st.lists(st.sampled_from(sorted(EVENTS)), min_size=1, max_size=8))
def test_any_order_of_events_seen_by_evaluation(names):
    model = tiny(dtype=torch.float32)

    for name in names:
        model = EVENTS[name](model) or model
        for index in CONVOLUTIONS:
            assert_right(model[index])


@given(st.lists(st.sampled_from(sorted(EVENTS)), min_size=1, max_size=8))
def test_gradients_after_any_order_of_events(names):
    """As those of a model that is given the same raw weights and has seen nothing."""
    model = tiny(dtype=torch.float32)
    for name in names:
        model = EVENTS[name](model) or model
    model.requires_grad_(True).zero_grad()
    fresh = tiny(dtype=torch.float32)
    fresh.load_state_dict(model.state_dict())

    for network in (model, fresh):
        loss_of(network, images(torch.float32)[2]).backward()

    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
