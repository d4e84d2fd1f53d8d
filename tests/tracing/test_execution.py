"""What is known of a model whose forward cannot be traced as a whole: its parts, and that the rest is not known."""

import dataclasses
from typing import Any

import pytest
import torch
from looked_at import Model, conv, is_sure, look, model_of, norm, norms, order, warnings_about
from torch import Tensor, nn
from torch.nn import functional as F

from tracing.cautious import truth_about


def not_for_symbols(x: Any) -> None:
    """What no value passes that is not known yet."""
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
    assert "the forward of Opaque cannot be traced (TypeError: only for tensors, at " in warnings_about(model, n=1)


def test_one_part_is_the_whole():
    """Its order is that of the model; what follows its last convolution is not known."""
    model = Opaque(lambda m, x: m.net(x), net=nn.Sequential(conv(), norm(), conv()))

    assert places(model) == {"net.0": ("traced", True, False), "net.2": ("traced", False, True)}
    assert warnings_about(model, n=1, layers="all") == ""
    assert "net.2" in warnings_about(model)


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


def test_an_opaque_part_stands_at_its_place():
    """Whose convolutions run between those of its parent, and which is defined after both."""
    part = Opaque(lambda m, x: m.inner(x), inner=conv())
    model = Model(lambda m, x: m.last(m.part(m.first(x))), last=conv(), first=conv(), part=part)

    assert order(model) == "first part.inner last"
    assert {name: found for name, (found, _, _) in places(model).items()} == dict.fromkeys(places(model), "traced")
    assert warnings_about(model, n=1, layers="all").count("not certain") == 0
    assert [choice.name for choice in look(model, n=1, layers="all").chosen] == ["first", "part.inner"]


def test_an_opaque_part_inside_of_an_opaque_part():
    inner = Opaque(lambda m, x: m.b(m.a(x)), b=conv(), a=conv())
    model = nn.Sequential(conv(), Opaque(lambda m, x: m.inner(x), inner=inner), conv())

    assert order(model) == "0 1.inner.b 1.inner.a 2"  # the order of definition, and so in doubt
    assert not is_sure(model)
    assert "the forward of Opaque '1.inner' cannot be traced" in warnings_about(model, n=2)


def test_what_is_defined_first_is_called_last():
    model = Model(lambda m, x: m.head(m.body(m.stem(x))), head=conv(), stem=conv(), body=conv())

    assert order(model) == "stem body head"
    assert is_sure(model)


def test_parts_in_the_order_of_their_definition_are_in_doubt():
    """In truth `b` comes first."""
    model = Opaque(lambda m, x: m.a(m.b(x)), a=nn.Sequential(conv()), b=nn.Sequential(conv()))

    assert order(model) == "a.0 b.0"
    assert "counted in the order in which they are defined" in warnings_about(model, n=1, layers="all")


@pytest.mark.parametrize("container", [nn.ModuleList, lambda parts: nn.ModuleDict(dict(zip("ab", parts, strict=True)))])
def test_a_container_of_parts(container):
    """It has no forward: its parts are those of the module that has it."""
    model = Opaque(
        lambda m, x: x, blocks=container([nn.Sequential(conv(), norm()), nn.Sequential(conv(), norm())]), head=conv()
    )

    assert [found for found, _, _ in places(model).values()] == ["traced in parts", "traced in parts", "defined"]
    assert [is_normalized for _, is_normalized, _ in places(model).values()] == [True, True, False]
    assert [name.rpartition(".")[2] for name in places(model)] == ["0", "0", "head"]


def test_one_part_in_a_container_is_the_whole():
    model = Opaque(lambda m, x: m.nets[0](x), nets=nn.ModuleList([nn.Sequential(conv(), norm())]))

    assert places(model) == {"nets.0.0": ("traced", True, False)}
    assert is_sure(model)


def test_a_convolution_that_two_opaque_parts_share():
    """In one of them a norm follows it, in the other not."""
    shared = conv()
    normalizes = Opaque(lambda m, x: m.net(x), net=nn.Sequential(shared, norm()))
    activates = Opaque(lambda m, x: m.net(x), net=nn.Sequential(shared, nn.ReLU()))

    for first, second in ((normalizes, activates), (activates, normalizes)):
        assert norms(nn.Sequential(first, second)) == {"0.net.0": None}


def test_a_convolution_that_an_opaque_part_shares_with_its_parent():
    """The parent normalizes it, and the part does not, or may not."""
    shared = conv()
    part = Opaque(lambda m, x: m.net(x), net=nn.Sequential(shared, nn.ReLU()))
    model = Model(lambda m, x: m.part(m.norm(m.shared(x))), shared=shared, norm=norm(), part=part)

    assert norms(model) == {"shared": None}


def test_a_part_that_is_called_twice():
    """Its convolutions stand where it runs last."""
    part = Opaque(lambda m, x: m.net(x), net=nn.Sequential(conv(), norm()))
    model = Model(lambda m, x: m.part(m.b(m.part(m.a(x)))), part=part, a=conv(), b=conv())

    assert order(model) == "a b part.net.0"
    assert norms(model)["part.net.0"] == "part.net.1"


def test_a_part_that_takes_a_convolution_is_looked_into_once():
    """What follows a convolution goes into a part that is not looked into: a norm may follow there."""
    model = Model(lambda m, x: m.part(m.a(x)), a=conv(), part=Opaque(lambda m, x: m.n(x), n=norm()))

    assert places(model) == {"a": ("traced", False, True)}
    told = warnings_about(model)
    assert "Whether a normalization layer follows a cannot be told without an input" in told
    assert "the forward of Opaque 'part' cannot be traced" in told


def test_a_part_that_is_never_called():
    model = Model(lambda m, x: m.n(m.a(x)), a=conv(), n=norm(), spare=Opaque(lambda m, x: m.b(x), b=conv()))

    assert norms(model) == {"a": "n"}
    assert [(choice.name, choice.place.executed) for choice in look(model).choices] == [("spare.b", False), ("a", True)]
    assert "spare.b: forward does not use them" in warnings_about(model)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_under_a_default_device(device):
    with torch.device(device):
        assert norms(model_of(lambda m, x: m.n(m.a(x)))) == {"a": "n"}


class Changes(nn.Module):
    """Its forward cannot be traced, and changes what it is given, wherever it is in it."""

    def forward(self, x: Any) -> Any:
        values = list(x.values()) if type(x) is dict else x if type(x) is list else [x]
        for value in values:
            if value.mean() < 100:
                value.relu_()
        return torch.zeros(1)


@pytest.mark.parametrize("pack", [lambda y: y, lambda y: [y], lambda y: {"y": y}, lambda y: y.view(-1)])
def test_a_hidden_change(pack):
    def run(m: Any, x: Any) -> Any:
        y = m.conv(x)
        m.part(pack(y))
        return m.norm(y)

    model = Model(run, conv=conv(), part=Changes(), norm=norm())

    assert truth_about(model, torch.ones(1, 2, 4, 4)) == {"conv": None}
    assert norms(model) == {"conv": None}
    assert not is_sure(model)
