"""Records of the convolutions of a model: one each, in the order of execution, true and ready to be written."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from looked_at import Model, conv, norm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from ws_algorithm import apply_weight_standardization, inspect_convolutions, is_weight_standardized
from ws_algorithm.inspection import ConvolutionRecord


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(4, 3, 1)
        self.middle = nn.Conv2d(4, 4, 3, groups=2, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 1, groups=4)
        self.stem = nn.Conv2d(2, 4, (3, 1))
        self.norm = nn.GroupNorm(2, 4)
        self.unused = nn.Conv1d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(F.layer_norm(self.depthwise(self.middle(x)), (4,)))
        return self.head(x)


def test_records():
    record = ConvolutionRecord
    norm, unused = "norm (GroupNorm)", "layers='all', although forward does not use it"
    fan_in_1, no_norm = "fan-in 1: the standardized weight would be 0", "layers='all', although no norm follows it"

    assert inspect_convolutions(Net(), 1) == [
        record(0, "unused", "Conv1d", (2, 2, 3), 6, None, True, unused, "traced"),
        record(1, "stem", "Conv2d", (4, 2, 3, 1), 6, norm, True, "a norm follows it", "traced"),
        record(2, "middle", "Conv2d", (4, 2, 3, 3), 18, None, True, no_norm, "traced"),
        record(3, "depthwise", "Conv2d", (4, 1, 1, 1), 1, "layer_norm", False, fan_in_1, "traced"),
        record(4, "head", "Conv2d", (3, 4, 1, 1), 4, None, False, "n_last_layers_ignore=1", "traced"),
    ]


REASONS: list[tuple[dict[str, Any], str, str]] = [
    ({"layers": "normalized"}, "middle", "layers='normalized': no norm follows it"),
    ({"layers": "normalized"}, "unused", "layers='normalized': forward does not use it"),
    ({"layers": "normalized"}, "stem", "a norm follows it"),
    ({"exclude": ["head", "m*"]}, "middle", "exclude='m*'"),
    ({"include": ["head", "m*"]}, "stem", "not in include=['head', 'm*']"),
    ({"predicate": lambda name, _: name == "stem"}, "middle", "predicate is false"),
    ({"n_last_layers_ignore": 9}, "stem", "n_last_layers_ignore=9"),
    ({"n_last_layers_ignore": 9}, "depthwise", "fan-in 1: the standardized weight would be 0"),
]


@pytest.mark.parametrize("rules, name, reason", REASONS)
def test_reasons(rules, name, reason):
    assert {record.name: record.reason for record in inspect_convolutions(Net(), **rules)}[name] == reason


@pytest.mark.parametrize("rules", [{}, {"n_last_layers_ignore": 2}, {"layers": "normalized"}, {"exclude": "stem"}])
def test_a_record_says_what_is_done(rules):
    net = Net()
    records = inspect_convolutions(net, **rules)

    assert apply_weight_standardization(net, **rules) == sum(record.standardized for record in records)
    for record in records:
        assert is_weight_standardized(net.get_submodule(record.name)) == record.standardized
    again = inspect_convolutions(net, **rules)
    assert [record.standardized for record in again] == [record.standardized for record in records]
    assert [(r.name, r.weight_shape, r.normalized_by) for r in again] == [
        (r.name, r.weight_shape, r.normalized_by) for r in records
    ]
    assert {record.reason for record in again if record.standardized} == {"already standardized"}


def test_records_can_be_written_as_json():
    class Sub(nn.Conv2d):
        pass

    net = nn.Sequential(Net(), Sub(3, 3, 3))
    records = [dataclasses.asdict(record) for record in inspect_convolutions(net)]

    assert json.loads(json.dumps(records)) == [{**r, "weight_shape": list(r["weight_shape"])} for r in records]
    assert records[-1]["type"] == "Sub"
    assert all(type(value) in (int, str, bool, tuple, type(None)) for record in records for value in record.values())


def test_records_are_immutable_and_equal_by_value():
    first, again = inspect_convolutions(Net()), inspect_convolutions(Net())

    assert first == again
    assert len({*first, *again}) == len(first)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first[0].name = "other"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_convolution():
    (record,) = inspect_convolutions(nn.Sequential(nn.LazyConv2d(2, 3)))

    assert (record.weight_shape, record.fan_in, record.standardized) == ((), 0, False)
    assert "lazy" in record.reason


def test_a_model_that_is_a_convolution():
    (record,) = inspect_convolutions(conv())

    assert (record.name, record.type, record.fan_in) == ("", "Conv2d", 18)


def test_a_parametrized_weight():
    """Of weight_norm, the raw weight is in two parts, neither of which has the shape of the weight."""
    (record,) = inspect_convolutions(parametrizations.weight_norm(nn.Conv2d(4, 6, 3)))

    assert (record.weight_shape, record.fan_in) == ((6, 4, 3, 3), 36)


def test_a_class_keeps_its_name_when_standardized():
    """A record is of the user's class, not of the one that the parametrization puts in its place."""
    net = nn.Sequential(conv(), norm())
    apply_weight_standardization(net)

    assert inspect_convolutions(net)[0].type == "Conv2d"


def test_the_first_of_several_norms_is_named():
    net = Model(lambda m, x: m.second(m.conv(m.first(m.conv(x)))), conv=conv(), second=norm(), first=norm())

    assert inspect_convolutions(net)[0].normalized_by == "first (BatchNorm2d)"


@pytest.mark.parametrize("example_input, order", [(None, "defined"), (torch.ones(1, 2, 4, 4), "observed")])
def test_how_the_order_was_found(example_input, order):
    def only_tensors(m: Any, x: Any) -> Any:
        if type(x) is not Tensor:
            raise TypeError("only for tensors")
        return m.b(m.a(x))

    net = Model(only_tensors, b=conv(), a=conv())

    records = inspect_convolutions(net, example_input=example_input)

    assert [record.order for record in records] == [order, order]
    assert [record.name for record in records] == (["b", "a"] if order == "defined" else ["a", "b"])
    assert [record.index for record in records] == [0, 1]
