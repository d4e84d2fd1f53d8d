"""Looking happens on a copy: the original does not notice, whatever it keeps and its forward does."""

import dataclasses
import functools
import gc
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from looked_at import Model, conv, is_sure, look, model_of, norm, norms
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations

from ws_algorithm import apply_weight_standardization, inspect_convolutions


class Keeper(nn.Module):
    """Keeps something, and a convolution and a norm that are called through it."""

    def __init__(self, keep: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv, self.norm = conv(), norm()
        self.kept = keep(self)

    def forward(self, x: Tensor) -> Any:
        return self.kept(x)


class Calls:
    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        self.conv, self.norm = conv, norm

    def __call__(self, x: Any) -> Any:
        return self.norm(self.conv(x))


class Reference:
    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    def __call__(self, x: Any) -> Any:
        model: Any = self.model()
        return model.norm(model.conv(x))


def wrapping(function: Callable) -> Callable:
    def wrapped(*args: Any) -> Any:
        return function(*args)

    return wrapped


def first(functions: Any) -> Callable:
    """An object that holds its functions in a list."""
    holder = types.SimpleNamespace(functions=functions)
    return functools.partial(lambda holder, x: holder.functions[0](x), holder)


KEPT: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda m: lambda x: m.norm(m.conv(x)),
    "lambda with defaults": lambda m: lambda x, conv=m.conv, norm=m.norm: norm(conv(x)),
    "partial": lambda m: functools.partial(lambda m, x: m.norm(m.conv(x)), m),
    "partial of a lambda": lambda m: functools.partial(lambda x, y: m.norm(m.conv(x)), y=1),
    "object": lambda m: Calls(m.conv, m.norm),
    "weak reference": Reference,
    "lambda in a list": lambda m: first([lambda x: m.norm(m.conv(x))]),
    "wrapped method": lambda m: wrapping(Calls(m.conv, m.norm).__call__),
    "wrapped lambda": lambda m: wrapping(lambda x: m.norm(m.conv(x))),
    "decorated": lambda m: torch.no_grad()(Calls(m.conv, m.norm).__call__),
    "compiled": lambda m: torch.compile(Calls(m.conv, m.norm).__call__, backend="eager"),
}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_functions_that_a_model_keeps(kind):
    """The original must not run; and the copy should, or the doubt be told."""
    model = Keeper(KEPT[kind])
    fired = []
    for layer in (model.conv, model.norm):
        layer.register_forward_hook(lambda *_: fired.append(1))

    found = norms(model)

    assert fired == []
    assert model.norm.num_batches_tracked == 0
    assert found == {"conv": "norm"} or not is_sure(model)


def test_a_forward_that_was_replaced_on_the_instance():
    model = model_of(lambda m, x: m.n(m.a(x)))
    model.forward = torch.no_grad()(model.forward)

    assert norms(model) == {"a": "n"} or not is_sure(model)
    assert model.n.num_batches_tracked == 0


def test_global_hooks_do_not_fire():
    fired: list[Any] = []
    handles = [
        torch_module.register_module_forward_pre_hook(lambda module, args: fired.append(module)),
        torch_module.register_module_forward_hook(lambda module, args, output: fired.append(module)),
    ]
    try:
        assert norms(nn.Sequential(conv(), norm())) == {"0": "1"}
    finally:
        for handle in handles:
            handle.remove()
    assert fired == []


@pytest.mark.parametrize("register", ["register_backward_hook", "register_full_backward_hook"])
def test_backward_hooks(register):
    model = model_of(lambda m, x: m.n(m.a(x)))
    getattr(model.a, register)(lambda *_: None)

    assert norms(model) == {"a": "n"}


def test_the_mode_of_gradients_is_as_before():
    def run(m: Any, x: Any) -> Any:
        torch.set_grad_enabled(True)
        return m.n(m.a(x))

    with torch.no_grad():
        assert norms(model_of(run)) == {"a": "n"}
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def everything(model: nn.Module) -> dict[str, Any]:
    return {
        "attributes": {name: {key: id(v) for key, v in vars(part).items()} for name, part in model.named_modules()},
        "gradients": [(p.requires_grad, p.grad) for p in model.parameters()],
        "tensors": {name: (t._version, t.tolist()) for name, t in model.state_dict(keep_vars=True).items()},
        "hooks": [len(part._forward_hooks) for part in model.modules()],
        "modes": [part.training for part in model.modules()],
    }


def restless(m: Any, x: Any) -> Any:
    m.steps += 1
    m.calls += 1
    m.seen.append(x)
    m.train(not m.training)
    m.a.register_forward_hook(lambda *_: None)
    m.a.weight.requires_grad_(False)
    m.n.running_mean.mul_(2)
    del m.unused
    m.new = nn.ReLU()
    return m.n(m.a(x)) if m.opaque is False or x.mean() > 0 else x


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("example_input", [None, torch.ones(1, 2, 4, 4)], ids=["traced", "observed"])
def test_a_forward_that_changes_its_module_changes_a_copy(opaque, example_input):
    model: Any = Model(restless, a=conv(), n=norm(), unused=norm())
    model.register_buffer("steps", torch.zeros(()))
    model.calls, model.seen, model.opaque = 0, [], opaque
    before = everything(model)

    look(model, example_input)

    assert everything(model) == before
    assert (model.calls, model.seen) == (0, [])


def test_a_function_that_refers_to_the_model_leaves_it_as_it_was():
    """It is refused; by then it must not have changed anything."""
    model: Any = Keeper(lambda m: lambda x: m.go(x))
    model.calls, model.seen = 0, []

    def go(x: Any) -> Any:
        model.calls += 1
        model.seen.append(x)
        return model.norm(model.conv(x))

    model.go = go
    before = everything(model)

    look(model)

    assert everything(model) == before
    assert (model.calls, model.seen) == (0, [])


def test_the_vectors_of_a_spectral_norm_stay():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(2, 2, 3)), nn.Conv2d(2, 2, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    inspect_convolutions(model)
    with pytest.raises(ValueError, match="spectral_norm"):
        apply_weight_standardization(model)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_registration_that_fails_half_way_is_undone():
    with torch.inference_mode():
        frozen_for_good = nn.Conv2d(2, 2, 3)
    model = nn.Sequential(nn.Conv2d(2, 2, 3), frozen_for_good)
    keys, classes = list(model.state_dict()), [type(layer) for layer in model.modules()]

    with pytest.raises(RuntimeError):
        apply_weight_standardization(model)

    assert list(model.state_dict()) == keys
    assert [type(layer) for layer in model.modules()] == classes


@pytest.mark.parametrize("example", [None, torch.ones(1, 2, 4, 4)], ids=["traced", "observed"])
def test_nothing_keeps_the_model_alive(example):
    model = model_of(lambda m, x: m.n(m.a(x)))
    kept = weakref.ref(model.a)
    gc.collect()
    gc.disable()
    try:
        inspect_convolutions(model, example_input=example)
        del model
        assert kept() is None
    finally:
        gc.enable()


class KeepsInItsClass(nn.Module):
    seen: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.a = conv()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x if type(self).seen is None else x + type(self).seen)
        type(self).seen = x
        return x


def test_what_a_class_keeps_of_a_trace_is_refused_with_the_remedy():
    model = KeepsInItsClass()
    inspect_convolutions(model)

    with pytest.raises(RuntimeError, match=r"kept a value of the trace.*class attribute.*`example_input`"):
        model(torch.ones(1, 2, 4, 4))
    KeepsInItsClass.seen = None
    inspect_convolutions(model, example_input=torch.ones(1, 2, 4, 4))
    assert isinstance(KeepsInItsClass.seen, Tensor)


class TrainsItself(nn.Sequential):
    def train(self, epochs: Any, lr: float) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise AssertionError("the training loop of the user runs")


@pytest.mark.parametrize("example", [None, torch.ones(1, 2, 4, 4)], ids=["traced", "observed"])
def test_a_method_train_of_the_users_is_not_called(example):
    (record,) = inspect_convolutions(TrainsItself(conv(), norm()), example_input=example)

    assert record.normalized_by == "1 (BatchNorm2d)"


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_the_mode_of_a_script_stays():
    model = nn.Sequential(conv(), torch.jit.script(nn.Dropout())).eval()
    inspect_convolutions(model)

    assert not model[1].training


@dataclasses.dataclass
class State:
    """An object with an activation, which refuses to be copied, and with others."""

    activation: Any
    lock: Any = dataclasses.field(default_factory=threading.Lock)
    steps: list[int] = dataclasses.field(default_factory=list)


def test_an_object_with_parts_that_cannot_be_copied_stays():
    def run(m: Any, x: Tensor) -> Tensor:
        m.state.activation = y = m.n(m.a(x))
        m.state.steps.append(1)
        return y

    model = model_of(run)
    model.state = State(torch.ones(2, requires_grad=True) * 2)
    inspect_convolutions(model)

    assert isinstance(model.state.activation, Tensor) and model.state.steps == []


class ModuleAndDictionary(nn.Module, dict):  # pyright: ignore[reportIncompatibleMethodOverride]
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(), norm())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_a_module_that_is_a_dictionary_too():
    (record,) = inspect_convolutions(ModuleAndDictionary())

    assert record.normalized_by == "layers.1 (BatchNorm2d)"
