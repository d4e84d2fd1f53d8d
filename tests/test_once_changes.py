"""Weights that change inside ``standardize_once``, in every way that PyTorch counts, and between two in every way.

As ``exact_twins`` says, every loop runs with the context and without.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact_twins import Context, assert_near, check, formulas, gradients, images, loss_of, tiny
from weight_changes import COUNTED, add, changes, counted_changes, replace_data, replace_parameter, scale

from ws_algorithm import remove_weight_standardization, standardize_once, standardize_weight
from ws_algorithm.parametrization import raw_weight


@counted_changes
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
    """Weights are standardized when the first is asked for, so that averages may be put in their place before."""

    def loop(model: Any, context: Context) -> Any:
        with context(model):
            change(model)
            for batch in images():
                loss_of(model, batch).backward()
        return model.state_dict()

    check(tiny, loop)


@counted_changes
def test_a_change_after_the_last_micro_batch(change):
    def loop(model: Any, context: Context) -> Any:
        old = raw_weight(model[3])
        with context(model):
            for batch in images():
                loss_of(model, batch).backward()
            change(model)
        return old.grad, model.state_dict()

    check(tiny, loop)


@counted_changes
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
@pytest.mark.parametrize("change", [scale, add, replace_parameter, replace_data])
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

    check(lambda: tiny(dtype=torch.float32), loop, tolerance=2e-6)  # the old weight is rebuilt from what is cached


def test_a_change_by_a_forward_hook():
    """Before every forward, as ``spectral_norm`` of old and clipping of weights do."""

    def loop(model: Any, context: Context) -> None:
        model[3].register_forward_pre_hook(lambda layer, inputs: scale(model))
        with context(model):
            for batch in images():
                loss_of(model, batch).backward()

    check(tiny, loop)


def test_the_value_inside_follows_every_change_that_is_counted():
    model = tiny()

    with standardize_once(model):
        for change in COUNTED:
            loss_of(model, images()[0]).backward()
            change(model)
            for _ in range(2):
                assert_near(model[3].weight.detach(), standardize_weight(raw_weight(model[3])).detach())
                with torch.no_grad():
                    assert_near(model[3].weight, standardize_weight(raw_weight(model[3])))


def test_a_standardized_weight_that_is_written_to_inside():
    """Without gradients, what is written into the value that is cached is no change of the weight."""

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
