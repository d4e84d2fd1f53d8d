"""Random numbers: global generators are left as they were, and a forward that draws is not taken for certain."""

import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from looked_at import Model, conv, is_sure, look, model_of, norm, norms, order, warnings_about
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from tracing.cautious import is_found_or_missed_aloud
from ws_algorithm import inspect_convolutions
from ws_algorithm.tracing.random_states import DrawsNoticed, random_states_restored

DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(()),
    "python": random.random,
    "numpy": np.random.rand,
}


def states() -> tuple[Any, ...]:
    return tuple(torch.get_rng_state().tolist()), random.getstate(), str(np.random.get_state(legacy=False))


@pytest.mark.parametrize("library", DRAWS)
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_states_are_restored(library, error):
    before = states()
    with random_states_restored(nn.Module()):
        DRAWS[library]()
        assert states() != before
    assert states() == before

    with pytest.raises(error), random_states_restored(nn.Module()):
        DRAWS[library]()
        raise error
    assert states() == before


ALL_DRAWS: dict[str, Callable[[], Any]] = {
    **DRAWS,
    "randn": lambda: torch.randn(2),
    "randint": lambda: torch.randint(3, (2,)),
    "randperm": lambda: torch.randperm(3),
    "rand_like": lambda: torch.rand_like(torch.ones(2)),
    "on the meta device": lambda: torch.rand(2, device="meta"),
    "normal_": lambda: torch.empty(2).normal_(),
    "bernoulli": lambda: torch.bernoulli(torch.full((2,), 0.5)),
    "multinomial": lambda: torch.multinomial(torch.ones(2), 1),
    "initialization": lambda: nn.init.kaiming_normal_(torch.empty(2, 2)),
    "dropout": lambda: F.dropout(torch.ones(2), 0.5, True),
    "a generator": lambda: torch.rand(2, generator=torch.Generator()),
    "a layer": lambda: nn.Linear(2, 2),
    "choice": lambda: random.choice([1, 2]),
    "shuffle": lambda: random.shuffle([1, 2, 3]),
    "numpy's choice": lambda: np.random.choice(3),
}


@pytest.mark.parametrize("way", ALL_DRAWS)
def test_a_draw_is_noticed(way):
    draws = DrawsNoticed([])
    with random_states_restored(nn.Module()), draws:
        before = draws.state()
        assert draws.state() == before
        ALL_DRAWS[way]()
        assert draws.state() != before


@pytest.mark.parametrize("calm", [lambda: torch.ones(2) * 2, lambda: F.dropout(torch.ones(2), 0.5, False)])
def test_what_does_not_draw_is_no_draw(calm):
    draws = DrawsNoticed([])
    with draws:
        before = draws.state()
        calm()
        assert draws.state() == before


GENERATORS: dict[str, Callable[[], Any]] = {
    "random.Random": lambda: random.Random(1),
    "its method": lambda: random.Random(1).random,
    "RandomState": lambda: np.random.RandomState(1),
    "Generator": lambda: np.random.default_rng(1),
    "method of Generator": lambda: np.random.default_rng(1).random,
}


def draw_from(kept: Any) -> Any:
    return kept() if callable(kept) else kept.random() if hasattr(kept, "random") else kept.rand()


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_that_a_module_keeps(kind):
    """Its forward is not certain, and the model's own generator has not moved."""
    model = model_of(lambda m, x: m.n(m.a(x)) if draw_from(m.kept) < 2 else m.a(x))
    model.kept = GENERATORS[kind]()

    assert norms(model) == {"a": None}
    assert not is_sure(model)
    assert draw_from(model.kept) == draw_from(GENERATORS[kind]())


class LayerDrop(nn.Module):
    """Leaves out layers at random, in training and in evaluation, as Monte Carlo estimates do."""

    def __init__(self, draw: Any, depth: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(conv() for _ in range(depth))
        self.head = conv()
        self.draw = draw

    def forward(self, x: Any) -> Any:
        for layer in self.layers:
            if self.draw() < 0.5:
                continue
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("library", DRAWS)
def test_layers_that_are_left_out_at_random(library):
    """In the order in which they are defined, all of them, and in doubt."""
    model = LayerDrop(DRAWS[library])

    assert order(model) == "layers.0 layers.1 layers.2 layers.3 layers.4 layers.5 head"
    assert not is_sure(model)
    assert "it draws random numbers" in warnings_about(model, n=1)


@pytest.mark.parametrize("library", DRAWS)
def test_a_norm_that_is_left_out_at_random(library):
    def run(m: Any, x: Any) -> Any:
        x = m.a(x)
        return m.n(x) if DRAWS[library]() < 0.9 else x

    assert norms(model_of(run))["a"] is None


def draws_first(draw: Callable[[], Any]) -> Callable[[Any, Any], Any]:
    def run(m: Any, x: Any) -> Any:
        left_out = draw() < 2
        x = m.conv(m.block(x))
        return x if left_out else m.norm(x)

    return run


def draws_last(draw: Callable[[], Any]) -> Callable[[Any, Any], Any]:
    def run(m: Any, x: Any) -> Any:
        x = m.conv(m.block(x))
        return x if draw() < 2 else m.norm(x)

    return run


@pytest.mark.parametrize("library", DRAWS)
@pytest.mark.parametrize("drawing", [draws_first, draws_last])
def test_who_draws_is_in_doubt_and_not_what_it_calls(drawing, library):
    model = Model(drawing(DRAWS[library]), conv=conv(), norm=norm(), block=nn.Sequential(conv(), norm()))

    told = "\n".join(look(model).execution.untraced)

    assert "forward of Model cannot be traced" in told and "Sequential" not in told
    assert norms(model)["block.0"] == "block.1"
    assert not is_sure(model)


@pytest.mark.parametrize("library", DRAWS)
def test_a_part_that_draws_puts_only_itself_in_doubt(library):
    part = Model(lambda m, x: m.n(m.a(x)) if DRAWS[library]() < 0.5 else x, a=conv(), n=norm())
    model = nn.Sequential(conv(), norm(), part, conv(), norm())

    assert norms(model) == {"0": "1", "2.a": "2.n", "3": "4"} or not is_sure(model)
    assert norms(model)["0"] == "1" and norms(model)["3"] == "4"
    assert order(model) == "0 2.a 3"


@pytest.mark.parametrize("library", DRAWS)
def test_another_thread_that_draws_meanwhile(library):
    """Whose draws those of Python and NumPy are is not known; those of torch are told apart."""
    begun, drawn = threading.Event(), threading.Event()

    def draw() -> None:
        if begun.wait(10):
            DRAWS[library]()
            drawn.set()

    def run(m: Any, x: Any) -> Any:
        begun.set()
        drawn.wait(10)
        return m.n(m.a(x))

    model, thread = model_of(run), threading.Thread(target=draw)
    thread.start()
    truth: dict[str, str | None] = {"a": "n"}
    told = is_found_or_missed_aloud(model, truth) if library != "torch" else norms(model) == truth and is_sure(model)
    begun.set()
    thread.join()

    assert drawn.is_set()
    assert told


def test_a_function_that_draws_may_have_been_imported_by_name(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "drawn_by_name", random.random, raising=False)
    state = random.getstate()

    found = look(DrawsByName())

    assert random.getstate() == state
    assert [choice.place.undecided for choice in found.choices] == [True]


class DrawsByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.n(x) if sys.modules[__name__].__dict__["drawn_by_name"]() < 0.5 else x


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


def test_a_parametrization_that_draws_is_not_computed():
    model = nn.Sequential(parametrize.register_parametrization(nn.Conv2d(2, 2, 3), "weight", Noisy()))
    state = torch.get_rng_state()

    inspect_convolutions(model)

    assert torch.equal(torch.get_rng_state(), state)
