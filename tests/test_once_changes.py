"""Weights that change inside ``standardize_once``, in every way in which a weight can change.

As in ``test_once_gradients``, every loop runs with the context and without.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_once_gradients import Context, assert_near, check, exactly, formulas, gradients, images, loss_of, tiny
from torch import Tensor, nn

from ws_algorithm import remove_weight_standardization, standardize_once, standardize_weight
from ws_algorithm.parametrization import raw_weight

RAW_KEY = "3.parametrizations.weight.original"


def other_values(model: Any) -> Tensor:
    """Values for the raw weight of convolution ``3``."""
    raw = raw_weight(model[3])
    generator = torch.Generator().manual_seed(1)
    return (0.3 * torch.randn(raw.shape, generator=generator, dtype=torch.float64) + 0.1).to(raw.dtype)


@torch.no_grad()
def scale(model: Any) -> None:
    raw_weight(model[3]).mul_(0.25)


@torch.no_grad()
def add(model: Any) -> None:
    raw_weight(model[3]).add_(other_values(model))


@torch.no_grad()
def set_one_element(model: Any) -> None:
    raw_weight(model[3])[1, 1, 1, 1] = 0.7


def load(model: Any) -> None:
    model.load_state_dict({**model.state_dict(), RAW_KEY: other_values(model)})


def load_with_assign(model: Any) -> None:
    model.load_state_dict({**model.state_dict(), RAW_KEY: other_values(model)}, assign=True)


def assign_tensor(model: Any) -> None:
    model[3].weight = other_values(model)


def assign_parameter(model: Any) -> None:
    model[3].weight = nn.Parameter(other_values(model))


def replace_parameter(model: Any) -> None:
    model[3].parametrizations.weight.original = nn.Parameter(other_values(model))


def reset(model: Any) -> None:
    torch.manual_seed(2)
    model[3].reset_parameters()


def initialize(model: Any) -> None:
    torch.manual_seed(2)
    nn.init.kaiming_normal_(raw_weight(model[3]))


def add_to_data(model: Any) -> None:
    raw_weight(model[3]).data.add_(other_values(model))


def replace_data(model: Any) -> None:
    raw_weight(model[3]).data = other_values(model)


def write_through_numpy(model: Any) -> None:
    raw_weight(model[3]).detach().numpy()[...] = other_values(model).numpy()


def swap(model: Any) -> None:
    """Twice the same values: the version counter moves, the values stay."""
    with torch.no_grad():
        raw_weight(model[3]).neg_().neg_()


def change_all(model: Any) -> None:
    torch.nn.utils.vector_to_parameters(
        0.5 * torch.nn.utils.parameters_to_vector(model.parameters()).detach() + 0.01, model.parameters()
    )


CHANGES: list[Callable[[Any], None]] = [
    scale,
    add,
    set_one_element,
    load,
    load_with_assign,
    assign_tensor,
    assign_parameter,
    replace_parameter,
    reset,
    initialize,
    add_to_data,
    replace_data,
    write_through_numpy,
    swap,
    change_all,
]
changes = pytest.mark.parametrize("change", CHANGES)


@changes
def test_a_change_between_micro_batches(change):
    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        old = raw_weight(model[3])
        with context(model):
            loss_of(model, first).backward()
            loss_of(model, second).backward()
            change(model)
            loss_of(model, second).backward()
            loss_of(model, third).backward()
        return old.grad, model.state_dict()

    check(tiny, loop)


@changes
def test_a_change_before_the_first_micro_batch(change):
    def loop(model: Any, context: Context) -> Any:
        with context(model):
            change(model)
            for batch in images():
                loss_of(model, batch).backward()
        return model.state_dict()

    check(tiny, loop)


@changes
def test_a_change_after_the_last_micro_batch(change):
    def loop(model: Any, context: Context) -> Any:
        old = raw_weight(model[3])
        with context(model):
            for batch in images():
                loss_of(model, batch).backward()
            change(model)
        return old.grad, model.state_dict()

    check(tiny, loop)


@changes
def test_a_change_in_every_micro_batch_with_evaluation_in_between(change):
    def loop(model: Any, context: Context) -> Any:
        outputs = []
        with context(model):
            for batch in images():
                loss_of(model, batch).backward()
                change(model)
                with torch.no_grad():
                    outputs.append(model(batch))
        return outputs

    check(tiny, loop)


@changes
def test_a_change_between_two_contexts(change):
    def loop(model: Any, context: Context) -> Any:
        steps = []
        for batch in images():
            with context(model):
                loss_of(model, batch).backward()
                loss_of(model, batch + 1).backward()
            steps.append(gradients(model))
            change(model)
        return steps

    check(tiny, loop)


@formulas
@pytest.mark.parametrize("change", [scale, add, assign_parameter, replace_data])
def test_a_change_by_formula(formula, change):
    def loop(model: Any, context: Context) -> None:
        with context(model):
            for batch in images():
                loss_of(model, batch).backward()
                change(model)

    check(lambda: tiny(formula), loop)


def test_a_change_of_one_of_two_micro_batches_in_float32():
    def loop(model: Any, context: Context) -> None:
        first, second, _ = images(torch.float32)
        with context(model):
            loss_of(model, first).backward()
            add(model)
            loss_of(model, second).backward()

    check(lambda: tiny(dtype=torch.float32), loop, tolerance=2e-6)  # the old weight is rebuilt from what is held


def test_a_change_by_a_forward_hook():
    """Before every forward, as ``spectral_norm`` of old and clipping of weights do."""

    def loop(model: Any, context: Context) -> None:
        model[3].register_forward_pre_hook(lambda layer, inputs: scale(model))
        with context(model):
            for batch in images():
                loss_of(model, batch).backward()

    check(tiny, loop)


# Conversions


def converted(conversion: dict[str, Any], start: torch.dtype) -> Callable[[Any, Context], Any]:
    def loop(model: Any, context: Context) -> Any:
        first, second, third = images(start)
        with context(model):
            loss_of(model, first).backward()
            loss_of(model, second).backward()
            model.to(**conversion)
            dtype = raw_weight(model[3]).dtype
            loss_of(model, second.to(dtype)).backward()
            loss_of(model, third.to(dtype)).backward()
        return raw_weight(model[3]).grad

    return loop


@formulas
def test_conversion_to_float64(formula):
    # Half of the micro-batches were in float32
    check(lambda: tiny(formula, torch.float32), converted({"dtype": torch.float64}, torch.float32), tolerance=1e-6)


def test_conversion_to_float32():
    check(tiny, converted({"dtype": torch.float32}, torch.float64))


@formulas
def test_conversion_to_channels_last(formula):
    loop = converted({"memory_format": torch.channels_last}, torch.float64)

    model = check(lambda: tiny(formula), loop)

    assert raw_weight(model[3]).is_contiguous(memory_format=torch.channels_last)


def test_conversion_from_channels_last():
    check(
        lambda: tiny().to(memory_format=torch.channels_last),
        converted({"memory_format": torch.contiguous_format}, torch.float64),
    )


def test_conversion_after_the_last_micro_batch():
    def loop(model: Any, context: Context) -> None:
        with context(model):
            for batch in images(torch.float32):
                loss_of(model, batch).backward()
            model.double()

    check(lambda: tiny(dtype=torch.float32), loop, tolerance=1e-6)  # of gradients in float32


# Optimizers

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
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
        outside, inside = (context, no_context) if is_around else (no_context, context)

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


def no_context(model: Any) -> Any:
    return torch.enable_grad()


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


def test_the_value_inside_follows_every_change():
    model = tiny()

    with standardize_once(model):
        for change in CHANGES:
            loss_of(model, images()[0]).backward()
            change(model)
            for _ in range(2):
                assert_near(model[3].weight.detach(), standardize_weight(raw_weight(model[3])).detach())
                with torch.no_grad():
                    assert_near(model[3].weight, standardize_weight(raw_weight(model[3])))


def test_a_standardized_weight_that_is_written_to_inside():
    """Without gradients, what is written into the value that is held is no change of the weight."""

    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        with context(model):
            loss_of(model, first).backward()
            with torch.no_grad():
                model[3].weight.zero_()
            loss_of(model, second).backward()
            with torch.no_grad():
                model[3].weight.mul_(3)
                outputs = model(third)
        return outputs

    check(tiny, loop)


def test_taking_the_standardization_off_inside():
    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        with context(model):
            loss_of(model, first).backward()
            loss_of(model, second).backward()
            remove_weight_standardization(model)
            loss_of(model, third).backward()
        return model.state_dict()

    check(tiny, loop)


def test_a_layer_that_is_replaced_inside():
    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        old = model[3]
        with context(model):
            loss_of(model, first).backward()
            loss_of(model, second).backward()
            model[3] = copy.deepcopy(old)
            loss_of(model, third).backward()
        return gradients(old)

    check(tiny, loop)


# Any order of events


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
        assign_parameter(self.model)

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
