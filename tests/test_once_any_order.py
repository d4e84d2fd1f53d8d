"""Events inside ``standardize_once`` in any order.

As ``exact_twins`` says, every loop runs with the context and without.
"""

from typing import Any

import pytest
import torch
from exact_twins import Context, exactly, gradients, images, loss_of, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weight_changes import add, replace_data, replace_parameter

from ws_algorithm import standardize_once
from ws_algorithm.parametrization import raw_weight


class Player:
    """Plays events on a model, the same with contexts and without."""

    def __init__(self, context: Context) -> None:
        self.model = tiny()
        self.context = context
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.5)
        self.opened: list[Any] = []
        self.losses: list[Tensor] = []  # whose backward is still to come
        self.hooks: list[Any] = []
        self.count = 0
        self.seen: list[Any] = []

    def batch(self) -> Tensor:
        self.count += 1
        return images()[self.count % 3]

    def open(self) -> None:
        self.opened.append(self.context(self.model))
        self.opened[-1].__enter__()

    def open_part(self) -> None:
        self.opened.append(self.context(self.model[2:5]))
        self.opened[-1].__enter__()

    def close(self) -> None:
        if self.opened:
            self.opened.pop().__exit__(None, None, None)
        if not self.opened:
            self.seen.append(gradients(self.model))

    def finish(self) -> None:
        for _ in [*self.opened, None]:
            self.close()

    def forward(self) -> None:
        self.losses.append(loss_of(self.model, self.batch()))

    def forward_of_the_start(self) -> None:
        self.losses.append(self.model[:3](self.batch()).square().mean())

    def backward(self) -> None:
        if self.losses:
            self.losses.pop().backward()

    def backward_that_keeps_the_graph(self) -> None:
        if self.losses:
            self.losses[0].backward(retain_graph=True)

    def micro_batch(self) -> None:
        loss_of(self.model, self.batch()).backward()

    def backward_of_all(self) -> None:
        if self.losses:
            torch.stack(self.losses).sum().backward()
        self.losses = []

    def micro_batch_with_penalty(self) -> None:
        (loss_of(self.model, self.batch()) + raw_weight(self.model[3]).square().sum()).backward()

    def penalty(self) -> None:
        raw_weight(self.model[3]).square().sum().backward()

    def ask(self) -> None:
        raws = [raw_weight(self.model[0]), raw_weight(self.model[6])]
        self.seen.append(list(torch.autograd.grad(loss_of(self.model, self.batch()), raws)))

    def evaluate(self) -> None:
        with torch.no_grad():
            self.seen.append(self.model(self.batch()))

    def zero_to_none(self) -> None:
        self.model.zero_grad()

    def zero_to_zero(self) -> None:
        self.model.zero_grad(set_to_none=False)

    def halve_gradients(self) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)

    def edit(self) -> None:
        self.losses = []  # autograd refuses to go back through a weight that was edited
        add(self.model)

    def step(self) -> None:
        self.losses = []
        self.optimizer.step()

    def replace(self) -> None:
        replace_parameter(self.model)

    def replace_memory(self) -> None:
        self.losses = []  # autograd would go back through the new values
        replace_data(self.model)

    def hook(self) -> None:
        self.hooks.append(raw_weight(self.model[3]).register_hook(lambda gradient: gradient.clamp(-0.01, 0.01)))

    def unhook(self) -> None:
        if self.hooks:
            self.hooks.pop().remove()

    def fail(self) -> None:
        hidden = self.model[:2](self.batch())
        hidden.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            self.model[2:](hidden).square().mean().backward()
        self.model.zero_grad()  # how far a backward came depends on the order of operations in the graph


EVENTS = [name for name in vars(Player) if not name.startswith("_") and name not in ("batch", "finish")]


@settings(max_examples=150)
@given(st.lists(st.sampled_from(EVENTS), min_size=2, max_size=14))
def test_any_order_of_events_inside(names):
    exact, once = Player(exactly), Player(standardize_once)
    for player in (exact, once):
        player.open()
        for name in names:
            getattr(player, name)()
        player.finish()

    scale_of_all = max([1e-3, *(value.abs().max() for value in exact.model.state_dict().values())])
    for one, other in zip(flat(once.seen), flat(exact.seen), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10 * float(scale_of_all))


def flat(seen: Any) -> list[Any]:
    if isinstance(seen, dict):
        seen = list(seen.values())
    return [item for entry in seen for item in flat(entry)] if isinstance(seen, list) else [seen]
