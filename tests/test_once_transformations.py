"""``standardize_once`` of models that are checkpointed, cast, compiled, traced or called with other parameters.

As ``exact_twins`` says, every loop runs with the context and without.
"""

from typing import Any

import pytest
import torch
from exact_twins import Context, check, exactly, gradients, images, loss_of, tiny
from torch import Tensor
from torch.utils.checkpoint import CheckpointError, checkpoint

from ws_algorithm import standardize_once
from ws_algorithm.parametrization import raw_weight

# Checkpoints, precision


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("is_after_the_context", [False, True])
def test_activation_checkpointing(use_reentrant, is_after_the_context):
    def loop(model: Any, context: Context) -> None:
        late = []
        with context(model):
            for batch in images():
                hidden: Any = checkpoint(model[:4], batch.requires_grad_(), use_reentrant=use_reentrant)
                outputs: Any = checkpoint(model[4:], hidden, use_reentrant=use_reentrant)
                loss = outputs.square().mean()
                late.append(loss) if is_after_the_context else loss.backward()
        for loss in late:
            if context is standardize_once and not use_reentrant:
                # torch compares the operations of both forwards, and after the context autograd standardizes
                with pytest.raises(CheckpointError, match="different metadata"):
                    loss.backward()
                return
            loss.backward()

    if use_reentrant or not is_after_the_context:
        check(tiny, loop)
    else:
        loop(tiny(), standardize_once)


def test_autocast():
    """Beside the exact path in bfloat16, whose error against float32 is a measure of what rounding does."""

    def run(context: Context, is_autocast: bool) -> Any:
        model = tiny(dtype=torch.float32)
        with context(model):
            for batch in images(torch.float32):
                with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
                    outputs = model(batch)
                    if context is standardize_once and is_autocast:
                        assert model[0].weight.dtype == torch.bfloat16
                outputs.float().square().mean().backward()
            if context is standardize_once:
                assert model[0].weight.dtype == torch.float32
        return gradients(model)

    full, exact, once = run(exactly, False), run(exactly, True), run(standardize_once, True)

    for name, expected in full.items():
        rounding = (exact[name] - expected).abs().max()
        assert once[name].dtype == torch.float32
        assert (once[name] - expected).abs().max() <= 2 * rounding
        assert (once[name] - exact[name]).abs().max() <= 2**-7 * expected.abs().max()


def test_autocast_in_some_micro_batches():
    def loop(model: Any, context: Context) -> None:
        with context(model):
            for enabled, batch in zip([True, False, True], images(torch.float32), strict=True):
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    outputs = model(batch)
                outputs.float().square().mean().backward()

    check(lambda: tiny(dtype=torch.float32), loop, tolerance=2**-7)


@pytest.mark.parametrize("place", ["inside", "after"])
@pytest.mark.parametrize("is_finite", [True, False], ids=["finite", "overflow"])
def test_a_grad_scaler(place, is_finite):
    def loop(model: Any, context: Context) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.grad_scaler.GradScaler("cpu", init_scale=2.0**10)

        def finish() -> None:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()

        for step in range(2):
            optimizer.zero_grad()
            with context(model):
                for batch in images(torch.float32):
                    factor = float("inf") if step == 1 and not is_finite else 1.0
                    scaler.scale(loss_of(model, batch) * factor).backward()
                if place == "inside":
                    finish()
            if place == "after":
                finish()
        scale = scaler.get_scale()
        if not is_finite:
            model.zero_grad()  # of gradients that are not finite nothing is compared
        return scale, model.state_dict()

    check(lambda: tiny(dtype=torch.float32), loop)


# Compilation and transformations


def test_a_compiled_model():
    torch._dynamo.reset()

    def loop(model: Any, context: Context) -> Any:
        compiled = torch.compile(model, backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            with context(model):
                for batch in images():
                    compiled(batch).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            outputs = [compiled(images()[0])]
            raw_weight(model[0]).add_(1e-2 * torch.arange(3.0).view(1, 3, 1, 1))
            outputs.append(compiled(images()[0]))
        return model.state_dict(), outputs

    check(tiny, loop)
    torch._dynamo.reset()


def test_a_compiled_model_given_to_the_context():
    torch._dynamo.reset()

    def loop(model: Any, context: Context) -> None:
        compiled: Any = torch.compile(model, backend="eager")
        with context(compiled):
            for batch in images():
                compiled(batch).square().mean().backward()

    check(tiny, loop)
    torch._dynamo.reset()


def test_functional_call():
    def loop(model: Any, context: Context) -> Any:
        values = {name: value.detach() * 0.5 + 0.01 for name, value in model.named_parameters()}
        with context(model):
            loss_of(model, images()[0]).backward()

            def loss(parameters: dict[str, Tensor]) -> Tensor:
                return torch.func.functional_call(model, parameters, images()[1]).square().mean()

            functional = torch.func.grad(loss)(values)
            with torch.no_grad():
                outputs = torch.func.functional_call(model, values, images()[1])
            leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
            torch.func.functional_call(model, leaves, images()[2]).square().mean().backward()
            loss_of(model, images()[2]).backward()
        return functional, outputs, {name: leaf.grad for name, leaf in leaves.items()}

    check(tiny, loop)


def test_vmap_over_the_images():
    def loop(model: Any, context: Context) -> Any:
        with context(model):
            loss_of(model, images()[0]).backward()
            outputs = torch.vmap(model)(torch.stack(images()))
            outputs.square().mean().backward()
            with torch.no_grad():
                evaluated = torch.vmap(model)(torch.stack(images()))
        return outputs.detach(), evaluated

    check(tiny, loop)


def test_gradients_of_single_images():
    def loop(model: Any, context: Context) -> Any:
        with context(model):
            loss_of(model, images()[0]).backward()
            parameters = {name: value.detach() for name, value in model.named_parameters()}

            def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
                return torch.func.functional_call(model, values, image[None]).square().mean()

            singles = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images()[1])
            loss_of(model, images()[2]).backward()
        return singles

    check(tiny, loop)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace():
    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        with context(model):
            loss_of(model, first).backward()
            traced: Any = torch.jit.trace(model, second, check_trace=False)
            outputs = [traced(third).detach()]
            loss_of(model, third).backward()
        with torch.no_grad():
            raw_weight(model[0]).add_(1e-2 * torch.arange(3.0).view(1, 3, 1, 1))  # a trace follows the raw weights
            outputs.append(traced(third))
        return outputs

    check(tiny, loop)


class IntoLayers(torch.fx.Tracer):
    """Records what is inside of convolutions as well."""

    def is_leaf_module(self, m: Any, module_qualified_name: str) -> bool:
        return False


@pytest.mark.parametrize("is_held_before", [True, False], ids=["held", "not held"])
@pytest.mark.parametrize("context", [exactly, standardize_once])
def test_a_symbolic_trace_into_convolutions_is_refused_not_wrong(context, is_held_before):
    """A held weight would become a constant of the traced program."""
    model = tiny()
    with context(model), torch.no_grad():
        if is_held_before:
            model(images()[0])
        with pytest.raises(ValueError, match="`weight` must be a tensor, got Proxy"):
            IntoLayers().trace(model)
