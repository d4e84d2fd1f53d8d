"""What is known of a model whose forward cannot be traced as a whole: its parts, and an honest doubt about the rest."""

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from looked_at import Model, conv, is_sure, look, model_of, norm, norms, order, warnings_about
from torch import Tensor, nn
from torch.nn import functional as F


def not_for_symbols(x: Any) -> None:
    """What no symbol passes."""
    if type(x) is not Tensor:
        raise TypeError("only for tensors")


class Opaque(nn.Module):
    """Its parts can be traced, it cannot."""

    def __init__(self, run: Any, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.run = run

    def forward(self, x: Any) -> Any:
        not_for_symbols(x)
        return self.run(self, x)


def places(model: nn.Module) -> dict[str, tuple[str, bool, bool]]:
    choices = look(model).choices
    return {c.name: (c.place.found, c.place.norm is not None, c.place.undecided) for c in choices}


def test_parts():
    """The last convolution of the stem ends it, and what comes after is not known; the head has a norm of its own."""
    stem = nn.Sequential(conv(), norm(), conv())
    head = nn.Sequential(norm(), conv(), norm(), conv())
    model = Opaque(lambda m, x: m.head(m.stem(x)), head=head, stem=stem)

    assert places(model) == {
        "head.1": ("traced in parts", True, False),
        "head.3": ("traced in parts", False, True),  # the stem might follow
        "stem.0": ("traced in parts", True, False),
        "stem.2": ("traced in parts", False, True),
    }
    assert "stem.2" in warnings_about(model)
    assert "cannot be traced (TypeError: only for tensors)" in warnings_about(model, n=1)


def test_one_part_is_the_whole():
    model = Opaque(lambda m, x: m.net(x), net=nn.Sequential(conv(), norm(), conv()))

    assert places(model) == {"net.0": ("traced", True, False), "net.2": ("traced", False, False)}
    assert warnings_about(model, n=1) == ""


def test_layers_of_an_untraceable_forward():
    model = Opaque(lambda m, x: m.n(m.a(m.b(x))), a=conv(), n=norm(), b=conv())

    assert places(model) == {"a": ("defined", False, True), "b": ("defined", False, True)}
    for name in ("a", "b"):
        assert name in warnings_about(model)


@pytest.mark.parametrize("function", ["group_norm", "layer_norm", "instance_norm"])
def test_a_functional_norm_in_an_untraceable_forward(function):
    arguments = {"group_norm": (2,), "layer_norm": ((4,),), "instance_norm": ()}[function]
    model = Opaque(lambda m, x: m.b(getattr(F, function)(m.a(x), *arguments)), a=conv(), b=conv())

    assert "a" in warnings_about(model)


@dataclasses.dataclass
class Features:
    map: Any


def test_a_part_that_returns_an_object():
    part = Model(lambda m, x: Features(m.conv(x)), conv=conv())
    model = Opaque(lambda m, x: m.head(m.norm(m.part(x).map)), part=part, norm=norm(), head=conv())

    assert "part.conv" in warnings_about(model)


def test_a_part_that_keeps_its_output():
    def keep(m: Any, x: Any) -> Any:
        m.kept = m.conv(x)
        return x

    part = Model(keep, conv=conv())
    model = Opaque(lambda m, x: m.head(m.norm(m.part(x) + m.part.kept)), part=part, norm=norm(), head=conv())

    assert "part.conv" in warnings_about(model)


def test_a_part_that_is_called_in_another_way():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv(), norm()

        def forward(self, x: Any, normalize: bool = True) -> Any:
            x = self.conv(x)
            return self.norm(x) if normalize else x

    model = Opaque(lambda m, x: m.head(m.block(x, normalize=False)), block=Block(), head=conv())

    assert norms(model)["block.conv"] is None or not is_sure(model)


def test_no_doubt_without_a_count():
    model = Opaque(lambda m, x: m.b(m.a(x)), a=conv(), b=conv())

    for n in (0, 2, 3):  # none or all of the two
        assert "n_last_layers_ignore" not in warnings_about(model, n)
    assert "n_last_layers_ignore" in warnings_about(model, 1)


def test_a_convolution_in_a_mode_that_cannot_be_traced():
    """In evaluation, `b` is the last; a user would have to be told that this was not seen."""

    def run(m: Any, x: Any) -> Any:
        x = m.a(x)
        if m.training:
            return m.c(x)
        x = m.b(x)
        not_for_symbols(x)
        return x

    assert warnings_about(model_of(run), n=1) != ""


def test_a_convolution_in_a_branch_that_cannot_be_traced():
    def run(m: Any, x: Any) -> Any:
        x = m.a(x)
        if x.shape[0] > 1:
            return m.c(x)
        x = m.b(x)
        not_for_symbols(x)
        return x

    assert warnings_about(model_of(run), n=1) != ""


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


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), random.random, np.random.rand], ids=["torch", "py", "np"])
def test_layers_that_are_left_out_at_random(draw):
    """In the order in which they run, all of them; or else in doubt."""
    model = LayerDrop(draw)

    assert order(model) == "layers.0 layers.1 layers.2 layers.3 layers.4 layers.5 head" or not is_sure(model)


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), random.random, np.random.rand], ids=["torch", "py", "np"])
def test_a_norm_that_is_left_out_at_random(draw):
    def run(m: Any, x: Any) -> Any:
        x = m.a(x)
        return m.n(x) if draw() < 0.9 else x

    assert norms(model_of(run))["a"] is None
