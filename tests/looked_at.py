"""Models made of a forward function, and what is found out about them by looking."""

import signal
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import nn

from ws_algorithm.cautions import cautions_about
from ws_algorithm.formula import FORMULAS
from ws_algorithm.selection import Layers, Rules, Selection, select_convolutions


class Model(nn.Module):
    """Its forward is a function of itself and of its input; its layers are given by name."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


def conv() -> nn.Conv2d:
    return nn.Conv2d(2, 2, 3, padding=1)


def norm() -> nn.Module:
    return nn.BatchNorm2d(2)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    **dict.fromkeys("abcd", conv),
    **dict.fromkeys("nm", norm),
    "relu": lambda: nn.ReLU(inplace=True),
}


def model_of(run: Callable[..., Any]) -> Any:
    """A model with those layers that `run` names: convolutions a to d, norms n and m, an activation."""
    names = _names_in(run.__code__)
    return Model(run, **{name: build() for name, build in LAYERS.items() if name in names})


def _names_in(code: types.CodeType) -> set[str]:
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)


class TooLong(BaseException):
    """Not an ``Exception``, which whoever looks at a model has to expect from its forward."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if it takes longer."""

    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except TooLong:
        pytest.fail(f"took more than {seconds} s")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def look(model: nn.Module, example_input: Any = None, n: int = 0, layers: Layers = "normalized") -> Selection:
    with within(5):
        return select_convolutions(model, Rules(n, layers), example_input)


def norms(model: nn.Module, example_input: Any = None) -> dict[str, str | None]:
    """In the order found, the convolutions that forward uses and what normalizes them: a layer or a function."""
    names = {layer: name for name, layer in model.named_modules()}
    places = {choice.name: choice.place for choice in look(model, example_input).choices}
    followers = {name: place.norm for name, place in places.items() if place.executed}
    return {name: names[norm] if isinstance(norm, nn.Module) else norm for name, norm in followers.items()}


def order(model: nn.Module, example_input: Any = None) -> str:
    """The names of the convolutions that forward uses, in the order found."""
    return " ".join(norms(model, example_input))


def is_sure(model: nn.Module, example_input: Any = None) -> bool:
    """Whether all was found out: neither order nor followers are in doubt."""
    selection = look(model, example_input)
    return (
        selection.execution.failure is None
        and selection.execution.doubt is None
        and not any(choice.place.undecided for choice in selection.choices)
    )


def warnings_about(model: nn.Module, n: int = 0, layers: Layers = "normalized", example_input: Any = None) -> str:
    return "\n".join(cautions_about(look(model, example_input, n, layers), FORMULAS["composer"]))
