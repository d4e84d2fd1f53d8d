"""Tracing patches ``nn.Module`` for all threads: what others compute meanwhile, and what is left when it ends."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from looked_at import is_sure, look, model_of, norms
from torch import Tensor, nn

from ws_algorithm.tracing.execution import Execution, execution_of

IMAGE = torch.linspace(0, 1, 2 * 2 * 4 * 4).reshape(2, 2, 4, 4)
WAIT_S = 10  # for what another thread does at once; a test that waits in vain fails


def do_nothing() -> None:
    pass


def traced_while(act: Callable[[], None]) -> Any:
    """A model whose forward does something the first time that it is called, and only then.

    An error there is taken for one of a forward that cannot be traced: tests assert outside.
    """
    remaining = [act]

    def run(m: Any, x: Any) -> Any:
        (remaining.pop() if remaining else do_nothing)()
        return m.n(m.a(x))

    return model_of(run)


class Reads(nn.Module):
    """Calls layers and reads a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))
        self.gain = nn.Parameter(torch.full((2, 1, 1), 2.0))
        self.register_buffer("shift", torch.ones(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.gain + self.shift


@pytest.mark.parametrize("shared", [False, True])
def test_another_thread_computes_meanwhile(shared):
    """Another model, or the one that is looked at."""
    begun, computed = threading.Event(), threading.Event()
    outputs: list[Tensor] = []
    hooked: list[type] = []
    in_time: list[bool] = []

    def compute() -> None:
        if begun.wait(WAIT_S):
            outputs.append(other(IMAGE))
            computed.set()

    def let_it_compute() -> None:
        begun.set()
        in_time.append(computed.wait(WAIT_S))

    model = traced_while(let_it_compute)
    other = (model if shared else Reads()).eval()
    other.register_forward_hook(lambda module, args, output: hooked.append(type(output)))
    thread = threading.Thread(target=compute)
    thread.start()
    found = execution_of(model)
    begun.set()
    thread.join()

    assert in_time == [True]
    assert [place.norm for place in found.places.values()] == [model.n]
    assert found.untraced == found.in_one_mode == ()
    assert hooked == [Tensor]
    assert len(outputs) == 1 and torch.equal(outputs[0], other(IMAGE))


def test_one_thread_traces_at_a_time():
    entered, started = threading.Event(), threading.Event()
    first, second = traced_while(lambda: let_it_try()), traced_while(entered.set)
    found: list[Any] = []
    meanwhile: list[bool] = []

    def look_too() -> None:
        started.set()
        found.append(execution_of(second).places[second.a].norm)

    def let_it_try() -> None:
        thread.start()
        meanwhile.extend([started.wait(WAIT_S), entered.wait(0.2)])  # a thread that is not kept out needs less

    thread = threading.Thread(target=look_too)
    assert norms(first) == {"a": "n"}
    thread.join()

    assert meanwhile == [True, False]
    assert entered.is_set()
    assert found == [second.n]


def test_a_thread_that_forward_starts_is_traced_with_it():
    """Branches that run in threads of their own; convolutions are found there by their weights."""

    def run(m: Any, x: Any) -> Any:
        outputs: list[Any] = []
        thread = threading.Thread(target=lambda: outputs.append(m.a(x)))
        thread.start()
        thread.join()
        return m.n(outputs[0])

    model = model_of(run)

    assert norms(model) == {"a": "n"} or not is_sure(model)


def methods() -> tuple[Any, Any]:
    return nn.Module.__call__, nn.Module.__getattr__


def test_torch_fx_patches_modules_while_it_traces():
    """If it stops to do so, the lock and the looks at the running thread can go: see the note in ``graph.py``."""
    before, within = methods(), []
    look(traced_while(lambda: within.extend(methods())))

    call, getattribute = within
    assert call is not before[0]
    assert getattribute is not before[1]
    assert methods() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_and_leaves_modules_as_they_were(error):
    before = methods()

    def interrupt() -> None:
        raise error

    with pytest.raises(error):
        look(traced_while(interrupt))

    assert methods() == before
    found: list[Execution] = []
    thread = threading.Thread(target=lambda: found.append(execution_of(traced_while(do_nothing))), daemon=True)
    thread.start()
    thread.join(WAIT_S)  # or the lock is still held
    assert [execution.untraced + execution.in_one_mode for execution in found] == [()]


def test_an_error_leaves_modules_as_they_were():
    before = methods()

    def fail() -> None:
        raise RuntimeError("no")

    look(traced_while(fail))

    assert methods() == before
