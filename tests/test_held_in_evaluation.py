"""Without gradients a standardized weight is computed once, held, and computed again when the raw weight has changed.

What it must equal is ``standardize_weight`` of the raw weight, to the last bit.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_twins import CONVOLUTIONS, KINDS, formulas, images, of_kind, tiny
from gain_and_shift import gain_and_shift
from held_weights import assert_right, modes
from torch import nn
from torch.testing import assert_close
from weight_changes import CHANGES, load, scale

from ws_algorithm import apply_weight_standardization, standardize_weight
from ws_algorithm.parametrization import raw_weight


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
    expected = standardize_weight(raw_weight(conv), formula, **gain_and_shift(conv)).detach()
    assert_close(first.clone(), expected, rtol=1e-6, atol=1e-6)
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


def address(conv: Any, mode: Callable[[], Any] = torch.no_grad) -> int:
    with mode():
        return conv.weight.data_ptr()


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


# Autocast


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
