"""Forwards with every kind of Python in them, run with symbols: the order found and whether it is certain."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from looked_at import is_sure, look, model_of, norms, order, within
from torch import Tensor
from torch.nn import functional as F


def checked(m: Any, x: Tensor) -> Tensor:
    assert x.ndim == 4 and x.shape[1] == 3
    return m.n(m.b(m.a(x)))


def checked_by_length(m: Any, x: Tensor) -> Tensor:
    assert len(x.shape) == 4
    return m.n(m.b(m.a(x)))


def checked_by_type(m: Any, x: Tensor) -> Tensor:
    assert isinstance(x, Tensor)
    return m.n(m.b(m.a(x)))


def unpacks_the_shape(m: Any, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return m.n(m.b(m.a(x))).view(batch, channels, height * width)


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


def tries(m: Any, x: Tensor) -> Tensor:
    try:
        x = m.missing(x)
    except AttributeError:
        x = m.a(x)
    return m.n(m.b(x))


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


def prints(m: Any, x: Tensor) -> Tensor:
    m.text = f"{x} {x.shape!r} {x.mean()}" + str(x.shape)
    return m.n(m.b(m.a(x)))


def formats(m: Any, x: Tensor) -> Tensor:
    m.text = f"{x.mean():.3f} {x.shape[0]:>4}"
    return m.n(m.b(m.a(x)))


def lists(m: Any, x: Tensor) -> Tensor:
    m.values = x.mean((1, 2, 3)).tolist()
    return m.n(m.b(m.a(x)))


def arrays(m: Any, x: Tensor) -> Tensor:
    m.values = np.asarray(x.detach().cpu().numpy())
    return m.n(m.b(m.a(x)))


def seeds(m: Any, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return m.n(m.b(m.a(x + torch.rand(2, 1, 1) + torch.randn_like(x))))


def draws(m: Any, x: Tensor) -> Tensor:
    return m.n(m.b(m.a(x))) if torch.rand(()) < 0.5 else m.n(m.b(m.a(-x)))


def scopes(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        x = m.a(x)
    return m.n(m.b(x).float())


def not_scripted(m: Any, x: Tensor) -> Tensor:
    if not (torch.jit.is_scripting() or torch.compiler.is_compiling()):  # pyright: ignore[reportPrivateImportUsage]
        x = m.a(x)
    return m.n(m.b(x))


def branches_of_one_order(m: Any, x: Tensor) -> Tensor:
    return m.n(m.b(m.a(x))) if x.mean() > 0 else m.n(m.b(F.relu(m.a(x))))


def mixes_constants(m: Any, x: Tensor) -> Tensor:
    return m.n(m.b(m.a(x + m.n.weight.view(1, -1, 1, 1) * torch.ones(1, 2, 1, 1))))


def asks_a_buffer(m: Any, x: Tensor) -> Tensor:
    if m.n.num_batches_tracked == 0:
        x = x + 1
    return m.n(m.b(m.a(x)))


TRACED: list[Callable] = [
    *(checked, checked_by_length, checked_by_type, unpacks_the_shape, one_image, early_return, while_large, while_not),
    *(tries, length, per_image, iterates, scales, new_tensors, prints, formats, lists, arrays, seeds, draws, scopes),
    *(not_scripted, branches_of_one_order, mixes_constants, asks_a_buffer),
]


@pytest.mark.parametrize("run", TRACED)
def test_a_forward_is_understood(run):
    model = model_of(run)

    assert norms(model) == {"a": None, "b": "n"}
    assert is_sure(model)


def test_conditions_in_a_while_loop_come_to_an_end():
    def run(m: Any, x: Tensor) -> Tensor:
        while x.mean() > 1 and x.shape[0] > 0:
            x = m.a(x)
        return x

    with within(10):
        look(model_of(run))


def nested(m: Any, x: Tensor) -> Tensor:
    if x.shape[0] == 1:
        x = m.a(x)
    elif x.shape[0] == 2:
        x = m.b(x)
    else:
        x = m.c(x)
    return m.d(x)


def nested_in_two(m: Any, x: Tensor) -> Tensor:
    if x.shape[0] == 1:
        return m.d(m.a(x))
    if x.shape[1] == 1:
        return m.d(m.b(x))
    return m.d(m.c(x))


@pytest.mark.parametrize("run", [nested, nested_in_two])
def test_all_ways_are_tried(run):
    found = order(model_of(run)).split()

    assert sorted(found) == ["a", "b", "c", "d"]
    assert found[-1] == "d"


def behind_two_conditions(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) if x.shape[0] == 1 or x.shape[1] == 3 else m.a(m.b(x))


def behind_a_number(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) if int(x.shape[0]) == 1 else m.a(m.b(x))


def behind_a_count(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) if len(x) % 2 else m.a(m.b(x))


def behind_a_draw(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) if torch.rand(()) < 0.5 else m.a(m.b(x))


def behind_the_mode(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) if m.training else m.a(m.b(x))


@pytest.mark.parametrize(
    "run", [behind_two_conditions, behind_a_number, behind_a_count, behind_a_draw, behind_the_mode]
)
def test_an_order_that_depends_on_the_input_is_not_taken_for_certain(run):
    assert not is_sure(model_of(run))


def test_calling_itself_until_it_is_small():
    def run(m: Any, x: Tensor) -> Tensor:
        return m(F.avg_pool2d(x, 2)) if x.shape[-1] > 8 else m.n(m.b(m.a(x)))

    assert norms(model_of(run)) == {"a": None, "b": "n"}


def test_a_forward_with_too_many_conditions_is_given_up():
    lines = [f"    if x[{i}] > 0:\n        x = x + 1\n" for i in range(40)]  # beyond what is tried
    names: dict[str, Any] = {}
    exec("def run(m, x):\n" + "".join(lines) + "    return m.b(m.a(x))", names)  # noqa: S102

    assert not is_sure(model_of(names["run"]))
