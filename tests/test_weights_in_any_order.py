"""Weights are right after evaluation, training, edits, copies and scopes of ``standardize_once`` in any order.

Edits that PyTorch does not count come outside scopes only; those that are open end before.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from cached_weights import assert_right
from exact_twins import CONVOLUTIONS, images, loss_of, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from ws_algorithm import standardize_once, standardize_weight
from ws_algorithm.parametrization import raw_weight

EVENTS: dict[str, Callable[[Any], Any]] = {}


def event(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    EVENTS[function.__name__] = function
    return function


class Player:
    """A model and the scopes that are open, of which some may be those of models that it was copied from."""

    def __init__(self) -> None:
        self.model = tiny(dtype=torch.float32)
        self.opened: list[AbstractContextManager[None]] = []

    def play(self, name: str) -> None:
        EVENTS[name](self)

    def close_all(self) -> None:
        while self.opened:
            close_scope(self)


@event
def open_scope(player: Player) -> None:
    player.opened.append(standardize_once(player.model))
    player.opened[-1].__enter__()


@event
def open_scope_of_a_part(player: Player) -> None:
    player.opened.append(standardize_once(player.model[2:5]))
    player.opened[-1].__enter__()


@event
def close_scope(player: Player) -> None:
    if player.opened:
        player.opened.pop().__exit__(None, None, None)


@event
@torch.no_grad()
def edit_raw(player: Player) -> None:
    raw_weight(player.model[3]).add_(torch.linspace(-1, 1, 3).view(1, 1, 1, 3))


@event
def edit_few_elements_of_data(player: Player) -> None:
    player.close_all()
    raw_weight(player.model[3]).data.view(-1)[1:9] += torch.linspace(-0.5, 0.7, 8)


@event
def step_through_data(player: Player) -> None:
    """As an optimizer of old does."""
    player.close_all()
    for parameter in player.model.parameters():
        if parameter.grad is not None:
            parameter.data.add_(parameter.grad, alpha=-0.1)


@event
def step(player: Player) -> None:
    torch.optim.SGD(player.model.parameters(), lr=0.1).step()


@event
def evaluate(player: Player) -> None:
    with torch.no_grad():
        player.model(images(torch.float32)[0])


@event
def evaluate_in_inference_mode(player: Player) -> None:
    with torch.inference_mode():
        player.model(images(torch.float32)[0])


@event
def evaluate_under_autocast(player: Player) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        player.model(images(torch.float32)[0])


@event
def train_once(player: Player) -> None:
    player.model.zero_grad()
    with standardize_once(player.model):
        for batch in images(torch.float32, count=2):
            loss_of(player.model, batch).backward()


@event
def train_exactly(player: Player) -> None:
    loss_of(player.model, images(torch.float32)[0]).backward()


@event
def train_once_with_a_step_inside(player: Player) -> None:
    with standardize_once(player.model):
        loss_of(player.model, images(torch.float32)[0]).backward()
        step(player)
        loss_of(player.model, images(torch.float32)[1]).backward()


@event
def round_trip(player: Player) -> None:
    player.model.load_state_dict(tiny(dtype=torch.float32).state_dict())


@event
def load_scaled(player: Player) -> None:
    state_dict = {name: value + 0.1 * torch.sign(value) for name, value in player.model.state_dict().items()}
    player.model.load_state_dict(state_dict)


@event
def copy_deeply(player: Player) -> None:
    player.model = copy.deepcopy(player.model)


@event
def train_mode(player: Player) -> None:
    player.model.train()


@event
def eval_mode(player: Player) -> None:
    player.model.eval()


@event
def freeze_or_thaw(player: Player) -> None:
    raw = raw_weight(player.model[3])
    raw.requires_grad_(not raw.requires_grad)


@event
@torch.no_grad()
def write_to_the_standardized_weight(player: Player) -> None:
    player.model[3].weight.mul_(0)


orders = given(st.lists(st.sampled_from(sorted(EVENTS)), min_size=1, max_size=10))


def test_there_are_events():
    assert len(EVENTS) == 20


@orders
def test_any_order_of_events_seen_by_training(names):
    player = Player()

    for name in names:
        player.play(name)
        for index in CONVOLUTIONS:
            conv, expected = player.model[index], standardize_weight(raw_weight(player.model[index]))
            assert_close(conv.weight, expected)
            if raw_weight(conv).requires_grad:
                weight = conv.weight
                assert weight.requires_grad
    player.close_all()


@orders
def test_any_order_of_events_seen_by_evaluation(names):
    player = Player()

    for name in names:
        player.play(name)
        for index in CONVOLUTIONS:
            assert_right(player.model[index])
    player.close_all()


@orders
def test_evaluation_outside_after_any_order_of_events(names):
    """With no read in between but those of the events."""
    player = Player()

    for name in names:
        player.play(name)
    player.close_all()

    for index in CONVOLUTIONS:
        assert_right(player.model[index])


@orders
def test_gradients_after_any_order_of_events(names):
    """As those of a model that is given the same raw weights and has seen nothing."""
    player = Player()
    for name in names:
        player.play(name)
    player.close_all()
    model = player.model.requires_grad_(True)
    model.zero_grad()
    fresh = tiny(dtype=torch.float32)
    fresh.load_state_dict(model.state_dict())

    for network in (model, fresh):
        loss_of(network, images(torch.float32)[2]).backward()

    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
