"""Without gradients a standardized weight is computed once, held, and computed again when the raw weight has changed.

What it must equal is ``standardize_weight`` of the raw weight, to the last bit.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_once_changes import CHANGES, load, scale
from test_once_gradients import KINDS, formulas, images, loss_of, of_kind, tiny
from torch import nn
from torch.testing import assert_close

from ws_algorithm import apply_weight_standardization, standardize_once, standardize_weight
from ws_algorithm.parametrization import raw_weight

CONVOLUTIONS = (0, 3, 6)
modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


def assert_right(conv: Any) -> None:
    """Twice: the first may be computed, the second held."""
    formula = conv.parametrizations["weight"][0].formula
    for _ in range(2):
        with torch.no_grad():
            assert_close(conv.weight, standardize_weight(raw_weight(conv), formula), rtol=1e-6, atol=1e-6)


def address(conv: Any, mode: Callable[[], Any] = torch.no_grad) -> int:
    with mode():
        return conv.weight.data_ptr()


@modes
@formulas
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_held(kind, formula, mode):
    conv = of_kind(kind, formula, torch.float32)[0]

    with mode():
        first, second = conv.weight, conv.weight
    with mode():
        third = conv.weight

    assert first.data_ptr() == second.data_ptr() == third.data_ptr()
    assert_close(first.clone(), standardize_weight(raw_weight(conv), formula), rtol=1e-6, atol=1e-6)
    assert not first.requires_grad


@modes
def test_it_is_held_through_forwards(mode):
    model = tiny().eval()
    with mode():
        before = [model[index].weight.data_ptr() for index in CONVOLUTIONS]
        outputs = [model(batch) for batch in images()]
        after = [model[index].weight.data_ptr() for index in CONVOLUTIONS]

    assert before == after and len(set(after)) == 3
    with torch.no_grad():
        assert_close([model(batch) for batch in images()], [output.clone() for output in outputs])


@modes
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
def test_it_follows_a_change(change, mode, is_training):
    model = tiny().train(is_training)
    with mode():
        held = model[3].weight.clone()

    change(model)

    with mode():
        weight = model[3].weight.clone()
        again = model[3].weight.clone()
    expected = standardize_weight(raw_weight(model[3])).detach()
    assert_close(weight, expected)
    assert torch.equal(again, weight)
    # What scales a weight and shifts it changes its standardized value by rounding
    assert change.__name__ in ("scale", "swap", "change_all") or not torch.allclose(weight, held)


@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.double(),
        lambda model: model.bfloat16(),
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: model.to("meta").to_empty(device="cpu").load_state_dict(tiny("bit", torch.float32).state_dict()),
        lambda model: model.share_memory(),
    ],
    ids=["double", "bfloat16", "channels_last", "meta and back", "shared"],
)
@modes
def test_it_follows_a_conversion(convert, mode):
    model = tiny(dtype=torch.float32)
    with mode():
        model(images(torch.float32)[0])

    convert(model)

    for index in CONVOLUTIONS:
        raw = raw_weight(model[index])
        with mode():
            weight = model[index].weight
            assert weight.dtype == raw.dtype and weight.stride() == raw.stride()
            assert_close(weight.clone(), standardize_weight(raw))


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


@pytest.mark.parametrize(
    "edit",
    [
        lambda weight: weight.mul_(0),
        lambda weight: nn.init.ones_(weight),
        lambda weight: weight.copy_(torch.zeros_like(weight)),
        lambda weight: weight[0].fill_(9.0),
        lambda weight: weight.t_() if weight.ndim == 2 else weight.transpose_(2, 3).neg_(),
    ],
    ids=["mul_", "ones_", "copy_", "row", "transpose_"],
)
def test_it_is_right_again_after_it_was_written_to(edit):
    model = tiny()
    with torch.no_grad():
        expected, outputs = model[3].weight.clone(), model(images()[0])

        edit(model[3].weight)

        assert torch.equal(model[3].weight, expected)
        assert torch.equal(model(images()[0]), outputs)
    assert_right(model[3])


def test_autocast():
    model = tiny(dtype=torch.float32)
    full = standardize_weight(raw_weight(model[0])).detach()
    reduced = full.to(torch.bfloat16)

    with torch.no_grad():
        for _ in range(2):
            assert model[0].weight.dtype == torch.float32
            assert_close(model[0].weight, full)
            with torch.autocast("cpu", torch.bfloat16):
                first, second = model[0].weight, model[0].weight
                assert first.dtype == torch.bfloat16 and first.data_ptr() == second.data_ptr()
                assert_close(first, reduced)
                with torch.autocast("cpu", enabled=False):
                    assert model[0].weight.dtype == torch.float32
            assert_close(model[0].weight, full)


@modes
def test_the_outputs_under_autocast(mode):
    model = tiny(dtype=torch.float32)
    batch = images(torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(batch)  # with gradients: in the path of training
        with mode():
            outputs = [model(batch).clone() for _ in range(2)]

    assert all(output.dtype == expected.dtype for output in outputs)
    assert torch.equal(*outputs)
    assert_close(outputs[0], expected.detach())


def test_autocast_leaves_float64_alone():
    model = tiny()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model[0].weight.dtype == torch.float64


def test_a_change_under_autocast():
    model = tiny(dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        held = model[3].weight
        load(model)
        weight = model[3].weight
        assert weight.dtype == torch.bfloat16 and not torch.equal(weight, held)
        assert_close(weight, standardize_weight(raw_weight(model[3])).bfloat16())
    assert_right(model[3])


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


def test_copies_hold_weights_of_their_own():
    model = tiny()
    with torch.no_grad():
        model(images()[0])
    copied = copy.deepcopy(model)

    assert address(copied[3]) != address(model[3])
    scale(copied)
    with torch.no_grad():
        raw_weight(copied[0]).add_(1.0 + torch.arange(3.0, dtype=torch.float64).view(1, 3, 1, 1))
    for network in (model, copied):
        for index in CONVOLUTIONS:
            assert_right(network[index])


def test_tied_weights_of_different_formulas():
    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    first.weight = second.weight
    apply_weight_standardization(first, formula="composer")
    apply_weight_standardization(second, formula="paper")

    assert_right(first)
    assert_right(second)
    with torch.no_grad():
        assert not torch.allclose(first.weight, second.weight, rtol=1e-3)  # n - 1 of 27 instead of n
        raw_weight(first).add_(torch.arange(3.0).view(1, 3, 1, 1))
    assert_right(first)
    assert_right(second)


def test_nothing_held_is_in_the_state_dict():
    model, fresh = tiny(), tiny()
    with torch.no_grad():
        model(images()[0])

    assert list(model.state_dict()) == list(fresh.state_dict())
    assert [name for name, _ in model.named_buffers()] == []
    assert [name for name, _ in model.named_modules()] == [name for name, _ in fresh.named_modules()]


# Any order of events

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
