"""Random trees of modules: the selection against runs that follow the tensors, in training and in evaluation."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_following import follow
from torch import Tensor, nn
from torch.nn import functional as F

from ws_algorithm.cautions import cautions_about
from ws_algorithm.formula import FORMULAS
from ws_algorithm.selection import Rules, Selection, select_convolutions

IMAGES = torch.linspace(-1, 1, 2 * 4 * 6 * 6).reshape(2, 4, 6, 6)


class Tree(nn.Module):
    """Calls its children in an order that is not that of their definition, and joins what they return.

    Args:
        children: In the order in which they run.
        defined: The same by their positions, in the order in which they are defined.
        join: What is made of its input and of what the last child returns.
    """

    def __init__(self, children: list[nn.Module], defined: list[int], join: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        for position in defined:
            self.add_module(f"part{position}", children[position])
        self.count, self.join = len(children), join

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for position in range(self.count):
            y = self.get_submodule(f"part{position}")(y)
        return self.join(x, y)


class Untraceable(Tree):
    """Makes a condition of what it computes, at its beginning or at its end."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x if float(x.detach().abs().max()) >= 0 else -x)
        return y if len(y) == len(x) else x


LEAVES: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
    "padded": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "norm": lambda: nn.GroupNorm(2, 4),
    "batch norm": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "dropout": lambda: nn.Dropout(0.2),
    "identity": nn.Identity,
}
JOINS: dict[str, Callable[[Any, Any], Any]] = {
    "chain": lambda x, y: y,
    "sum": lambda x, y: x + y,
    "product": lambda x, y: x * y,
    "relu": lambda x, y: F.relu(x + y),
    "norm": lambda x, y: F.group_norm(y, 2),
    "two halves": lambda x, y: torch.cat([x[:, :2], y[:, 2:]], 1),
}
FORWARDS = {"traceable": Tree, "untraceable": Untraceable}


@st.composite
def trees(draw: Any, forwards: list[str], depth: int = 3) -> nn.Module:
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return LEAVES[draw(st.sampled_from(sorted(LEAVES)))]()
    children = [draw(trees(forwards, depth - 1)) for _ in range(draw(st.integers(1, 3)))]
    defined = draw(st.permutations(range(len(children))))
    return FORWARDS[draw(st.sampled_from(forwards))](children, defined, JOINS[draw(st.sampled_from(sorted(JOINS)))])


@st.composite
def models(draw: Any, forwards: list[str]) -> nn.Module:
    """A tree with a convolution at its end, so that every one has something to choose."""
    parts = [draw(trees(forwards)), nn.Conv2d(4, 4, 1)]
    return Tree(parts, draw(st.permutations(range(2))), JOINS["chain"])


def truth(model: nn.Module) -> tuple[list[str], set[str]]:
    """The order, and what a norm follows in both modes. No random tree does anything else in training."""
    torch.manual_seed(1)
    training, evaluation = (follow(model.train(mode), IMAGES.clone()) for mode in (True, False))
    assert training.order == evaluation.order
    return training.order, training.normalized & evaluation.normalized


def warnings_about(selection: Selection) -> str:
    return "\n".join(cautions_about(selection, FORMULAS["composer"]))


@settings(max_examples=60)
@given(model=models(["traceable"]), training=st.booleans())
def test_a_tree_that_can_be_traced_is_known_exactly(model, training):
    order, normalized = truth(model)
    selection = select_convolutions(model.train(training), Rules(layers="normalized"))

    assert [choice.name for choice in selection.choices] == order
    assert {choice.name for choice in selection.chosen} == normalized
    assert warnings_about(selection) == ""


@settings(max_examples=60)
@given(model=models(["traceable", "untraceable"]))
def test_a_tree_that_cannot_be_traced_gets_the_cautious_answer(model):
    order, normalized = truth(model)
    selection = select_convolutions(model, Rules(1, layers="normalized"))
    decided = [choice for choice in selection.choices if not choice.place.undecided]
    warned = warnings_about(selection)

    assert all((choice.place.norm is not None) == (choice.name in normalized) for choice in decided)
    for choice in selection.choices:
        if choice.place.undecided and choice.skipped_because != "n_last_layers_ignore=1":
            assert choice.name in warned
    if selection.execution.failure is None and selection.execution.doubt is None:
        assert [choice.name for choice in selection.choices] == order
    else:
        assert len(order) == 1 or "n_last_layers_ignore" in warned


@settings(max_examples=60)
@given(model=models(["traceable", "untraceable"]))
def test_an_example_input_settles_it(model):
    order, normalized = truth(model)
    selection = select_convolutions(model, Rules(layers="normalized"), IMAGES)

    assert [choice.name for choice in selection.choices] == order
    assert {choice.name for choice in selection.chosen} == normalized
    assert warnings_about(selection) == ""
