"""What happens around a model that is looked at: other threads, random states, imports, files, the default device."""

import gc
import os
import random
import signal
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from looked_at import look, model_of, norms
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ws_algorithm import apply_weight_standardization, inspect_convolutions


@pytest.mark.parametrize(
    "draw", [random.random, np.random.rand, lambda: float(torch.rand(()))], ids=["py", "np", "torch"]
)
def test_a_thread_that_draws_all_the_time(draw):
    model = nn.Sequential(*[nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU()) for _ in range(8)])
    drawn: list[float] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            drawn.append(float(draw()))
            time.sleep(1e-4)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        counts = [sum(r.standardized for r in inspect_convolutions(model, layers="normalized")) for _ in range(10)]
    finally:
        stop.set()
        thread.join()

    assert counts == [8] * 10
    assert len(set(drawn)) > 0.99 * len(drawn)  # torch draws one of 2**24 numbers: a few may be equal by chance


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_under_a_default_device(device):
    with torch.device(device):
        assert norms(model_of(lambda m, x: m.n(m.a(x)))) == {"a": "n"}


def test_a_function_that_draws_may_have_been_imported_by_name(monkeypatch):
    """In a process with other threads too, whose draws cannot be told from those of the model."""
    monkeypatch.setattr(sys.modules[__name__], "drawn_by_name", random.random, raising=False)
    state, stop = random.getstate(), threading.Event()
    other = threading.Thread(target=stop.wait)
    other.start()
    try:
        found = look(DrawsByName())
    finally:
        stop.set()
        other.join()

    assert random.getstate() == state
    assert [choice.place.undecided for choice in found.choices] == [True]


class DrawsByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.n(x) if sys.modules[__name__].__dict__["drawn_by_name"]() < 0.5 else x


def test_what_forward_imports_keeps_nothing(tmp_path, monkeypatch):
    (tmp_path / "imported_late.py").write_text("from random import random\nfrom torch import cat\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def imports(m: Any, x: Tensor) -> Tensor:
        import imported_late  # pyright: ignore[reportMissingImports]

        return m.n(imported_late.cat([m.a(x)]))

    assert norms(model_of(imports)) == {"a": "n"}
    late: Any = sys.modules.pop("imported_late")
    random.seed(5)
    value = late.random()
    random.seed(5)
    assert value == random.random()
    assert torch.equal(late.cat([torch.ones(1)]), torch.ones(1))


def test_files_are_guarded_while_a_module_is_imported(tmp_path, monkeypatch):
    target = tmp_path / "written"
    (tmp_path / "looks_at_import.py").write_text(
        "from torch import nn\n"
        "from ws_algorithm import inspect_convolutions\n"
        "class Writes(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a = nn.Conv2d(2, 2, 3)\n"
        "    def forward(self, x):\n"
        f"        open({str(target)!r}, 'w').close()\n"
        "        return self.a(x)\n"
        "inspect_convolutions(Writes())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    __import__("looks_at_import")

    sys.modules.pop("looks_at_import")
    assert not Path(target).exists()


def test_the_vectors_of_a_spectral_norm_stay():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(2, 2, 3)), nn.Conv2d(2, 2, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    inspect_convolutions(model)
    with pytest.raises(ValueError, match="spectral_norm"):
        apply_weight_standardization(model)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


def test_a_parametrization_that_draws_is_not_computed():
    model = nn.Sequential(parametrize.register_parametrization(nn.Conv2d(2, 2, 3), "weight", Noisy()))
    state = torch.get_rng_state()

    inspect_convolutions(model)

    assert torch.equal(torch.get_rng_state(), state)


def test_forward_does_not_print_nor_warn(capsys, recwarn):
    import warnings

    def talks(m: Any, x: Tensor) -> Tensor:
        print(x)
        warnings.warn("look", stacklevel=1)
        return m.n(m.a(x))

    assert norms(model_of(talks)) == {"a": "n"}
    assert capsys.readouterr() == ("", "")
    assert not recwarn


def test_registration_that_fails_half_way_is_undone():
    with torch.inference_mode():
        frozen_for_good = nn.Conv2d(2, 2, 3)
    model = nn.Sequential(nn.Conv2d(2, 2, 3), frozen_for_good)
    keys, classes = list(model.state_dict()), [type(layer) for layer in model.modules()]

    with pytest.raises(RuntimeError):
        apply_weight_standardization(model)

    assert list(model.state_dict()) == keys
    assert [type(layer) for layer in model.modules()] == classes


class Collected:
    """Part of a cycle, with a finalizer that removes a folder, as a ``TemporaryDirectory`` has."""

    def __init__(self, folder: Path) -> None:
        self.itself = self
        weakref.finalize(self, os.rmdir, folder)


def test_finalizers_run_as_they_would(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()

    def collects(m: Any, x: Tensor) -> Tensor:
        gc.collect()
        return m.n(m.a(x))

    model = model_of(collects)
    gc.disable()
    try:
        Collected(folder)
        assert norms(model) == {"a": "n"}
    finally:
        gc.enable()
    assert not folder.exists()


def test_a_handler_of_a_signal_writes_its_file_and_is_heard(tmp_path):
    class Preempted(Exception):
        pass

    def handler(*_: Any) -> None:
        (tmp_path / "checkpoint").write_text("saved")
        raise Preempted

    def takes_a_signal(m: Any, x: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGUSR1)
        return m.n(m.a(x))

    model = model_of(takes_a_signal)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(Preempted):
            inspect_convolutions(model)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (tmp_path / "checkpoint").read_text() == "saved"


@pytest.mark.parametrize("example", [None, torch.ones(1, 2, 4, 4)], ids=["symbols", "input"])
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
