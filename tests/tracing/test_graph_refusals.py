"""What a forward may not ask about a value that is not known yet, and how the refusal is told to the user."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from looked_at import Model, conv, is_sure, model_of, norm, norms, warnings_about
from torch import Tensor, nn
from torch.nn import functional as F

from tracing.cautious import is_found_or_missed_aloud


def one_image(m: Any, x: Tensor) -> Tensor:
    if x.shape[0] == 1:
        x = x + 1
    return m.n(m.b(m.a(x)))


QUESTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "isinstance of a tensor": lambda m, x: isinstance(x, Tensor),
    "isinstance of a dictionary": lambda m, x: isinstance(x, dict),
    "isinstance of several": lambda m, x: isinstance(x, (list, tuple)),
    "isinstance of what is computed": lambda m, x: isinstance(m.a(x), Tensor),
    "isinstance of an attribute": lambda m, x: isinstance(x.shape, tuple),
    "isinstance of a number": lambda m, x: isinstance(x.shape[0], int),
    "isinstance of a parameter": lambda m, x: isinstance(m.n.weight, nn.Parameter),
    "is_tensor": lambda m, x: torch.is_tensor(x),
    "class": lambda m, x: x.__class__ is Tensor,
    "hasattr": lambda m, x: hasattr(x, "image"),
    "getattr with a default": lambda m, x: getattr(x, "image", None) is None,
    "key of a dictionary": lambda m, x: {x: True}.get(x),
    "lookup in a dictionary": lambda m, x: x in {0: True},
    "lookup in a list": lambda m, x: x in [0, 1],
    "shape in a dictionary": lambda m, x: x.shape in {(2, 2): True},
    "truth": lambda m, x: bool(x.mean()),
    "length": lambda m, x: len(x),
    "index": lambda m, x: [True, False][x.shape[0]],
    "item": lambda m, x: x.mean().item() > 0,
    "float": lambda m, x: float(x.mean()) > 0,
    "int": lambda m, x: int(x.shape[0]) == 1,
    "equal": lambda m, x: torch.equal(x, x),
    "dtype": lambda m, x: x.dtype == torch.float32,
    "device": lambda m, x: x.device.type == "meta",
    "shape": lambda m, x: x.shape == (1, 2, 4, 4),
    "any": lambda m, x: any(x),
    "maximum": lambda m, x: max(x.shape[-2:]) > 8,
    "keys": lambda m, x: "image" in x.keys(),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("answer", [True, False])
def test_a_question_about_a_value_is_not_answered(question, answer):
    """A norm follows in one case of two: for whoever takes any answer, in one of these two tests."""
    ask = QUESTIONS[question]
    model = model_of(lambda m, x: m.n(m.a(x)) if bool(ask(m, x)) is answer else m.a(x))

    assert norms(model) == {"a": None}
    assert not is_sure(model)


def asks_in_a_helper(x: Any) -> Any:
    return -x if x.mean() > 0 else x


def causes() -> dict[str, tuple[Callable, str, int, str]]:
    """By kind: a forward, what is said of it, and on which line after its first it fails."""

    def condition(m: Any, x: Any) -> Any:
        if x.mean() > 0:
            x = -x
        return m.a(x)

    def in_a_helper(m: Any, x: Any) -> Any:
        return m.a(asks_in_a_helper(x))

    def within_torch(m: Any, x: Any) -> Any:
        y = m.a(x)
        return F.interpolate(y, size=int(y.shape[-1]))

    def its_own_error(m: Any, x: Any) -> Any:
        raise ValueError("only images. Not these")

    return {
        "condition": (condition, "control flow", 1, "if x.mean() > 0:"),
        "number": (within_torch, "", 2, "return F.interpolate(y, size=int(y.shape[-1]))"),
        "error": (its_own_error, "ValueError: only images", 1, 'raise ValueError("only images. Not these")'),
        "helper": (in_a_helper, "control flow", -1, "return -x if x.mean() > 0 else x"),
    }


@pytest.mark.parametrize("kind", causes())
def test_the_cause_names_file_and_line(kind):
    run, said, lines, source = causes()[kind]
    code = asks_in_a_helper.__code__ if kind == "helper" else run.__code__
    place = f"at {Path(__file__).name}:{code.co_firstlineno + abs(lines)}: {source}"

    told = warnings_about(Model(run, a=conv()))

    assert "the forward of Model cannot be traced" in told
    assert said in told
    assert place in told


def test_the_cause_names_the_module():
    part = Model(one_image, a=conv(), b=conv(), n=norm())
    model = nn.Sequential(conv(), norm(), part)

    assert "the forward of Model '2' cannot be traced (TraceError: " in warnings_about(model)


def test_a_remedy_is_told():
    told = warnings_about(model_of(one_image), n=1)

    assert "Give an `example_input`" in told and "with `exclude`" in told
    assert is_sure(model_of(one_image), torch.ones(2, 2, 4, 4))


def test_a_refusal_that_forward_catches_is_one_nevertheless():
    """In truth the condition holds for some inputs."""

    def run(m: Any, x: Any) -> Any:
        y = m.a(x)
        try:
            if y.mean() > 0:
                y = F.relu(y)
        except Exception:
            pass
        return m.n(y)

    assert is_found_or_missed_aloud(model_of(run), {"a": None})
