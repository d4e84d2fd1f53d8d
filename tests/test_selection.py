"""Which convolutions are chosen, in which order, and which are refused."""

import logging

import pytest
import torch
from small_models import Net, choose, conv, defined_in_reverse, left_out
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torchvision.models import video

from ws_algorithm.functional import apply_weight_standardization, is_weight_standardized
from ws_algorithm.parametrization import register_weight_standardizer
from ws_algorithm.selection import Rules, select_convolutions


class PlainSubclass(nn.Conv2d):
    pass


class SubclassWithForward(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        if float(input.mean()) > 0:  # not traceable, and it need not be
            input = input + 1
        return super().forward(input)


def names(model: nn.Module, n_last_layers_ignore: int = 0) -> list[str]:
    return [choice.name for choice in choose(model, n_last_layers_ignore)]


def is_understood(model: nn.Module) -> bool:
    return select_convolutions(model, Rules()).execution.failure is None


def nested_child_last() -> nn.Module:
    block = nn.ModuleDict({"c1": conv(), "c2": conv()})
    return Net({"a": block, "b": conv()}, ["a.c1", "b", "a.c2"])


def stem_and_head_together() -> nn.Module:
    return Net(
        {"io": nn.ModuleDict({"stem": conv(), "head": conv()}), "body": nn.Sequential(conv(), nn.ReLU(), conv())},
        ["io.stem", "body", "io.head"],
    )


def reused() -> nn.Module:
    return Net({"shared": conv(), "middle": conv()}, ["shared", "middle", "shared"])


def two_names() -> nn.Module:
    layer = conv()
    return Net({"first": layer, "again": layer, "stem": conv()}, ["stem", "again"])


def never_executed() -> nn.Module:
    return Net({"stem": conv(), "head": conv(), "unused": conv()}, ["stem", "head"])


def subclasses() -> nn.Module:
    layers = {"head": conv(SubclassWithForward), "body": conv(PlainSubclass), "stem": conv()}
    return Net(layers, ["stem", "body", "head"])


def weights_in_a_functional() -> nn.Module:
    return defined_in_reverse(lambda layer, x: F.conv2d(x, layer.weight, layer.bias, padding=1))


def forward_called_by_name() -> nn.Module:
    return defined_in_reverse(lambda layer, x: layer.forward(x))


EXECUTION_ORDERS = [
    (nested_child_last, ["a.c1", "b", "a.c2"]),
    (stem_and_head_together, ["io.stem", "body.0", "body.2", "io.head"]),
    (reused, ["middle", "shared"]),  # by last use
    (two_names, ["stem", "first"]),  # once, under its first name
    (defined_in_reverse, ["stem", "body", "head"]),
    (never_executed, ["unused", "stem", "head"]),  # counted, but not among the last
    (subclasses, ["stem", "body", "head"]),
    (weights_in_a_functional, ["stem", "body", "head"]),
    (forward_called_by_name, ["stem", "body", "head"]),
    (conv, [""]),
    (lambda: conv(SubclassWithForward), [""]),
]


@pytest.mark.parametrize("build, expected", EXECUTION_ORDERS)
def test_order_of_last_use(build, expected):
    model = build()
    assert names(model) == expected
    assert is_understood(model)
    for n in range(1, len(expected) + 2):
        assert left_out(model, n) == expected[-n:]


def test_the_name_of_a_model_that_is_a_convolution():
    assert [str(choice) for choice in choose(conv())] == ["(the model itself)"]


def test_rank_and_transposition():
    model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv3d(2, 2, 3), nn.ConvTranspose2d(2, 2, 3))

    assert names(model, 0) == ["0", "1", "2"]


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, x: layer(x) if x.mean() > 0 else layer(-x),
        lambda layer, x: layer(x * float(x.max())),
        lambda layer, x: layer(x[: len(x)]),
    ],
    ids=["branch", "number", "len"],
)
def test_what_forward_asks_of_its_input_keeps_it_from_being_traced(call):
    """Definition order, and it is said which line is the cause."""
    model = Net({"head": conv(), "stem": conv()}, ["stem", "head"], call)

    assert names(model) == ["head", "stem"]
    failure = select_convolutions(model, Rules()).execution.failure or ""
    assert failure.startswith("the forward of Net cannot be traced (") and "test_selection.py:" in failure


class EitherFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv()
        self.b = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(x)) if x.mean() > 0 else self.b(self.a(x))


def that_looks_up_a_type() -> nn.Module:
    def call(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x * {Tensor: 2}[type(x)])

    return Net({"a": conv(), "b": conv()}, ["b", "a"], call)


@pytest.mark.parametrize("build", [EitherFirst, that_looks_up_a_type])
def test_a_model_that_cannot_be_traced_is_counted_in_the_order_of_definition(build, caplog):
    with caplog.at_level(logging.WARNING, logger="ws_algorithm"):
        assert apply_weight_standardization(model := build(), 1) == 1

    assert not is_weight_standardized(model.b)
    message = caplog.records[0].message
    for part in (type(model).__name__, "cannot be traced", "n_last_layers_ignore", "2 convolutions", "defined"):
        assert part in message
    for remedy in ("example_input", "exclude"):
        assert remedy in message


@pytest.mark.parametrize("n", [0, 2, 3])
@pytest.mark.parametrize("build", [EitherFirst, that_looks_up_a_type])
def test_no_word_of_the_order_where_it_does_not_matter(build, n, caplog):
    with caplog.at_level(logging.WARNING, logger="ws_algorithm"):
        assert apply_weight_standardization(build(), n) == (2 if n == 0 else 0)

    assert not any("n_last_layers_ignore` counts" in record.message for record in caplog.records)


@pytest.mark.parametrize("build", [EitherFirst, that_looks_up_a_type])
def test_an_example_input_decides(build, caplog):
    example = torch.ones(1, 2, 4, 4)
    with caplog.at_level(logging.WARNING, logger="ws_algorithm"):
        assert apply_weight_standardization(model := build(), 1, example_input=example) == 1

    assert not is_weight_standardized(model.a)  # executed last with this input
    assert not any("cannot be traced" in record.message for record in caplog.records)


def test_a_model_that_has_run_is_still_traced(caplog):
    model = defined_in_reverse(keep_activation)
    model(torch.randn(1, 2, 4, 4))

    with caplog.at_level(logging.WARNING, logger="ws_algorithm"):
        assert left_out(model, 1) == ["head"]

    assert not caplog.records


def keep_activation(layer: nn.Module, x: Tensor) -> Tensor:
    layer.activation = layer(x)  # as hooks for visualization do; has a graph, which copy.deepcopy refuses
    return layer.activation


@pytest.mark.parametrize("cls", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("n", [0, 1])
def test_a_fan_in_of_one_is_left_alone(cls, n):
    depthwise = cls(4, 4, 1, groups=4)

    choices = {c.name: c.skipped_because for c in choose(nn.Sequential(depthwise, cls(4, 4, 1)), n)}

    assert choices["0"] == "fan-in 1: the standardized weight would be 0"
    assert choices["1"] == (None if n == 0 else "n_last_layers_ignore=1")


@pytest.mark.parametrize(
    "name", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame", "ConvWS2d", "ConvAWS2d"]
)
def test_layers_that_standardize_their_own_weight_are_left_alone(name):
    own = type(name, (nn.Conv2d,), {})
    derived = type("Derived", (own,), {})

    choices = choose(nn.Sequential(own(2, 2, 3), derived(2, 2, 3), nn.Conv2d(2, 2, 3)))

    reason = f"already standardized by its class {name}"
    assert [choice.skipped_because for choice in choices] == [reason, reason, None]


def test_a_standardized_convolution_counts_among_the_last():
    model = defined_in_reverse()
    register_weight_standardizer(model.head)

    choices = {choice.name: choice.skipped_because for choice in choose(model, 2)}

    assert choices == {"stem": None, "body": "n_last_layers_ignore=2", "head": "already standardized"}


@pytest.mark.parametrize("bias", [True, False])
def test_standardized_weights_in_a_functional(bias):
    model = defined_in_reverse(lambda layer, x: F.conv2d(x, layer.weight, layer.bias, padding=1))
    if not bias:
        for layer in model.children():
            layer.bias = None
    register_weight_standardizer(model.head)

    choices = {choice.name: choice.skipped_because for choice in choose(model, 1)}

    assert choices == {"stem": None, "body": None, "head": "already standardized"}


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parametrizations_of_another_kind_are_no_obstacle():
    model = nn.Sequential(parametrize.register_parametrization(conv(), "weight", Doubled()))

    assert [(choice.skipped_because, choice.refused_because) for choice in choose(model)] == [(None, None)]


@pytest.mark.parametrize("builder", [video.r3d_18, video.mc3_18, video.r2plus1d_18])
def test_convolutions_of_torchvisions_video_models(builder):
    """Most of them are instances of subclasses of ``Conv3d``: stem, 4 stages of 4, 3 shortcuts."""
    with torch.device("meta"):
        model = builder()

    convolutions = {m for m in model.modules() if isinstance(m, nn.Conv3d)}
    choices = choose(model, 1)
    assert {choice.module for choice in choices} == convolutions
    assert len(choices) == (37 if builder is video.r2plus1d_18 else 20)  # (2+1)D: each but the shortcuts is two
    (last,) = [choice.name for choice in choices if choice.skipped_because is not None]
    assert last.startswith("layer4.1.conv2.")
