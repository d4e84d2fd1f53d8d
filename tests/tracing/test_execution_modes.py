"""A forward that is traced in one mode only, or that does other things in evaluation than in training."""

from typing import Any

import pytest
import torch
from looked_at import Model, conv, is_sure, look, model_of, norm, norms, order, warnings_about
from torch import nn

from ws_algorithm import apply_weight_standardization


class StochasticBlock(nn.Module):
    """As in Composer's stochastic depth: in training, it is left out at random."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = norm(), conv()

    def forward(self, x: Any) -> Any:
        if (not self.training) or bool(torch.bernoulli(torch.tensor(0.5))):
            return x + self.norm(self.conv(x))
        return x


def test_what_is_traced_in_evaluation_only_is_judged_by_it():
    model = nn.Sequential(conv(), norm(), StochasticBlock(), conv())

    assert norms(model) == {"0": "1", "2.conv": "2.norm", "3": None}
    told = warnings_about(model)
    assert "was seen in one mode only: the forward of StochasticBlock '2' cannot be traced in training" in told
    assert "name them in `exclude`" in told
    assert look(model).execution.failure is None
    assert [choice.name for choice in look(model).chosen] == ["0", "2.conv"]


def test_one_mode_is_no_warning_if_norms_are_not_asked_for():
    model = nn.Sequential(conv(), norm(), StochasticBlock())

    assert warnings_about(model, n=1, layers="all") == ""
    assert order(model) == "0 2.conv"


def test_one_mode_is_told_of_a_model_itself():
    assert norms(StochasticBlock()) == {"conv": "norm"}
    assert "the forward of StochasticBlock cannot be traced in training" in warnings_about(StochasticBlock())


@pytest.mark.parametrize("opaque_in_training", [True, False])
def test_a_convolution_that_is_seen_in_no_mode(opaque_in_training):
    """It may run in the mode that was not seen."""

    def run(m: Any, x: Any) -> Any:
        if m.training is opaque_in_training:
            return m.c(m.b(x)) if x.mean() > 0 else x
        return m.n(m.a(x))

    model = model_of(run)
    undecided = {choice.name for choice in look(model).choices if choice.place.undecided}

    assert {"b", "c"} <= undecided
    assert norms(model)["a"] == "n"
    assert "n_last_layers_ignore" in warnings_about(model, n=1)
    assert "b, c" in warnings_about(model)


def test_a_norm_in_one_mode_only():
    for normalizes in (True, False):
        model = model_of(lambda m, x, at=normalizes: m.n(m.a(x)) if m.training is at else m.a(x))

        assert norms(model) == {"a": None}
        assert is_sure(model)


def test_an_auxiliary_head_in_training():
    """It is found in its place, although evaluation does not use it."""

    def run(m: Any, x: Any) -> Any:
        x = m.n(m.a(x))
        return (m.b(x), m.c(x)) if m.training else m.c(x)

    assert norms(model_of(run)) == {"a": "n", "b": None, "c": None}
    assert is_sure(model_of(run))


def test_an_order_that_depends_on_the_mode():
    model = model_of(lambda m, x: m.b(m.a(x)) if m.training else m.a(m.b(x)))

    assert not is_sure(model)
    assert "the order of its convolutions depends on its mode" in warnings_about(model, n=1)


def test_an_order_that_depends_on_the_mode_is_that_of_evaluation_if_observed():
    model = model_of(lambda m, x: m.b(m.a(x)) if m.training else m.a(m.b(x)))

    assert order(model, torch.ones(1, 2, 4, 4)) == "b a"


def test_alternatives_have_no_order(caplog):
    model = model_of(lambda m, x: m.b(m.a(x)) if m.training else m.c(m.a(x)))

    apply_weight_standardization(model, 1)

    assert any("in the place of others" in record.getMessage() for record in caplog.records)


def test_alternatives_that_are_not_traced_have_no_order():
    model = model_of(lambda m, x: m.b(m.a(x)) if x.shape[2] > 100 else m.c(m.a(x)))

    assert not is_sure(model)


def nested(m: Any, x: Any) -> Any:
    if x.shape[0] == 1:
        x = m.a(x)
    elif x.shape[0] == 2:
        x = m.b(x)
    else:
        x = m.c(x)
    return m.d(x)


def behind_two_conditions(m: Any, x: Any) -> Any:
    return m.b(m.a(x)) if x.shape[0] == 1 or x.shape[1] == 3 else m.a(m.b(x))


def behind_a_number(m: Any, x: Any) -> Any:
    return m.b(m.a(x)) if int(x.shape[0]) == 1 else m.a(m.b(x))


def behind_a_count(m: Any, x: Any) -> Any:
    return m.b(m.a(x)) if len(x) % 2 else m.a(m.b(x))


def behind_a_draw(m: Any, x: Any) -> Any:
    return m.b(m.a(x)) if torch.rand(()) < 0.5 else m.a(m.b(x))


def while_it_is_large(m: Any, x: Any) -> Any:
    while x.mean() > 1 and x.shape[0] > 0:
        x = m.b(m.a(x))
    return x


@pytest.mark.parametrize(
    "run", [nested, behind_two_conditions, behind_a_number, behind_a_count, behind_a_draw, while_it_is_large]
)
def test_an_order_that_depends_on_the_input_is_not_taken_for_certain(run):
    model = model_of(run)

    assert not is_sure(model)
    assert len(order(model).split()) == len(look(model).choices)
    assert "n_last_layers_ignore" in warnings_about(model, n=1)


def test_modes_of_a_part():
    """A part that is opaque in training stands there, and its convolutions are known from evaluation."""
    model = Model(lambda m, x: m.c(m.part(m.a(x))), c=conv(), part=StochasticBlock(), a=conv())

    assert order(model) == "a part.conv c"
    assert look(model).execution.doubt is None and look(model).execution.failure is None
