"""Forwards with every kind of Python in them: they are traced exactly, or their module is opaque and the doubt told."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from looked_at import Model, conv, is_sure, look, model_of, norm, norms, warnings_about
from torch import Tensor, nn
from torch.nn import functional as F

from tracing.cautious import is_found_or_missed_aloud
from ws_algorithm.tracing.graph import traced_forward


def unpacks_the_shape(m: Any, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return m.n(m.b(m.a(x))).view(batch, channels, height * width)


def tries(m: Any, x: Tensor) -> Tensor:
    try:
        x = m.missing(x)
    except AttributeError:
        x = m.a(x)
    return m.n(m.b(x))


def prints(m: Any, x: Tensor) -> Tensor:
    m.text = f"{x} {x.shape!r} {x.mean()}" + str(x.shape)
    return m.n(m.b(m.a(x)))


def lists(m: Any, x: Tensor) -> Tensor:
    m.values = x.mean((1, 2, 3)).tolist()
    return m.n(m.b(m.a(x)))


def draws_for_its_input(m: Any, x: Tensor) -> Tensor:
    return m.n(m.b(m.a(x + torch.randn_like(x))))


def scopes(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        x = m.a(x)
    return m.n(m.b(x).float())


def not_scripted(m: Any, x: Tensor) -> Tensor:
    if not (torch.jit.is_scripting() or torch.compiler.is_compiling()):  # pyright: ignore[reportPrivateImportUsage]
        x = m.a(x)
    return m.n(m.b(x))


def mixes_constants(m: Any, x: Tensor) -> Tensor:
    return m.n(m.b(m.a(x + m.n.weight.view(1, -1, 1, 1) * torch.ones(1, 2, 1, 1))))


def asks_a_shape_of_its_own(m: Any, x: Tensor) -> Tensor:
    return m.n(m.b(m.a(x))) if m.a.weight.shape[0] == 2 and m.n.running_mean.ndim == 1 else m.n(m.a(m.b(x)))


def knows_that_it_was_given_something(m: Any, x: Tensor) -> Tensor:
    return m.n(m.a(m.b(x))) if x is None else m.n(m.b(m.a(x)))


TRACED: list[Callable] = [
    *(unpacks_the_shape, tries, prints, lists, draws_for_its_input, scopes, not_scripted, mixes_constants),
    *(asks_a_shape_of_its_own, knows_that_it_was_given_something),
]


@pytest.mark.parametrize("run", TRACED)
def test_a_forward_is_traced(run):
    model = model_of(run)

    assert norms(model) == {"a": None, "b": "n"}
    assert is_sure(model)
    assert look(model).execution.in_one_mode == ()


def checked(m: Any, x: Tensor) -> Tensor:
    assert x.ndim == 4 and x.shape[1] == 3
    return m.n(m.b(m.a(x)))


def checked_by_length(m: Any, x: Tensor) -> Tensor:
    assert len(x.shape) == 4
    return m.n(m.b(m.a(x)))


def checked_by_type(m: Any, x: Tensor) -> Tensor:
    assert isinstance(x, Tensor)
    return m.n(m.b(m.a(x)))


def one_image(m: Any, x: Tensor) -> Tensor:
    if x.shape[0] == 1:
        x = x + 1
    return m.n(m.b(m.a(x)))


def early_return(m: Any, x: Tensor) -> Tensor:
    x = m.n(m.b(m.a(x)))
    if x.isnan().any():
        return x * 0
    return x


def while_large(m: Any, x: Tensor) -> Tensor:
    while x.shape[-1] > 8:
        x = F.avg_pool2d(x, 2)
    return m.n(m.b(m.a(x)))


def while_not(m: Any, x: Tensor) -> Tensor:
    converged = False
    while not converged:
        x = m.n(m.b(m.a(x)))
        converged = x.abs().max() < 1
    return x


def length(m: Any, x: Tensor) -> Tensor:
    return m.n(m.b(m.a(x[: len(x)])))


def per_image(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.n(m.b(m.a(x[i : i + 1]))) for i in range(x.shape[0])])


def iterates(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.n(m.b(m.a(image[None]))) for image in x])


def scales(m: Any, x: Tensor) -> Tensor:
    return F.interpolate(m.n(m.b(m.a(x * float(x.mean()) + x.max().item()))), size=int(x.shape[-1] * 2))


def new_tensors(m: Any, x: Tensor) -> Tensor:
    return m.n(m.b(m.a(x + torch.zeros(x.size(0), 1, 1, 1) + x.new_zeros(1))) + torch.ones(2, 1, 1))


def formats(m: Any, x: Tensor) -> Tensor:
    m.text = f"{x.mean():.3f} {x.shape[0]:>4}"
    return m.n(m.b(m.a(x)))


def arrays(m: Any, x: Tensor) -> Tensor:
    m.values = np.asarray(x.detach().cpu().numpy())
    return m.n(m.b(m.a(x)))


def seeds(m: Any, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return m.n(m.b(m.a(x + torch.rand(2, 1, 1) + torch.randn_like(x))))


def draws(m: Any, x: Tensor) -> Tensor:
    return m.n(m.b(m.a(x))) if torch.rand(()) < 0.5 else m.n(m.b(m.a(-x)))


def branches_of_one_order(m: Any, x: Tensor) -> Tensor:
    return m.n(m.b(m.a(x))) if x.mean() > 0 else m.n(m.b(F.relu(m.a(x))))


def asks_a_buffer(m: Any, x: Tensor) -> Tensor:
    if m.n.num_batches_tracked == 0:
        x = x + 1
    return m.n(m.b(m.a(x)))


def writes_where_negative(m: Any, x: Tensor) -> Tensor:
    x[x < 0] = 0
    return m.n(m.b(m.a(x)))


def calls_itself_until_it_is_small(m: Any, x: Tensor) -> Tensor:
    return m(F.avg_pool2d(x, 2)) if x.shape[-1] > 8 else m.n(m.b(m.a(x)))


def calls_itself_without_end(m: Any, x: Tensor) -> Tensor:
    return m(m.n(m.b(m.a(x))))


NOT_TRACED: list[Callable] = [
    *(checked, checked_by_length, checked_by_type, one_image, early_return, while_large, while_not, length, per_image),
    *(iterates, scales, new_tensors, formats, arrays, seeds, draws, branches_of_one_order, asks_a_buffer),
    *(writes_where_negative, calls_itself_until_it_is_small, calls_itself_without_end),
]


@pytest.mark.parametrize("run", NOT_TRACED)
def test_a_forward_that_is_not_traced_is_told(run):
    model = model_of(run)

    assert is_found_or_missed_aloud(model, {"a": None, "b": "n"})
    assert "the forward of Model cannot be traced" in warnings_about(model)


class Result:
    def __init__(self, value: Any) -> None:
        self.value = value


RETURNED: dict[str, Callable[[Any], Any]] = {
    "list": lambda x: [x],
    "dictionary": lambda x: {"out": x, 1: x},
    "nothing": lambda x: None,
    "number": lambda x: 3,
    "object": Result,
    "list of objects": lambda x: [Result(x)],
    "iterator": lambda x: (part for part in (x,)),
    "set": lambda x: {x},
}


@pytest.mark.parametrize("kind", RETURNED)
def test_what_a_forward_returns(kind):
    model = model_of(lambda m, x: RETURNED[kind](m.n(m.a(x))))

    assert is_found_or_missed_aloud(model, {"a": "n"})


def test_steps_of_an_opaque_module_are_not_in_the_graph():
    part = Model(one_image, a=conv(), b=conv(), n=norm())
    model = nn.Sequential(conv(), part, norm())

    traced = traced_forward(model, training=False)

    assert [step.layer for step in traced.run] == [None, model[0], part, model[2], None]
    assert [step.hidden for step in traced.run] == [False, False, True, False, False]
    assert list(traced.opaque) == [part]


def test_a_forward_with_many_conditions_takes_no_time():
    names: dict[str, Any] = {}
    lines = [f"    if x[{i}] > 0:\n        x = x + 1\n" for i in range(40)]  # 2**40 ways
    exec("def run(m, x):\n" + "".join(lines) + "    return m.b(m.a(x))", names)  # noqa: S102

    assert not is_sure(model_of(names["run"]))
    assert len(look(model_of(names["run"])).choices) == 2
