"""Models that ``torch.compile`` compiles: one graph outside of contexts, and one log line for all contexts."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from exact_twins import assert_near, dtypes, formulas, gradients, images, loss_of, tiny

from ws_algorithm import standardize_once
from ws_algorithm.parametrization import raw_weight


class Graphs:
    """A backend that runs what it is given as it is, and counts it."""

    def __init__(self) -> None:
        self.compiled: list[list[Any]] = []

    def __call__(self, module: torch.fx.GraphModule, example_inputs: Any) -> Any:
        self.compiled.append([node.target for node in module.graph.nodes if node.op == "call_function"])
        return module.forward


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@formulas
@dtypes
def test_training_is_one_graph(dtype, formula):
    model, eager, graphs = tiny(formula, dtype), tiny(formula, dtype), Graphs()
    compiled: Any = torch.compile(model, backend=graphs, fullgraph=True)

    for batch in images(dtype):
        loss_of(compiled, batch).backward()
        loss_of(eager, batch).backward()

    assert len(graphs.compiled) == 1
    assert graphs.compiled[0].count(torch.conv2d) == 3
    assert_near(gradients(model), gradients(eager))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("is_held_before", [True, False], ids=["held", "not held"])
def test_evaluation_is_one_graph(mode, is_held_before):
    model, eager, graphs = tiny().eval(), tiny().eval(), Graphs()
    compiled: Any = torch.compile(model, backend=graphs, fullgraph=True)

    with mode():
        if is_held_before:
            model(images()[0])
        for batch in images():
            assert_near(compiled(batch).clone(), eager(batch).clone())

    assert len(graphs.compiled) == 1


def test_what_is_compiled_follows_the_raw_weight():
    model, eager, graphs = tiny().eval(), tiny().eval(), Graphs()
    compiled: Any = torch.compile(model, backend=graphs, fullgraph=True)

    with torch.no_grad():
        for factor in (1.0, 2.0):
            for network in (model, eager):
                raw_weight(network[0]).add_(factor * torch.arange(3.0).view(1, 3, 1, 1))
            assert_near(compiled(images()[0]), eager(images()[0]))

    assert len(graphs.compiled) == 1


@pytest.mark.parametrize("is_in_place", [True, False], ids=["compile method", "torch.compile"])
def test_one_line_for_many_contexts(is_in_place, caplog):
    model: Any = tiny()
    if is_in_place:
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")

    with caplog.at_level(logging.WARNING, "ws_algorithm"):
        for batch in images():
            with standardize_once(model):
                loss_of(model, batch).backward()

    lines = [record.getMessage() for record in caplog.records if "not once per step" in record.getMessage()]
    assert len(lines) == 1 and "the model is compiled" in lines[0]


def test_a_line_for_each_compiled_model(caplog):
    models: list[Any] = [torch.compile(tiny(), backend="eager") for _ in range(2)]

    with caplog.at_level(logging.WARNING, "ws_algorithm"):
        for _ in range(2):
            for model in models:
                with standardize_once(model):
                    pass

    assert len([record for record in caplog.records if "compiled" in record.getMessage()]) == 2
