"""``standardize_once`` with the rest of autograd: ``torch.autograd.grad``, hooks, checkpoints, autocast, compilation.

As in ``test_once_gradients``, every loop runs with the context and without.
"""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from test_once_gradients import Context, assert_near, check, exactly, formulas, gradients, images, l2, loss_of, tiny
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from ws_algorithm import standardize_once, standardize_weight
from ws_algorithm.parametrization import raw_weight

CONVOLUTIONS = (0, 3, 6)


def raw_weights(model: Any) -> list[nn.Parameter]:
    return [raw_weight(model[index]) for index in CONVOLUTIONS]


# torch.autograd.grad


@pytest.mark.parametrize("is_between_backwards", [False, True])
@formulas
def test_gradients_that_are_asked_for(formula, is_between_backwards):
    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        with context(model):
            if is_between_backwards:
                loss_of(model, first).backward()
            asked = list(torch.autograd.grad(loss_of(model, second), raw_weights(model)))
            asked += torch.autograd.grad(loss_of(model, second), list(model.parameters()))
            asked += torch.autograd.grad(loss_of(model, third) + l2(model), raw_weight(model[3]))
            if is_between_backwards:
                loss_of(model, third).backward()
        return asked

    check(lambda: tiny(formula), loop)


def test_a_gradient_that_is_asked_for_after_the_context():
    def loop(model: Any, context: Context) -> Any:
        first, second, _ = images()
        with context(model):
            loss_of(model, first).backward()
            late = loss_of(model, second)
        return list(torch.autograd.grad(late, raw_weights(model)))

    check(tiny, loop)


def test_no_gradient_for_a_raw_weight_that_took_no_part():
    def loop(model: Any, context: Context) -> Any:
        with context(model):
            hidden = model[:3](images()[0]).square().mean()
            with pytest.raises(RuntimeError, match="unused|not have been used"):
                torch.autograd.grad(hidden, raw_weights(model), retain_graph=True)
            return list(torch.autograd.grad(hidden, raw_weights(model), allow_unused=True))

    check(tiny, loop)


def test_the_gradient_of_the_images():
    def loop(model: Any, context: Context) -> Any:
        batch = images()[0].requires_grad_()
        with context(model):
            loss_of(model, images()[1]).backward()
            (asked,) = torch.autograd.grad(loss_of(model, batch), batch)
            loss_of(model, batch).backward()
        return asked, batch.grad

    check(tiny, loop)


def test_backward_into_some_parameters_only():
    def loop(model: Any, context: Context) -> None:
        with context(model):
            for batch in images():
                loss_of(model, batch).backward(inputs=[raw_weight(model[0]), model[6].bias])

    check(tiny, loop)


@formulas
def test_a_penalty_on_the_gradients_of_the_raw_weights(formula):
    def loop(model: Any, context: Context) -> None:
        with context(model):
            for batch in images():
                loss = loss_of(model, batch)
                asked = torch.autograd.grad(loss, raw_weights(model), create_graph=True)
                (loss + torch.stack([gradient.square().sum() for gradient in asked]).sum()).backward()

    check(lambda: tiny(formula), loop, tolerance=1e-11)  # second derivatives take more roundings


@formulas
def test_a_penalty_on_the_gradients_of_the_images(formula):
    def loop(model: Any, context: Context) -> None:
        with context(model):
            for batch in images():
                batch.requires_grad_()
                loss = loss_of(model, batch)
                (asked,) = torch.autograd.grad(loss, batch, create_graph=True)
                (loss + asked.square().sum()).backward()

    check(lambda: tiny(formula), loop, tolerance=1e-11)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_backward_that_creates_a_graph():
    def loop(model: Any, context: Context) -> Any:
        with context(model):
            for batch in images():
                loss_of(model, batch).backward(create_graph=True)
        accumulated = gradients(model)
        for parameter in model.parameters():
            parameter.grad = None
        return accumulated

    check(tiny, loop)


# Hooks on raw weights


def clamp(gradient: Tensor) -> Tensor:
    return gradient.clamp(-1e-3, 1e-3)


@pytest.mark.parametrize("place", ["before", "at the start", "in the middle"])
@pytest.mark.parametrize("indices", [[3], [0, 3, 6]], ids=str)
def test_a_hook_that_clamps(place, indices):
    def loop(model: Any, context: Context) -> None:
        def hook_at(where: str) -> None:
            if where == place:
                for index in indices:
                    raw_weight(model[index]).register_hook(clamp)

        first, second, third = images()
        hook_at("before")
        with context(model):
            hook_at("at the start")
            loss_of(model, first).backward()
            hook_at("in the middle")
            loss_of(model, second).backward()
            loss_of(model, third).backward()

    model = check(tiny, loop)
    without = tiny()
    for batch in images():
        loss_of(without, batch).backward()
    clamped, free = raw_weight(model[3]).grad, raw_weight(without[3]).grad
    assert clamped is not None and free is not None and not torch.allclose(clamped, free)


def test_a_hook_that_is_removed_in_the_middle():
    def loop(model: Any, context: Context) -> None:
        first, second, third = images()
        handle = raw_weight(model[3]).register_hook(clamp)
        with context(model):
            loss_of(model, first).backward()
            loss_of(model, second).backward()
            handle.remove()
            loss_of(model, third).backward()

    check(tiny, loop)


def test_a_hook_sees_the_gradient_of_each_backward():
    def loop(model: Any, context: Context) -> Any:
        seen: list[Tensor] = []
        raw_weight(model[3]).register_hook(lambda gradient: seen.append(gradient.clone()))
        with context(model):
            for batch in images():
                loss_of(model, batch).backward()
        return seen

    check(tiny, loop)


def test_a_hook_after_accumulation_sees_the_true_gradient():
    def loop(model: Any, context: Context) -> Any:
        seen: list[Any] = []
        raw_weight(model[3]).register_post_accumulate_grad_hook(lambda raw: seen.append(raw.grad.clone()))
        with context(model):
            for batch in images():
                loss_of(model, batch).backward()
        return seen

    check(tiny, loop)


@pytest.mark.parametrize("is_registered_inside", [False, True])
def test_an_optimizer_in_the_backward(is_registered_inside):
    """A hook that makes the step of each parameter as soon as its gradient is there, and frees it."""

    def step(raw: Any) -> None:
        with torch.no_grad():
            raw.sub_(0.1 * raw.grad)
        raw.grad = None

    def loop(model: Any, context: Context) -> Any:
        def register() -> None:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(step)

        if not is_registered_inside:
            register()
        with context(model):
            if is_registered_inside:
                register()
            for batch in images():
                loss_of(model, batch).backward()
        return model.state_dict()

    check(tiny, loop)


def test_hooks_on_layers_and_activations():
    def loop(model: Any, context: Context) -> Any:
        seen: list[Tensor] = []
        model[3].register_full_backward_hook(lambda layer, inputs, outputs: seen.append(inputs[0].clone()))
        model[0].register_forward_hook(lambda layer, inputs, output: 2 * output)
        with context(model):
            for batch in images():
                loss_of(model, batch).backward()
        return seen

    check(tiny, loop)


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


# Copies


def test_a_deep_copy():
    def loop(model: Any, context: Context) -> Any:
        first, second, third = images()
        with context(model):
            loss_of(model, first).backward()
            copied = copy.deepcopy(model)
            loss_of(model, second).backward()
            loss_of(copied, third).backward()
            inside = gradients(copied)
            with torch.no_grad():
                raw_weight(copied[0]).mul_(torch.arange(1.0, 4.0).view(1, 3, 1, 1))
            assert torch.equal(copied[0].weight, standardize_weight(raw_weight(copied[0])))
            loss_of(copied, first).backward()
            loss_of(model, third).backward()
        loss_of(copied, second).backward()
        with context(copied):
            loss_of(copied, third).backward()
        return inside, gradients(copied)

    check(tiny, loop)


def test_a_deep_copy_without_gradients_so_far():
    def loop(model: Any, context: Context) -> Any:
        with context(model):
            loss_of(model, images()[0])
            with torch.no_grad():
                loss_of(model, images()[0])
            copied = copy.deepcopy(model)
        loss_of(model, images()[0]).backward()
        loss_of(copied, images()[1]).backward()
        assert not {id(p) for p in copied.parameters()} & {id(p) for p in model.parameters()}
        return gradients(copied)

    check(tiny, loop)


def names_of(model: nn.Module) -> Any:
    names: list[Any] = [[name for name, _ in model.named_parameters()], [name for name, _ in model.named_buffers()]]
    return [*names, [name for name, _ in model.named_modules()], list(model.state_dict())]


def test_what_is_saved_inside():
    def loop(model: Any, context: Context) -> Any:
        with context(model):
            loss_of(model, images()[0]).backward()
            with torch.no_grad():
                loss_of(model, images()[0])
            state_dict = pickle.loads(pickle.dumps(model.state_dict()))
            file = io.BytesIO()
            torch.save(model.state_dict(), file)
            names = names_of(model)
        file.seek(0)
        size = len(file.getvalue())
        return dict(state_dict), dict(torch.load(file, weights_only=True)), names, size

    model = check(tiny, loop)

    assert names_of(model) == names_of(tiny())


def test_loading_back_what_was_saved_inside():
    model = tiny()
    with standardize_once(model):
        loss_of(model, images()[0]).backward()
        saved = copy.deepcopy(model.state_dict())
    other = tiny("paper")
    for parameter in other.parameters():
        nn.init.normal_(parameter)

    other.load_state_dict(saved)

    assert_near(dict(other.state_dict()), dict(tiny().state_dict()))
