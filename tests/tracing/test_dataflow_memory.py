"""What is changed in place, through an alias, a view or a function: the norm that follows gets something else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from looked_at import conv, model_of, norm
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import stochastic_depth

from tracing.cautious import is_found_or_missed_aloud, truth_about

IMAGE = torch.linspace(-1, 1, 2 * 4 * 4).reshape(1, 2, 4, 4)
BOTH = pytest.mark.parametrize("example_input", [None, IMAGE], ids=["traced", "observed"])


def imul(y: Any) -> None:
    y *= 2


def itruediv(y: Any) -> None:
    y /= 2


def ipow(y: Any) -> None:
    y **= 2


def set_data(y: Any) -> None:
    y.data = y * 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "method": lambda y: y.relu_(),
    "function": lambda y: torch.relu_(y),
    "function of nn": lambda y: F.relu_(y),
    "in place by keyword": lambda y: F.relu(y, inplace=True),
    "in place by position": lambda y: F.relu(y, True),
    "leaky relu by position": lambda y: F.leaky_relu(y, 0.1, True),
    "hardtanh": lambda y: F.hardtanh_(y, -0.1, 0.1),
    "layer": lambda y: nn.ReLU(inplace=True)(y),
    "initialization": lambda y: nn.init.zeros_(y),
    "fill": lambda y: y.fill_(3),
    "out": lambda y: torch.mul(y, 2, out=y),
    "copy": lambda y: y.copy_(y.relu()),
    "multiplication": imul,
    "division": itruediv,
    "power": ipow,
    "data": set_data,
    "through data": lambda y: y.data.mul_(2),
    "through detach": lambda y: y.detach().mul_(2),
    "through a view": lambda y: F.relu_(y.view(-1)),
    "twice": lambda y: y.mul_(2).sub_(1),
}


@pytest.mark.parametrize("way", CHANGES)
@BOTH
def test_a_norm_gets_what_was_changed(way, example_input):
    """Convolution and norm have one tensor, and in between it has become another: the norm does not follow."""
    change = CHANGES[way]
    real = IMAGE.clone()
    change(real)
    assert not torch.equal(real, IMAGE)

    def run(m: Any, x: Any) -> Any:
        y = m.a(x)
        change(y)
        return m.n(y)

    assert is_found_or_missed_aloud(model_of(run), {"a": None}, example_input)


VIEWS: dict[str, Callable[[Any], Any]] = {
    "alias": lambda y: y,
    "view": lambda y: y.view(-1),
    "view_as": lambda y: y.view_as(y),
    "reshape": lambda y: y.reshape(2, 16),
    "flatten": lambda y: torch.flatten(y, 2),
    "unflatten": lambda y: y.unflatten(1, (2, 1)),
    "transpose": lambda y: y.transpose(1, 2),
    "permute": lambda y: y.permute(3, 2, 1, 0),
    "mT": lambda y: y.mT,
    "movedim": lambda y: torch.movedim(y, 1, 3),
    "squeeze": lambda y: y.squeeze(0),
    "unsqueeze": lambda y: y.unsqueeze(0),
    "index": lambda y: y[0],
    "slice": lambda y: y[:, :1],
    "ellipsis": lambda y: y[..., 0],
    "select": lambda y: y.select(1, 0),
    "narrow": lambda y: y.narrow(1, 0, 1),
    "chunk": lambda y: y.chunk(2, 1)[0],
    "split": lambda y: y.split(1, 1)[1],
    "tensor_split": lambda y: torch.tensor_split(y, 2, 1)[1],
    "hsplit": lambda y: y.hsplit(2)[0],
    "vsplit": lambda y: torch.vsplit(y[0], 2)[0],
    "dsplit": lambda y: y.dsplit(2)[0],
    "unbind": lambda y: y.unbind(1)[0],
    "expand": lambda y: y.expand(1, 2, 4, 4),
    "expand_as": lambda y: y.expand_as(y),
    "broadcast_to": lambda y: torch.broadcast_to(y, (1, 2, 4, 4)),
    "broadcast_tensors": lambda y: torch.broadcast_tensors(y)[0],
    "diagonal": lambda y: y.diagonal(0, 2, 3),
    "unfold": lambda y: y.unfold(2, 2, 2),
    "as_strided": lambda y: y.as_strided((2, 2), (1, 2)),
    "detach": lambda y: y.detach(),
    "data": lambda y: y.data,
    "contiguous": lambda y: y.contiguous(),
    "to": lambda y: y.to("cpu"),
    "to of another": lambda y: y.to(y),
    "type_as": lambda y: y.type_as(y),
    "float": lambda y: y.float(),
    "real": lambda y: y.real,
    "conj": lambda y: y.conj(),
    "positive": lambda y: torch.positive(y),
    "atleast": lambda y: torch.atleast_3d(y),
    "identity": lambda y: nn.Identity()(y),
    "flatten layer": lambda y: nn.Flatten()(y),
    "unflatten layer": lambda y: nn.Unflatten(1, (2, 1))(y),
    "dropout in evaluation": lambda y: F.dropout(y, 0.5, False),
    "no dropout": lambda y: nn.Dropout(0.0)(y),
    "feature dropout": lambda y: F.feature_alpha_dropout(y, 0.5, False),
    "stochastic depth": lambda y: stochastic_depth(y, 0.5, "row", False),
    "tuple": lambda y: (y, y)[1],
    "dictionary": lambda y: {"y": y}["y"],
}


@pytest.mark.parametrize("way", VIEWS)
@BOTH
def test_a_view_is_changed_in_place(way, example_input):
    """What it views has changed too."""
    view = VIEWS[way]
    real = -torch.ones(1, 2, 4, 4)
    view(real).relu_()
    assert (real == 0).any()

    def run(m: Any, x: Any) -> Any:
        y = m.a(x)
        view(y).relu_()
        return m.n(y)

    assert is_found_or_missed_aloud(model_of(run), {"a": None}, example_input)


@pytest.mark.parametrize("way", VIEWS)
@BOTH
def test_what_is_viewed_is_changed_in_place(way, example_input):
    """The view has changed too."""
    view = VIEWS[way]
    real = -torch.ones(1, 2, 4, 4)
    viewed = view(real)
    real.relu_()
    assert (viewed == 0).all()

    def run(m: Any, x: Any) -> Any:
        y = m.a(x)
        z = view(y)
        y.relu_()
        return F.layer_norm(z, z.shape)

    assert is_found_or_missed_aloud(model_of(run), {"a": None}, example_input)


def added_in_place(m: Any, x: Any) -> Any:
    y = m.b(x)
    y.add_(m.a(x))
    return m.n(y)


def added_by_operator(m: Any, x: Any) -> Any:
    y = m.b(x)
    y += m.a(x)
    return m.n(y)


def added_to_an_alias(m: Any, x: Any) -> Any:
    y = z = m.b(x)
    z += m.a(x)
    return m.n(y)


def written_into(m: Any, x: Any) -> Any:
    y = torch.zeros(1, 2, 4, 4)
    y[:, :] = m.a(x)
    return m.n(y)


def copied_into(m: Any, x: Any) -> Any:
    y = x.new_empty(1, 2, 4, 4)
    y.copy_(m.a(x))
    return m.n(y)


def copied_into_a_constant(m: Any, x: Any) -> Any:
    y = torch.zeros(1, 2, 4, 4)
    y.copy_(m.a(x))
    return m.n(y)


def copied_into_a_part_of_a_constant(m: Any, x: Any) -> Any:
    y = torch.zeros(1, 2, 4, 4)
    y.view(2, 16).copy_(m.a(x).view(2, 16))
    return m.n(y)


def a_constant_that_changes_later(m: Any, x: Any) -> Any:
    y = torch.zeros(1, 2, 4, 4)
    y.copy_(m.a(x))
    y.relu_()
    return m.n(y)


def added_out(m: Any, x: Any) -> Any:
    y = torch.empty_like(x)
    torch.add(m.a(x), 1, out=y)
    return m.n(y)


def activated_after_the_norm(m: Any, x: Any) -> Any:
    y = m.a(x)
    z = m.n(y)
    y.relu_()
    return z + y


def a_shortcut_that_changes(m: Any, x: Any) -> Any:
    y = m.a(x)
    shortcut = nn.Identity()(y)
    return m.n(shortcut + m.b(m.relu(y)))


def a_clone_that_changes(m: Any, x: Any) -> Any:
    y = m.a(x)
    y.clone().relu_()
    return m.n(y)


def a_sum_that_changes(m: Any, x: Any) -> Any:
    y = m.a(x)
    (y + x).relu_()
    return m.n(y)


def copied_over(m: Any, x: Any) -> Any:
    y = m.a(x)
    y.copy_(m.b(x))
    return m.n(y)


IN_PLACE = [
    *(added_in_place, added_by_operator, added_to_an_alias, written_into, copied_into, copied_into_a_constant),
    *(copied_into_a_part_of_a_constant, a_constant_that_changes_later, added_out, activated_after_the_norm),
    *(a_shortcut_that_changes, a_clone_that_changes, a_sum_that_changes, copied_over),
]


@pytest.mark.parametrize("run", IN_PLACE)
@BOTH
def test_what_tensors_say_is_found_or_missed_aloud(run, example_input):
    model = model_of(run)

    assert is_found_or_missed_aloud(model, truth_about(model, IMAGE), example_input)


class BufferModel(nn.Module):
    """Keeps the output of its convolution in a buffer."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.n, self.change = conv(), norm(), change
        self.register_buffer("kept", torch.zeros(1, 2, 4, 4))
        self.kept: Tensor

    def forward(self, x: Any) -> Any:
        self.kept.copy_(self.a(x))
        self.change(self.kept)
        return self.n(self.kept)


@pytest.mark.parametrize("change", [lambda kept: kept, lambda kept: kept.relu_()], ids=["as it is", "activated"])
def test_a_buffer_that_is_written(change):
    model = BufferModel(change)
    truth = truth_about(BufferModel(change), IMAGE)

    assert is_found_or_missed_aloud(model, truth)
