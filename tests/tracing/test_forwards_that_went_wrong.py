"""Forwards that were once taken for others. Mostly, there is an activation between a convolution and its norm."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from looked_at import Model, conv, is_sure, look, model_of, norm, norms, warnings_about
from torch import Tensor, nn
from torch.nn import functional as F

from ws_algorithm import inspect_convolutions

ATEN: Any = torch.ops.aten


def activated(change: Callable[[Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    """A forward that changes the output of a convolution through another name."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        change(y)
        return m.n(y)

    return run


def caught(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    try:
        y = F.relu(y) if len(x) else y
    except RuntimeError:
        pass
    return m.n(y)


def written_by_an_operator(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(1, 2, 4, 4)
    ATEN.copy_(y, m.a(x))
    y.relu_()
    return m.n(y)


WRONG: dict[str, Callable] = {
    "list of tensors": activated(lambda y: getattr(torch, "_foreach_mul_")([y], 2.0)),  # noqa: B009 - not in torch's stubs
    "diagonal": activated(lambda y: torch.linalg.diagonal(y).relu_()),
    "slice of aten": activated(lambda y: ATEN.slice(y, 0, 0, 1).relu_()),
    "grid": activated(lambda y: torch.meshgrid(y[0, 0, 0], indexing="ij")[0].relu_()),
    "written over": activated(lambda y: torch.add(torch.ones(1, 2, 4, 4), 1, out=y)),
    "data": activated(lambda y: setattr(y, "data", F.relu(y))),
    "no gradient yet": lambda m, x: m.n(F.relu(m.a(x)) if x.grad_fn is None else m.a(x)),
    "no gradient of a parameter": lambda m, x: m.n(F.relu(m.a(x)) if m.n.weight.grad is None else m.a(x)),
    "with gradients in training": lambda m, x: m.n(F.relu(m.a(x)) if torch.is_grad_enabled() else m.a(x)),
    "no keys": lambda m, x: m.n(m.a(x) if hasattr(x, "keys") else F.relu(m.a(x))),
    "a refusal that is caught": caught,
    "written by an operator": written_by_an_operator,
}


@pytest.mark.parametrize("way", WRONG)
def test_no_norm_follows_what_is_activated(way):
    assert norms(model_of(WRONG[way])).get("a") is None


@pytest.mark.parametrize("forward", [F.relu, nn.ReLU().forward], ids=["function", "method"])
def test_a_forward_of_torch_that_takes_the_place_of_another(forward):
    layer: Any = nn.Identity()
    layer.forward = forward

    assert norms(nn.Sequential(conv(), layer, norm())) == {"0": None}


class Block(nn.Module):
    """A convolution and its norm, unless it is called otherwise, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), norm()

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        if plain:
            return F.relu(self.conv(x if x.mean() > 0 else -x))
        return self.norm(self.conv(x))


def test_a_block_that_is_called_in_two_ways():
    model = Model(lambda m, x: m.block(m.block(x), plain=True), block=Block())

    assert norms(model) == {"block.conv": None}
    assert not is_sure(model)


def test_modes_of_different_order_keep_what_is_known():
    """The block is not called, its convolution is; only the order of `a` and `b` depends on the mode."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.block.conv(x))
        return m.a(m.b(x)) if m.training else m.b(m.a(x))

    model = Model(run, block=Block(), a=conv(), b=conv())

    assert norms(model) == {"block.conv": None, "a": None, "b": None}
    assert "the order of its convolutions depends on its mode" in warnings_about(model, n=1)


def test_parts_of_what_cannot_be_traced_are_taken_at_their_word_and_it_is_said():
    def run(m: Any, x: Tensor) -> Tensor:
        for layer in m.net if len(x) else []:
            x = F.relu(layer(x))
        return x

    model = Model(run, net=nn.Sequential(conv(), norm()))

    assert "Its parts are taken to be used through their own forward" in warnings_about(model)
    assert norms(model, torch.ones(1, 2, 4, 4)) == {"net.0": None}


class Wrapper(nn.Module):
    """Not one of ``torch.compile``, but with an attribute of that name."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = nn.Sequential(conv(), norm())

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod[1](F.relu(self._orig_mod[0](x)))


def test_a_wrapper_with_an_attribute_of_the_compiler():
    assert norms(Wrapper()) == {"_orig_mod.0": None}


LAST: dict[str, Callable] = {
    "by keyword": lambda m, x: F.conv2d(weight=m.b.weight, input=m.a(x), padding=1),
    "weight on the left": lambda m, x: m.b.weight[:, :, 1, 1] @ m.a(x).flatten(2),
    "type of a weight": lambda m, x: torch.einsum("bchw,bchw->bhw", m.b(F.relu(m.a(x))), x.type_as(m.a.weight)),
}


@pytest.mark.parametrize("way", LAST)
def test_the_last_convolution(way):
    assert [choice.name for choice in look(model_of(LAST[way]), n=1, layers="all").choices] == ["a", "b"]


class Perhaps(nn.Module):
    """May use its convolution; what the trace cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.mean() > 0 else x


def test_a_convolution_that_may_not_run_is_counted_with_a_doubt():
    last, middle = nn.Sequential(conv(), Perhaps()), nn.Sequential(Perhaps(), conv())

    assert "whether 1.conv runs is not known" in warnings_about(last, n=1, layers="all")
    assert "is not certain" not in warnings_about(middle, n=1, layers="all")


def test_a_norm_without_a_name():
    model: Any = Model(lambda m, x: m.kept[0](m.conv(x)), conv=conv())
    model.kept = [norm()]

    (record,) = inspect_convolutions(model, layers="normalized")

    assert record.normalized_by == "(BatchNorm2d)"
