"""Inside ``standardize_once`` a loop leaves the gradients that it leaves without, whatever takes part in the loss.

As ``exact_twins`` says, every loop runs with the context and without.
"""

import logging
from typing import Any

import pytest
import torch
from exact_twins import (
    KINDS,
    LAYOUTS,
    SEED,
    Context,
    Pair,
    assert_near,
    check,
    dtypes,
    exactly,
    formulas,
    gradients,
    images,
    l2,
    loss_of,
    of_kind,
    tiny,
)
from gain_and_shift import gain_and_shift
from torch import Tensor, nn

from ws_algorithm import FORMULAS, apply_weight_standardization, standardize_once, standardize_weight
from ws_algorithm.parametrization import raw_weight, register_weight_standardizer


def accumulate(model: Any, context: Context) -> None:
    """Three micro-batches."""
    raw = raw_weight(model[0])
    generator = torch.Generator().manual_seed(SEED)
    with context(model):
        for _ in range(3):
            batch = torch.randn(2, 4, *[6] * (raw.ndim - 2), generator=generator, dtype=torch.float64)
            loss_of(model, batch.to(raw.dtype)).backward()


@formulas
@dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches(kind, dtype, formula):
    check(lambda: of_kind(kind, formula, dtype), accumulate)


@formulas
@dtypes
@pytest.mark.parametrize("kind", ["Conv2d", "Conv3d", "groups"])
def test_the_layout_of_channels_last(kind, dtype, formula):
    model = check(lambda: of_kind(kind, formula, dtype, is_channels_last=True), accumulate)

    raw: Any = raw_weight(model[0])
    layout = LAYOUTS[raw.ndim]
    assert raw.grad.is_contiguous(memory_format=layout)
    with standardize_once(model):
        assert model[0].weight.is_contiguous(memory_format=layout)


@formulas
def test_against_the_formula_written_out(formula):
    """In float64 and in elementary operations, so that the package's own backward takes no part."""
    rule = FORMULAS[formula]
    model, plain = tiny(formula), tiny(standardize=False)

    def by_hand(weight: Tensor, name: str) -> Tensor:
        rows, parts = weight.flatten(1), gain_and_shift(model[int(name)])  # constants, but for the gains of "scaled"
        gain = {None: 1, "affine": parts.get("gain"), "scaled": rows.shape[1] ** -0.5}[rule.rescaling]
        shift = parts.get("shift", 0)
        rows = rows - rows.sum(1, keepdim=True) / rows.shape[1]
        var = rows.square().sum(1, keepdim=True) / (rows.shape[1] - (1 if rule.unbiased else 0))
        scale = (var + rule.eps).sqrt() if rule.eps_inside_root else var.sqrt() + rule.eps
        return gain * (rows / scale).view_as(weight) + shift

    with standardize_once(model):
        for batch in images():
            loss_of(model, batch).backward()
    parameters = dict(plain.named_parameters())
    for batch in images():
        weights = {f"{name}.weight": by_hand(parameters[f"{name}.weight"], name) for name in "036"}
        torch.func.functional_call(plain, weights, batch).square().mean().backward()

    for name in "036":
        # Mean and scale are summed in another order than by the package
        assert_near(raw_weight(model[int(name)]).grad, parameters[f"{name}.weight"].grad, tolerance=1e-10)


def test_the_weight_is_computed_once():
    model = tiny()

    with standardize_once(model):
        weights = [model[0].weight]
        for batch in images():
            loss_of(model, batch).backward()
            weights.append(model[0].weight)

    assert len({weight.data_ptr() for weight in weights}) == 1
    assert torch.equal(weights[0], standardize_weight(raw_weight(model[0])))


def test_a_model_of_one_convolution():
    def build() -> Any:
        torch.manual_seed(SEED)
        conv = nn.Conv2d(3, 4, 3)
        apply_weight_standardization(conv)
        return conv.double()

    def loop(model: Any, context: Context) -> None:
        with context(model):
            for batch in images():
                loss_of(model, batch).backward()

    check(build, loop)


def test_a_model_in_which_nothing_is_standardized(caplog):
    def loop(model: Any, context: Context) -> None:
        with context(model):
            loss_of(model, images()[0]).backward()

    with caplog.at_level(logging.WARNING):
        check(lambda: tiny(standardize=False), loop)

    assert len([record for record in caplog.records if "nothing is standardized" in record.getMessage()]) == 1


@pytest.mark.parametrize("module", [None, torch.zeros(2), [nn.Conv2d(1, 1, 1)]], ids=["None", "tensor", "list"])
def test_what_is_no_module_is_refused(module):
    with pytest.raises(ValueError, match="`m"), standardize_once(module):
        pass


def test_a_gradient_of_the_standardized_weight_that_a_hook_keeps_is_never_added_to():
    def loop(model: Any, context: Context) -> list[Tensor]:
        kept: list[Tensor] = []
        with context(model):
            for batch in images():
                weight = model[0].weight
                weight.register_hook(kept.append)
                outputs = nn.functional.conv2d(batch, weight, model[0].bias, padding=1)
                model[1:](outputs).square().mean().backward()
        return kept

    check(tiny, loop)


def test_a_gradient_that_a_hook_on_a_node_keeps_is_never_added_to():
    def loop(model: Any, context: Context) -> list[Tensor]:
        kept: list[Tensor] = []
        with context(model):
            for batch in images():
                outputs = nn.functional.conv2d(batch, model[0].weight, model[0].bias, padding=1)
                outputs.grad_fn.register_hook(lambda inputs, _: kept.append(inputs[1]))  # type: ignore[union-attr]
                model[1:](outputs).square().mean().backward()
        return kept

    check(tiny, loop)


def test_a_convolution_that_gets_no_gradient_has_none():
    class GivesNone(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> None:
            return None

    def loop(model: Any, context: Context) -> list[bool]:
        with context(model):
            for batch in images():
                hidden: Any = GivesNone.apply(model[:3](batch))
                model[3:](hidden).square().mean().backward()
        return [raw_weight(model[index]).grad is None for index in (0, 3, 6)]

    check(tiny, loop)


# More than one way to a raw weight


@pytest.mark.parametrize("is_separate", [False, True], ids=["in the loss", "by itself"])
@formulas
def test_a_penalty_on_the_raw_weights(is_separate, formula):
    def loop(model: Any, context: Context) -> None:
        with context(model):
            for batch in images():
                if is_separate:
                    loss_of(model, batch).backward()
                    l2(model).backward()
                else:
                    (loss_of(model, batch) + l2(model)).backward()

    check(lambda: tiny(formula), loop)


def test_a_penalty_alone():
    def loop(model: Any, context: Context) -> None:
        with context(model):
            l2(model).backward()

    check(tiny, loop)


@pytest.mark.parametrize("is_before", [True, False], ids=["zero before", "zero inside"])
def test_a_penalty_alone_on_gradients_of_zero(is_before):
    """Gradients of zeros wait from the first forward on, though it is one without gradients."""

    def loop(model: Any, context: Context) -> None:
        loss_of(model, images()[0]).backward()
        if is_before:
            model.zero_grad(set_to_none=False)
        with context(model):
            if not is_before:
                model.zero_grad(set_to_none=False)
            with torch.no_grad():
                model(images()[1])
            l2(model).backward()

    check(tiny, loop)


def test_a_penalty_on_the_standardized_weights():
    def loop(model: Any, context: Context) -> None:
        with context(model):
            for batch in images():
                (loss_of(model, batch) + model[0].weight.pow(3).sum() + model[3].weight.pow(4).mean()).backward()

    check(tiny, loop)


@pytest.mark.parametrize("names", [("composer", "composer"), ("composer", "paper"), ("paper", "timm")], ids="+".join)
@pytest.mark.parametrize("are_tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("is_plain_shared", [False, True], ids=["plain apart", "plain shared"])
def test_a_raw_weight_of_several_layers(names, are_tied, is_plain_shared):
    def loop(model: Any, context: Context) -> None:
        with context(model):
            for batch in images():
                loss_of(model, batch).backward()

    check(lambda: Pair(names, are_tied, is_plain_shared), loop)


def test_a_context_for_one_of_two_tied_convolutions():
    def loop(model: Any, context: Context) -> Any:
        with context(model.first):
            for batch in images():
                loss_of(model, batch).backward()
        return gradients(model)

    check(lambda: Pair(("composer", "paper"), are_tied=True, is_plain_shared=False), loop)


# Parameters without gradients


def test_an_unused_convolution():
    def loop(model: Any, context: Context) -> Any:
        with context(model):
            for batch in images():
                model[0](batch).square().mean().backward()
        return [raw_weight(model[index]).grad is None for index in (0, 3, 6)]

    check(tiny, loop)


@pytest.mark.parametrize("which", [[0], [3], [0, 3, 6]], ids=str)
@pytest.mark.parametrize("from_gradients", [False, True])
def test_a_frozen_convolution(which, from_gradients):
    def loop(model: Any, context: Context) -> None:
        if from_gradients:
            loss_of(model, images()[1]).backward()
        for index in which:
            raw_weight(model[index]).requires_grad_(False)
        with context(model):
            for batch in images():
                loss_of(model, batch).backward()

    check(tiny, loop)


@pytest.mark.parametrize("before, after", [(True, False), (False, True)], ids=["freeze", "thaw"])
def test_freezing_between_micro_batches(before, after):
    def loop(model: Any, context: Context) -> None:
        raw_weight(model[3]).requires_grad_(before)
        with context(model):
            first, second, third = images()
            loss_of(model, first).backward()
            raw_weight(model[3]).requires_grad_(after)
            loss_of(model, second).backward()
            loss_of(model, third).backward()

    check(tiny, loop)


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_a_convolution_used_in_one_micro_batch_only(turn):
    def loop(model: Any, context: Context) -> None:
        with context(model):
            for index, batch in enumerate(images()):
                model[: 7 if index == turn else 3](batch).square().mean().backward()

    check(tiny, loop)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_a_complex_convolution_beside_a_real_one(dtype):
    """Autograd standardizes complex weights."""

    def run(context: Context) -> Any:
        torch.manual_seed(SEED)
        real, imaginary = nn.Conv2d(3, 4, 3, dtype=torch.float64), nn.Conv2d(4, 4, 3, dtype=dtype)
        model = nn.Sequential(real, imaginary)
        for conv in model:
            register_weight_standardizer(conv)
        with context(model):
            for batch in images():
                imaginary(real(batch).to(dtype)).abs().square().mean().backward()
        return gradients(model)

    assert_near(run(standardize_once), run(exactly), tolerance=1e-12 if dtype == torch.complex128 else 1e-6)
