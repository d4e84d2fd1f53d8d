"""Looking happens on a copy: neither the model nor its surroundings notice, whatever the model keeps and does."""

import functools
import os
import random
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from looked_at import Model, conv, is_sure, look, model_of, norm, norms
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ws_algorithm.tracing.shadow import shadow_of
from ws_algorithm.tracing.undisturbed import SideEffect, undisturbed


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


OBJECTS: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "condition": threading.Condition,
    "iterator": lambda: (i for i in range(3)),
    "random generator": lambda: torch.Generator().manual_seed(1),
    "module": lambda: random,
    "activations": lambda: [torch.ones(2, requires_grad=True) * 2],
    "activation": lambda: torch.ones(2, requires_grad=True) * 2,
    "dictionary of locks": lambda: {"a": [threading.RLock()]},
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_that_a_model_keeps(kind):
    model = model_of(lambda m, x: m.n(m.a(x)))
    model.kept = kept = OBJECTS[kind]()

    assert norms(model) == {"a": "n"}
    assert is_sure(model)
    assert model.kept is kept


def test_an_open_file_that_a_model_keeps(tmp_path):
    model = model_of(lambda m, x: (m.file.write("x"), m.n(m.a(x)))[1])
    with open(tmp_path / "log", "w") as model.file:
        assert norms(model) == {"a": "n"}
        assert model.file.tell() == 0


def files_changed_by(path: Path) -> dict[str, Callable[[], Any]]:
    return {
        "open": lambda: open(path, "a").write("x"),
        "open to update": lambda: path.open("r+").write("x"),
        "write_text": lambda: path.write_text("x"),
        "torch.save": lambda: torch.save(1, path),
        "numpy.save": lambda: np.save(path.with_suffix(".npy"), np.ones(1)),
        "descriptor": lambda: os.write(os.open(path, os.O_WRONLY), b"x"),
        "mkdir": lambda: path.with_name("new").mkdir(),
        "remove": lambda: os.remove(path),
        "unlink": path.unlink,
        "rename": lambda: path.rename(path.with_name("other")),
        "replace": lambda: os.replace(path, path.with_name("other")),
        "rmdir": path.with_name("empty").rmdir,
        "truncate": lambda: os.truncate(path, 0),
        "symlink": lambda: path.with_name("link").symlink_to(path),
    }


@pytest.mark.parametrize("act", files_changed_by(Path("file")))
def test_files_stay(act, tmp_path):
    path = tmp_path / "file"
    path.write_text("content")
    (tmp_path / "empty").mkdir()
    action = files_changed_by(path)[act]

    look(model_of(lambda m, x: (action(), m.n(m.a(x)))[1]))

    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "file"]
    assert path.read_text() == "content"


def test_files_can_be_read_and_are_written_by_others(tmp_path):
    path = tmp_path / "file"
    path.write_text("1")
    turn = threading.Event()
    writer = threading.Thread(target=lambda: turn.wait(10) and path.write_text("3"))
    writer.start()
    with undisturbed(nn.Module()):
        assert path.read_text() == "1"
        with pytest.raises(SideEffect):
            path.write_text("2")
        turn.set()
        writer.join()
    assert path.read_text() == "3"


def test_what_a_forward_is_the_first_to_import_can_still_be_imported():
    """A product of weights is the first operation on the meta device, for which torch imports its compiler."""
    script = (
        "import torch; from torch import nn; from ws_algorithm import inspect_convolutions\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__(); self.conv = nn.Conv2d(2, 2, 3); self.norm = nn.BatchNorm2d(2)\n"
        "    def forward(self, x):\n"
        "        return self.norm(nn.functional.conv2d(x, self.conv.weight * 2))\n"
        "record, = inspect_convolutions(Net())\n"
        "torch.compile(nn.ReLU(), backend='eager')(torch.ones(2))\n"
        "print(record.normalized_by)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert run.returncode == 0, run.stderr[-300:]
    assert run.stdout.strip() == "norm (BatchNorm2d)"


DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(()),
    "python": random.random,
    "numpy": np.random.rand,
}


@pytest.mark.parametrize("library", DRAWS)
def test_another_thread_draws_as_if_nothing_happened(library):
    """While one thread looks, the numbers that another draws go on, and are not drawn again afterwards."""
    draw = DRAWS[library]
    turn, done = threading.Event(), threading.Event()
    drawn: list[float] = []

    def draw_at_its_turn() -> None:
        while turn.wait(10) and len(drawn) < 2:
            turn.clear()
            drawn.append(float(draw()))
            done.set()

    def forward_meanwhile(m: Any, x: Any) -> Any:
        if len(drawn) == 1:
            turn.set()
            assert done.wait(10)
        return m.n(m.a(x))

    model = model_of(forward_meanwhile)
    seeds = (torch.manual_seed, random.seed, np.random.seed)
    for seed in seeds:
        seed(17)
    expected = [float(draw()) for _ in range(3)]
    for seed in seeds:
        seed(17)
    thread = threading.Thread(target=draw_at_its_turn)
    thread.start()
    turn.set()
    assert done.wait(10)
    done.clear()

    look(model)
    drawn.append(float(draw()))
    turn.set()
    thread.join()

    assert drawn == expected


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


def test_a_forward_cannot_change_how_others_compute():
    def run(m: Any, x: Any) -> Any:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float64)
        return m.n(m.a(x))

    try:
        look(model_of(run))
        assert torch.get_default_dtype() == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_copy_has_no_data():
    model = Model(lambda m, x: x, conv=conv(), norm=norm())

    shadow, originals = shadow_of(model)

    assert all(tensor.is_meta for tensor in (*shadow.parameters(), *shadow.buffers()))
    assert [*originals.values()] == [*model.modules()]


def test_a_tied_weight_is_tied_in_the_copy():
    model: Any = nn.Sequential(conv(), conv())
    model[1].weight = model[0].weight

    shadow: Any = shadow_of(model, data=True)[0]

    assert shadow[0].weight is shadow[1].weight
    assert shadow[0].weight is not model[0].weight
    assert torch.equal(shadow[0].weight, model[0].weight)
