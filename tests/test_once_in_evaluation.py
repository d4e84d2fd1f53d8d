"""Inside ``standardize_once`` a weight is standardized once for all reads without gradients, until it changes.

What it must equal is ``standardize_weight`` of the raw weight.
"""

import copy
from typing import Any

import pytest
import torch
from cached_weights import assert_right, contexts, modes
from exact_twins import CONVOLUTIONS, KINDS, formulas, images, of_kind, tiny
from gain_and_shift import gain_and_shift
from torch import nn
from torch.testing import assert_close
from weight_changes import add, counted_changes, load, scale

from ws_algorithm import (
    apply_weight_standardization,
    release_standardized_weights,
    standardize_once,
    standardize_weight,
)
from ws_algorithm.parametrization import raw_weight


@modes
@formulas
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_computed_once(kind, formula, mode):
    conv = of_kind(kind, formula, torch.float32)[0]

    with standardize_once(conv):
        with mode():
            first, second = conv.weight, conv.weight
        with mode():
            third = conv.weight

    # All are alive, so that what is computed again has another address
    assert first.data_ptr() == second.data_ptr() == third.data_ptr()
    expected = standardize_weight(raw_weight(conv), formula, **gain_and_shift(conv)).detach()
    assert_close(first.clone(), expected, rtol=1e-6, atol=1e-6)
    assert not first.requires_grad


def test_it_is_computed_once_for_both_modes():
    conv = of_kind("Conv2d", "affine", torch.float32)[0]

    with standardize_once(conv):
        with torch.inference_mode():
            first = conv.weight
        with torch.no_grad():
            second = conv.weight

    assert first.data_ptr() == second.data_ptr()
    assert not first.is_inference()  # such a tensor could not be saved for a backward


@modes
def test_it_is_computed_once_for_all_forwards(mode):
    model = tiny().eval()
    with standardize_once(model), mode():
        before = [model[index].weight for index in CONVOLUTIONS]
        outputs = [model(batch) for batch in images()]
        after = [model[index].weight for index in CONVOLUTIONS]

    addresses = [weight.data_ptr() for weight in before]
    assert addresses == [weight.data_ptr() for weight in after] and len(set(addresses)) == 3
    with torch.no_grad():
        assert_close([model(batch) for batch in images()], [output.clone() for output in outputs])


@modes
@counted_changes
@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
def test_it_follows_a_change_that_is_counted(change, mode, is_training):
    model = tiny().train(is_training)
    with standardize_once(model):
        with mode():
            cached = model[3].weight.clone()

        change(model)

        with mode():
            weight = model[3].weight.clone()
            again = model[3].weight.clone()
    expected = standardize_weight(raw_weight(model[3])).detach()
    assert_close(weight, expected)
    assert torch.equal(again, weight)
    # What scales a weight and shifts it changes its standardized value by rounding
    assert change.__name__ in ("scale", "swap", "change_all") or not torch.allclose(weight, cached)


@contexts
@modes
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
def test_it_follows_a_conversion(convert, mode, context):
    model = tiny(dtype=torch.float32)
    with context(model):
        with mode():
            model(images(torch.float32)[0])

        convert(model)

        for index in CONVOLUTIONS:
            raw = raw_weight(model[index])
            for _ in range(2):
                with mode():
                    weight = model[index].weight
                    assert weight.dtype == raw.dtype and weight.stride() == raw.stride()
                    assert_close(weight.clone(), standardize_weight(raw))


@contexts
@modes
@pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "dropped"])
@pytest.mark.parametrize(
    "edit",
    [
        lambda weight: weight.mul_(0),
        lambda weight: nn.init.ones_(weight),
        lambda weight: weight.copy_(torch.zeros_like(weight)),
        lambda weight: weight[0].fill_(9.0),
        lambda weight: weight.transpose_(2, 3).neg_(),
    ],
    ids=["mul_", "ones_", "copy_", "row", "transpose_"],
)
def test_it_is_right_again_after_it_was_written_to(edit, is_kept, mode, context):
    """Though the contract is to read only."""
    model = tiny()
    with context(model), mode():
        expected, outputs = model[3].weight.clone(), model(images()[0])

        written: Any = model[3].weight
        edit(written)
        if not is_kept:
            written = None

        assert torch.equal(model[3].weight, expected)
        assert torch.equal(model(images()[0]), outputs)
    assert_right(model[3])
    assert written is None or not torch.equal(written, expected)


@formulas
def test_one_that_is_rescaled_is_right_again_after_it_was_written_to(formula):
    model = tiny(formula)
    with standardize_once(model), torch.no_grad():
        expected = model[3].weight.clone()

        model[3].weight.mul_(0)

        assert torch.equal(model[3].weight, expected)
        assert_right(model[3])


def replace_the_gain(rescaler: Any) -> None:
    is_parameter = isinstance(rescaler.gain, nn.Parameter)
    rescaler.gain = nn.Parameter(2 * rescaler.gain) if is_parameter else 2 * rescaler.gain


@contexts
@modes
@pytest.mark.parametrize("formula", ["affine", "scaled"])
@pytest.mark.parametrize(
    "change", [lambda rescaler: rescaler.gain.mul_(2), replace_the_gain], ids=["in place", "another tensor"]
)
def test_it_follows_a_change_of_the_gain(change, formula, mode, context):
    model = tiny(formula)
    with context(model):
        with mode():
            before = model[3].weight.clone()

        with torch.no_grad():
            change(model[3].parametrizations["weight"][1])

        with mode():
            assert not torch.allclose(model[3].weight, before)
        assert_right(model[3])


@contexts
def test_copies_hold_weights_of_their_own(context):
    model = tiny()
    with context(model):
        with torch.no_grad():
            model(images()[0])
        copied = copy.deepcopy(model)

        with torch.no_grad():
            first, second, of_original = copied[3].weight, copied[3].weight, model[3].weight
        # Nothing is cached for the copy, which is in no scope
        assert len({first.data_ptr(), second.data_ptr(), of_original.data_ptr()}) == 3
        assert release_standardized_weights(copied) == 0
        scale(copied)
        with torch.no_grad():
            raw_weight(copied[0]).add_(1.0 + torch.arange(3.0, dtype=torch.float64).view(1, 3, 1, 1))
        for network in (model, copied):
            for index in CONVOLUTIONS:
                assert_right(network[index])
        with standardize_once(copied):
            for network in (copied, model):
                for index in CONVOLUTIONS:
                    assert_right(network[index])


@contexts
def test_tied_weights_of_different_formulas(context):
    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    first.weight = second.weight
    apply_weight_standardization(first, formula="composer")
    apply_weight_standardization(second, formula="paper")

    with context(nn.ModuleList([first, second])):
        assert_right(first)
        assert_right(second)
        with torch.no_grad():
            assert not torch.allclose(first.weight, second.weight, rtol=1e-3)  # n - 1 of 27 instead of n
            raw_weight(first).add_(torch.arange(3.0).view(1, 3, 1, 1))
        assert_right(first)
        assert_right(second)


def test_nothing_cached_is_in_the_state_dict():
    model, fresh = tiny(), tiny()

    def assert_fresh() -> None:
        assert list(model.state_dict()) == list(fresh.state_dict())
        assert [name for name, _ in model.named_buffers()] == []
        assert [name for name, _ in model.named_modules()] == [name for name, _ in fresh.named_modules()]

    with standardize_once(model):
        with torch.no_grad():
            model(images()[0])
        assert_fresh()
    assert_fresh()


# Memory from scope to scope; see also `test_once_memory.py`


@modes
@formulas
@pytest.mark.parametrize("is_viewed", [True, False], ids=["a view", "the weight"])
def test_a_weight_that_someone_still_has_keeps_its_values(is_viewed, formula, mode):
    model = tiny(formula)
    with standardize_once(model), mode():
        kept = model[3].weight[1:] if is_viewed else model[3].weight
        values = kept.clone()
        with torch.inference_mode(False):
            add(model)
        assert_right(model[3])
        assert torch.equal(kept, values)
    for _ in range(2):
        add(model)
        with standardize_once(model), mode():
            assert_right(model[3])

    assert torch.equal(kept, values)


@modes
def test_releasing_the_memory_inside_a_scope_leaves_the_weights(mode):
    model = tiny()
    elements = sum(raw_weight(model[index]).numel() + 2 * model[index].out_channels for index in CONVOLUTIONS)
    with standardize_once(model), mode():
        output = model(images()[0])

        # Weights, and mean and scale of each channel, all of 8 bytes; nothing is left to give back after that
        assert release_standardized_weights(model) == 8 * elements
        assert release_standardized_weights(model) == 0

        assert torch.equal(model(images()[0]), output)
        for index in CONVOLUTIONS:
            assert_right(model[index])
        with torch.inference_mode(False):
            add(model)
        assert_right(model[3])


# Autocast


def test_autocast():
    model = tiny(dtype=torch.float32)
    full = standardize_weight(raw_weight(model[0])).detach()
    reduced = full.to(torch.bfloat16)

    with standardize_once(model), torch.no_grad():
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


def test_autocast_outside():
    """The weight is in its own dtype, and autocast converts it in the convolution."""
    model = tiny(dtype=torch.float32)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert model[0].weight.dtype == torch.float32
            assert_close(model[0].weight, standardize_weight(raw_weight(model[0])))


@contexts
@modes
def test_the_outputs_under_autocast(mode, context):
    model = tiny(dtype=torch.float32)
    batch = images(torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(batch)  # with gradients: in the path of training
        with context(model), mode():
            outputs = [model(batch).clone() for _ in range(2)]

    assert all(output.dtype == expected.dtype for output in outputs)
    assert torch.equal(*outputs)
    assert_close(outputs[0], expected.detach())


@contexts
def test_autocast_leaves_float64_alone(context):
    model = tiny()
    with context(model), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model[0].weight.dtype == torch.float64


def test_a_change_under_autocast():
    model = tiny(dtype=torch.float32)
    with standardize_once(model):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            cached = model[3].weight
            load(model)
            weight = model[3].weight
            assert weight.dtype == torch.bfloat16 and not torch.equal(weight, cached)
            assert_close(weight, standardize_weight(raw_weight(model[3])).bfloat16())
        assert_right(model[3])
