"""Random programs of layers and functions: what is chosen is what the program says, and choosing changes nothing."""

import random
from typing import Any

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ws_algorithm import apply_weight_standardization, is_weight_standardized
from ws_algorithm.cautions import cautions_about
from ws_algorithm.formula import FORMULAS
from ws_algorithm.selection import Rules, select_convolutions

# Values of a program are numbered; value 0 is the input. A step makes the next value: (operation, layer, operands)
Step = tuple[str, int, tuple[int, ...]]

JOINING = ("add", "add in place", "add discarded", "cat")
PASSING = ("reshape", "identity", "dropout", *JOINING)
BLOCKING = ("relu", "relu layer", "relu in place", "relu discarded", "pool", "mul")
OPERATIONS = ("conv", "conv", "functional conv", "norm", "functional norm", *PASSING, *BLOCKING)


class Program(nn.Module):
    """Convolutions and norms under random names, and a forward that follows `steps`."""

    def __init__(self, convolutions: list[str], steps: list[Step]) -> None:
        super().__init__()
        self.paths = convolutions
        layers = [nn.Conv2d(2, 2, 3, padding=1) for _ in convolutions]
        for path, layer in zip(convolutions, layers, strict=True):
            add(self, path, layer)
        self.norm = nn.GroupNorm(1, 2)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.3)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for operation, layer, operands in self.steps:
            values.append(self.step(operation, layer, *(values[operand] for operand in operands)))
        return values[-1]

    def step(self, operation: str, layer: int, x: Any, y: Any) -> Any:
        conv: Any = self.get_submodule(self.paths[layer])
        match operation:
            case "conv":
                return conv(x)
            case "functional conv":
                return F.conv2d(x, conv.weight, conv.bias, padding=1)
            case "norm":
                return self.norm(x)
            case "functional norm":
                return F.group_norm(x, 1)
            case "reshape":
                return x.flatten(2).transpose(1, 2).transpose(1, 2).reshape(2, 2, 4, 4).contiguous()
            case "identity":
                return x.clone()
            case "dropout":
                return self.dropout(x)
            case "add":
                return x + y
            case "add in place":
                x = x.clone()
                x += y
                return x
            case "add discarded":
                x = x.clone()
                x.add_(y)
                return x
            case "cat":
                return torch.cat([x, y], 1)[:, 1:3]
            case "relu":
                return F.relu(x)
            case "relu layer":
                return self.relu(x)
            case "relu in place":
                x = x.clone()
                return x.relu_()
            case "relu discarded":
                x = x.clone()
                F.relu(x, inplace=True)
                return x
            case "pool":
                return F.avg_pool2d(x, 3, 1, 1)
            case "mul":
                return x * y
            case "branch":  # what cannot be traced
                return F.relu(x) if x.sum() > 0 else torch.tanh(x)
        raise AssertionError(operation)


def add(model: nn.Module, path: str, layer: nn.Module) -> None:
    *containers, name = path.split(".")
    for container in containers:
        if not hasattr(model, container):
            model.add_module(container, nn.Module())
        model = model.get_submodule(container)
    model.add_module(name, layer)


CONTAINERS = st.lists(st.sampled_from(["left", "right"]), max_size=2)


@st.composite
def programs(draw, operations: tuple[str, ...] = OPERATIONS) -> Program:
    count = draw(st.integers(1, 5))
    paths = [".".join([*draw(CONTAINERS), f"conv{index}"]) for index in draw(st.permutations(range(count)))]
    steps = []
    for number in range(draw(st.integers(1, 12))):
        recent = st.integers(max(number - 3, 0), number)
        operands = draw(st.tuples(recent, recent))
        steps.append((draw(st.sampled_from(operations)), draw(st.integers(0, count - 1)), operands))
    assume(any(operation in ("conv", "functional conv") for operation, _, _ in steps))
    return Program(paths, steps)


def used(program: Program) -> list[tuple[int, int]]:
    """The convolutions that run, each with the value it makes."""
    return [(s[1], value) for value, s in enumerate(program.steps, 1) if s[0] in ("conv", "functional conv")]


def expected_order(program: Program) -> list[str]:
    last: dict[int, int] = {}
    for layer, value in used(program):
        last[layer] = value
    return [program.paths[layer] for layer in sorted(last, key=last.__getitem__)]


def expected_normalized(program: Program) -> set[str]:
    """Backwards: the values that a norm takes, and those that reach one of them unchanged."""
    normalized: set[int] = set()
    for value in range(len(program.steps), 0, -1):
        operation, _, operands = program.steps[value - 1]
        if operation in ("norm", "functional norm"):
            normalized.add(operands[0])
        elif operation in PASSING and value in normalized:
            normalized.update(operands if operation in JOINING else operands[:1])
    results: dict[int, list[bool]] = {}
    for layer, value in used(program):
        results.setdefault(layer, []).append(value in normalized)
    return {program.paths[layer] for layer, each in results.items() if all(each)}


def random_states() -> list[str]:
    return [str(torch.get_rng_state().tolist()), str(random.getstate()), str(np.random.get_state(legacy=False))]


@settings(max_examples=200)
@given(program=programs(), training=st.booleans())
def test_what_is_found_is_what_the_program_says(program, training):
    program.train(training)
    selection = select_convolutions(program, Rules(layers="normalized"))

    assert selection.execution.failure is None and selection.execution.untraced == ()
    assert [c.name for c in selection.choices if c.place.executed] == expected_order(program)
    assert {c.name for c in selection.chosen} == expected_normalized(program)


class Wrapper(nn.Module):
    """Its own forward can be traced; that of the program may not be."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.head = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.program(x))


@given(program=programs((*OPERATIONS, "branch")))
def test_a_program_that_cannot_be_traced_gets_the_cautious_answer(program):
    is_traceable = all(operation != "branch" for operation, _, _ in program.steps)
    selection = select_convolutions(Wrapper(program), Rules(layers="normalized"))
    left_alone = {c.name.removeprefix("program.") for c in selection.choices if c.skipped_because is not None}
    chosen = {c.name.removeprefix("program.") for c in selection.chosen}
    warnings = "\n".join(cautions_about(selection, FORMULAS["composer"]))

    assert chosen <= expected_normalized(program)
    assert selection.choices[-1].name == "head"  # what calls it can be traced
    if not is_traceable:
        assert chosen == set() and left_alone == {*program.paths, "head"}
        for part in (
            *program.paths,
            "the forward of Program 'program' cannot be traced",
            "x.sum() > 0",
            "example_input",
        ):
            assert part in warnings


@given(program=programs(), n=st.integers(0, 6), layers=st.sampled_from(["all", "normalized"]))
def test_rules_combine(program, n, layers):
    order = expected_order(program)
    unused = [path for path in program.paths if path not in order]
    in_order = [*unused, *order]  # those without a use are first, whatever their order
    kept = set(in_order[: max(len(in_order) - n, 0)])
    count = len(kept & expected_normalized(program)) if layers == "normalized" else len(kept)

    assert apply_weight_standardization(program, n, layers=layers) == count
    if layers == "normalized" or n <= len(order):
        chosen = {path for path in program.paths if is_weight_standardized(program.get_submodule(path))}
        assert chosen == (kept & expected_normalized(program) if layers == "normalized" else kept)


@given(program=programs(), training=st.booleans())
def test_choosing_changes_nothing(program, training):
    program.train(training)
    x = torch.linspace(-1, 1, 64).reshape(2, 2, 4, 4)
    torch.manual_seed(3)
    before, output = random_states(), program(x)
    state = {name: (id(value), value.clone(), value._version) for name, value in state_of(program).items()}
    torch.manual_seed(3)

    select_convolutions(program, Rules(1, "normalized"))

    assert random_states() == before
    assert torch.equal(program(x), output)
    for name, value in state_of(program).items():
        identity, values, version = state[name]
        assert (id(value), value._version) == (identity, version)
        assert torch.equal(value, values)


def state_of(program: Program) -> dict[str, Tensor]:
    return {**dict(program.named_parameters()), **dict(program.named_buffers())}


@given(program=programs(), n=st.integers(0, 5))
def test_convolutions_that_are_left_alone_compute_as_before(program, n):
    x = torch.linspace(-1, 1, 64).reshape(2, 2, 4, 4)
    outputs = {path: program.get_submodule(path)(x) for path in program.paths}

    apply_weight_standardization(program, n, layers="normalized")

    for path in program.paths:
        layer = program.get_submodule(path)
        assert torch.equal(layer(x), outputs[path]) != is_weight_standardized(layer)
