"""Runs with an example input, of models that are not traced."""

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from looked_at import conv, is_sure, look, model_of, norm, norms, warnings_about
from torch import Tensor, nn
from torch.nn import functional as F

from tracing.cautious import is_found_or_missed_aloud

IMAGE = torch.linspace(0, 1, 2 * 2 * 4 * 4).reshape(2, 2, 4, 4)


def only_tensors(run: Callable[..., Any]) -> Any:
    """A model that is not traced."""

    def checked(m: Any, x: Any) -> Any:
        if type(x) is not Tensor:
            raise TypeError("only for tensors")
        return m.inner(m, x)

    model = model_of(run)
    model.inner, model.run = run, checked
    return model


FOLLOWED: dict[str, Callable] = {
    "numpy": lambda m, x: m.n(m.a(torch.from_numpy(np.sqrt(x.numpy())))),
    "tolist": lambda m, x: m.n(m.a(torch.tensor(x.tolist()))),
    "shape": lambda m, x: m.n(m.a(x).flatten(2).mT.reshape(2, 2, 4, 4).contiguous()),
    "view of a view": lambda m, x: m.n(m.a(x)[:, :1][..., 1:].repeat(1, 2, 1, 1)),
    "sum in place": lambda m, x: m.n(m.a(x).add_(x)),
    "sum": lambda m, x: m.n(sum([x, m.a(x)])),
    "weight": lambda m, x: m.n(F.conv2d(x, m.a.weight * 2, padding=1)),
    "group_norm": lambda m, x: F.group_norm(m.a(x), 2),
    "dropout": lambda m, x: m.n(F.dropout(m.a(x), 0.5, m.training)),
    "both branches": lambda m, x: m.n(m.a(x)) if x.mean() > 0 else m.n(m.a(-x)),
}


@pytest.mark.parametrize("way", FOLLOWED)
def test_a_norm_follows(way):
    model = only_tensors(FOLLOWED[way])

    assert norms(model, IMAGE)["a"] is not None
    assert [c.place.found for c in look(model, IMAGE).choices] == ["observed"]
    assert is_sure(model, IMAGE)


def relu_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    F.relu_(y)
    return m.n(y)


def relu_on_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    F.relu_(y.view(-1))
    return m.n(y)


NOT_FOLLOWED: dict[str, Callable] = {
    "relu": lambda m, x: m.n(m.relu(m.a(x))),
    "relu in place": relu_in_place,
    "relu on a view": relu_on_a_view,
    "multiplied": lambda m, x: m.n(m.a(x).mul_(2)),
    "second use": lambda m, x: m.a(m.n(m.a(x))),
    "shape lent": lambda m, x: m.n(torch.ones(1, 2, 1, 1).expand_as(m.a(x))),
}


@pytest.mark.parametrize("way", NOT_FOLLOWED)
def test_no_norm_follows(way):
    assert norms(only_tensors(NOT_FOLLOWED[way]), IMAGE)["a"] is None


def written_into(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(2, 2, 4, 4)
    y[:, :1] = m.a(x)[:, :1]
    return m.n(y)


def added_in_place(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(2, 2, 4, 4)
    y += m.a(x)
    return m.n(y)


def added_to_a_view(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(2, 2, 4, 4)
    y[:, :1].add_(m.a(x)[:, :1])
    return m.n(y)


def given_out(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(2, 2, 4, 4)
    torch.add(m.a(x), 1, out=y)
    return m.n(y)


@pytest.mark.parametrize("run", [written_into, added_in_place, added_to_a_view, given_out])
def test_a_norm_that_follows_is_found_or_missed_aloud(run):
    model = only_tensors(run)

    assert norms(model, IMAGE)["a"] == "n" or warnings_about(model, example_input=IMAGE) != ""


Pair = namedtuple("Pair", "image other")

INPUTS = [
    ((IMAGE, 2), lambda m, x, y: m.n(m.a(x * y))),
    (([IMAGE, IMAGE],), lambda m, xs: m.n(m.a(xs[0] + xs[1]))),
    ({"image": IMAGE}, lambda m, batch: m.n(m.a(batch["image"]))),
    ([IMAGE], lambda m, batch: m.n(m.a(batch[0]))),
    ((Pair(IMAGE, 1),), lambda m, batch: m.n(m.a(batch.image))),
]


class Unpacks(nn.Module):
    def __init__(self, run: Any) -> None:
        super().__init__()
        self.a, self.n, self.run = conv(), norm(), run

    def forward(self, *args: Any) -> Any:
        if not isinstance(args[0], (Tensor, list, dict, Pair)):
            raise TypeError("only for real inputs")
        return self.run(self, *args)


@pytest.mark.parametrize("example_input, run", INPUTS)
def test_kinds_of_input(example_input, run):
    assert norms(Unpacks(run), example_input) == {"a": "n"}


def test_an_input_that_does_not_fit():
    model = only_tensors(lambda m, x: m.n(m.a(x)))

    with pytest.raises(ValueError, match="`example_input` does not fit Model: .*forward raised RuntimeError"):
        look(model, torch.ones(2, 5, 4, 4))


def test_an_input_decides_what_tracing_leaves_open():
    def with_an_option(m: Any, x: Any) -> Any:
        image, option = x if isinstance(x, list) else (x, None)
        return m.n(m.a(image) if option is None else m.a(image) + m.b(option))

    model, image = model_of(with_an_option), IMAGE

    assert is_found_or_missed_aloud(model, {"a": "n"})
    assert norms(model, image) == {"a": "n"}
    assert norms(model, [image, image]) == {"a": "n", "b": "n"}


def test_evaluation_and_training_are_observed():
    model = only_tensors(lambda m, x: m.n(m.a(x)) if m.training else m.n(m.b(x)))

    assert set(norms(model, IMAGE)) == {"a", "b"}


def test_neither_model_nor_input_changes():
    model = only_tensors(lambda m, x: m.n(m.a(x.mul_(2))))
    before, image = {name: value.clone() for name, value in model.state_dict().items()}, IMAGE.clone()

    look(model, image)

    assert torch.equal(image, IMAGE)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_random_states_stay():
    model = only_tensors(lambda m, x: m.n(m.a(x + torch.rand(1) + float(np.random.rand()))))
    states = torch.get_rng_state(), str(np.random.get_state())

    look(model, IMAGE)

    assert torch.equal(torch.get_rng_state(), states[0])
    assert str(np.random.get_state()) == states[1]


def test_a_device_that_has_no_data_cannot_be_observed():
    with torch.device("meta"):
        model = only_tensors(lambda m, x: m.n(m.a(x)))

    assert norms(model, IMAGE.to("meta")) == {"a": "n"}
