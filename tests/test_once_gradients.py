"""Inside ``standardize_once`` a loop leaves the gradients that it leaves without, whatever is called and when.

Every test runs one loop twice, with the context and without, on equal models; without it, autograd goes through the
standardization in every backward. Rounding differs: 1e-12 of the largest entry of a gradient in float64, 1e-6 in
float32.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ws_algorithm import FORMULAS, apply_weight_standardization, standardize_once, standardize_weight
from ws_algorithm.parametrization import raw_weight, register_weight_standardizer

SEED = 5
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}

Context = Callable[[nn.Module], contextlib.AbstractContextManager]
Loop = Callable[[Any, Context], Any]

formulas = pytest.mark.parametrize("formula", FORMULAS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def exactly(module: nn.Module) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def tiny(formula: str = "composer", dtype: torch.dtype = torch.float64, standardize: bool = True) -> Any:
    """Convolutions ``0``, ``3`` (of two groups) and ``6``, all standardized; the same weights at every call."""
    torch.manual_seed(SEED)
    body = [nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh()]
    body += [nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.GroupNorm(2, 6), nn.Tanh()]
    model = nn.Sequential(*body, nn.Conv2d(6, 2, 3))
    if standardize:
        apply_weight_standardization(model, formula=formula)
    return model.to(dtype)


def images(dtype: torch.dtype = torch.float64, count: int = 3) -> list[Tensor]:
    """Micro-batches of two images of 8 pixels."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def loss_of(model: Any, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """A copy of the gradient of each parameter."""
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()}


def assert_near(actual: Any, expected: Any, tolerance: float | None = None) -> None:
    """The same structure, with tensors that differ by rounding only; `tolerance` is relative to the largest entry."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor)
        assert (actual.dtype, actual.shape, actual.stride()) == (expected.dtype, expected.shape, expected.stride())
        allowed = TOLERANCES[expected.dtype] if tolerance is None else tolerance
        assert (actual - expected).abs().max() <= allowed * expected.abs().max()
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_near(actual[key], expected[key], tolerance)
    elif isinstance(expected, (list, tuple)):
        for one, other in zip(actual, expected, strict=True):
            assert_near(one, other, tolerance)
    else:
        assert actual == expected


def check(build: Callable[[], Any], loop: Loop, tolerance: float | None = None) -> Any:
    """Run `loop` exactly and in the context, compare gradients and what it returns, and return the latter model."""
    exact, once = build(), build()
    expected, actual = loop(exact, exactly), loop(once, standardize_once)
    assert any(parameter.grad is not None for parameter in exact.parameters()) or expected is not None
    assert_near(gradients(once), gradients(exact), tolerance)
    assert_near(actual, expected, tolerance)
    assert_exact_now(once)
    return once


def assert_exact_now(model: Any) -> None:
    """After the context the weights are those of the raw weights, by plain autograd."""
    for layer in model.modules():
        if hasattr(layer, "parametrizations"):
            raw: Any = raw_weight(layer)
            weight, expected = layer.weight, standardize_weight(raw, layer.parametrizations["weight"][0].formula)
            assert torch.equal(weight, expected)
            if raw.requires_grad:
                gradients_of_raw = [torch.autograd.grad(value.pow(3).sum(), raw)[0] for value in (weight, expected)]
                assert torch.equal(*gradients_of_raw)


KINDS: dict[str, Callable[[], Any]] = {
    "Conv1d": lambda: [nn.Conv1d(4, 6, 3), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv1d(6, 4, 3, bias=False)],
    "Conv2d": lambda: [nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv2d(6, 4, 3, bias=False)],
    "Conv3d": lambda: [nn.Conv3d(4, 6, 3), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv3d(6, 4, (1, 3, 1))],
    "groups": lambda: [nn.Conv2d(4, 8, 3, groups=4), nn.GroupNorm(2, 8), nn.Tanh(), nn.Conv2d(8, 4, 3, groups=2)],
    "sizes": lambda: [nn.Conv2d(4, 70, (1, 3)), nn.GroupNorm(7, 70), nn.Tanh(), nn.Conv2d(70, 3, 1)],
}
LAYOUTS = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}


def of_kind(kind: str, formula: str, dtype: torch.dtype, is_channels_last: bool = False) -> Any:
    torch.manual_seed(SEED)
    model: Any = nn.Sequential(*KINDS[kind]())
    apply_weight_standardization(model, formula=formula)
    if is_channels_last:
        model.to(memory_format=LAYOUTS[raw_weight(model[0]).ndim])
    return model.to(dtype)


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

    def by_hand(weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        rows = rows - rows.sum(1, keepdim=True) / rows.shape[1]
        var = rows.square().sum(1, keepdim=True) / (rows.shape[1] - (1 if rule.unbiased else 0))
        scale = (var + rule.eps).sqrt() if rule.eps_inside_root else var.sqrt() + rule.eps
        return (rows / scale).view_as(weight)

    with standardize_once(model):
        for batch in images():
            loss_of(model, batch).backward()
    parameters = dict(plain.named_parameters())
    for batch in images():
        weights = {f"{name}.weight": by_hand(parameters[f"{name}.weight"]) for name in "036"}
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


# More than one way to a raw weight


def l2(model: Any) -> Tensor:
    return 0.1 * torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum()


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


def test_a_penalty_on_the_standardized_weights():
    def loop(model: Any, context: Context) -> None:
        with context(model):
            for batch in images():
                (loss_of(model, batch) + model[0].weight.pow(3).sum() + model[3].weight.pow(4).mean()).backward()

    check(tiny, loop)


class Pair(nn.Module):
    """Two convolutions of one shape, and one that uses the raw weight of the first as it is."""

    def __init__(self, formulas: tuple[str, str], are_tied: bool, is_plain_shared: bool) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.first, self.second, self.plain = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        if are_tied:
            self.second.weight = self.first.weight
        if is_plain_shared:
            self.plain.weight = self.first.weight
        register_weight_standardizer(self.first, formulas[0])
        register_weight_standardizer(self.second, formulas[1])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) + torch.tanh(self.plain(x))


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


@pytest.mark.parametrize("from_gradients", [False, True])
def test_a_context_without_backward(from_gradients):
    def loop(model: Any, context: Context) -> Any:
        if from_gradients:
            loss_of(model, images()[1]).backward()
        before = [parameter.grad for parameter in model.parameters()]
        with context(model):
            pass
        with context(model):
            loss_of(model, images()[0])
        with context(model), torch.no_grad():
            loss_of(model, images()[0])
        return [parameter.grad is old for parameter, old in zip(model.parameters(), before, strict=True)]

    check(tiny, loop)


def test_evaluation_between_micro_batches():
    def loop(model: Any, context: Context) -> Any:
        outputs = []
        with context(model):
            for batch in images():
                loss_of(model, batch).backward()
                with torch.no_grad():
                    outputs.append(model(batch))
                with torch.inference_mode():
                    outputs.append(model(batch).clone())
        return outputs

    check(tiny, loop)


# Forwards and backwards that do not come in pairs


def test_a_convolution_called_several_times_in_a_forward():
    def build() -> Any:
        torch.manual_seed(SEED)
        model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(3, 3), nn.Tanh())
        apply_weight_standardization(model)
        return model.double()

    def loop(model: Any, context: Context) -> None:
        with context(model):
            for batch in images():
                (model(model(batch)) + model(batch)).square().mean().backward()

    check(build, loop)


def two_forwards_before_one_backward(model: Any, first: Tensor, second: Tensor) -> None:
    (loss_of(model, first) * loss_of(model, second)).backward()


def two_forwards_then_two_backwards(model: Any, first: Tensor, second: Tensor) -> None:
    losses = loss_of(model, first), loss_of(model, second)
    for loss in reversed(losses):
        loss.backward()


def two_backwards_of_a_forward(model: Any, first: Tensor, second: Tensor) -> None:
    loss = loss_of(model, first)
    loss.backward(retain_graph=True)
    loss.backward()


def two_losses_of_a_forward(model: Any, first: Tensor, second: Tensor) -> None:
    outputs = model(first)
    outputs.square().mean().backward(retain_graph=True)
    outputs.sin().sum().backward()


def two_losses_in_one_call(model: Any, first: Tensor, second: Tensor) -> None:
    torch.autograd.backward([loss_of(model, first), loss_of(model, second).exp()])


def a_forward_that_is_dropped(model: Any, first: Tensor, second: Tensor) -> None:
    loss_of(model, first)
    loss_of(model, second).backward()


@pytest.mark.parametrize(
    "pass_through",
    [
        two_forwards_before_one_backward,
        two_forwards_then_two_backwards,
        two_backwards_of_a_forward,
        two_losses_of_a_forward,
        two_losses_in_one_call,
        a_forward_that_is_dropped,
    ],
)
@dtypes
def test_passes(pass_through, dtype):
    def loop(model: Any, context: Context) -> None:
        first, second, third = images(dtype)
        with context(model):
            pass_through(model, first, second)
            pass_through(model, second, third)

    check(lambda: tiny(dtype=dtype), loop)


def test_backward_after_the_context():
    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        with context(model):
            loss_of(model, first).backward()
            late = loss_of(model, second)
        inside = gradients(model)
        late.backward()
        after = gradients(model)
        loss_of(model, third).backward()
        return inside, after

    check(tiny, loop)


def test_only_backward_after_the_context():
    def loop(model: Any, context: Context) -> Any:
        with context(model):
            losses = [loss_of(model, batch) for batch in images()]
        steps = []
        for loss in losses:
            loss.backward(retain_graph=True)
            loss.backward()
            steps.append(gradients(model))
        return steps

    check(tiny, loop)


def test_backward_inside_the_next_context():
    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        with context(model):
            loss_of(model, first).backward()
            late = loss_of(model, second)
        with context(model):
            loss_of(model, third).backward()
            late.backward()
            loss_of(model, first).backward()
        return gradients(model)

    check(tiny, loop)


def test_backward_inside_of_a_graph_from_before():
    def loop(model: Any, context: Context) -> Any:
        first, second, _ = images()
        early = loss_of(model, first)
        with context(model):
            loss_of(model, second).backward()
            early.backward()
        return gradients(model)

    check(tiny, loop)


def test_zeroing_after_the_context_then_backward_of_a_graph_from_inside():
    def loop(model: Any, context: Context) -> Any:
        first, second, _ = images()
        with context(model):
            loss_of(model, first).backward()
            late = loss_of(model, second)
        model.zero_grad()
        late.backward()
        return gradients(model)

    check(tiny, loop)
