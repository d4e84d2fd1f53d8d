"""A class that is named after a norm is a norm only if nothing else comes first."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from looked_at import model_of, norms
from torch import Tensor, nn

from ws_algorithm import inspect_convolutions


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 2)
        self.gain = nn.Parameter(torch.ones(2, 2, 1, 1))


class ReLUBatchNorm(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(x))


class GatedGroupNorm(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x * torch.sigmoid(x))


class ConvGroupNorm(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.gain))


class MaybeBatchNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class BatchNorm2d(Holder):
    """Has the name of a norm to the letter."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.max_pool2d(x, 2))


class AfterReLU(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.relu(input))


class AfterPadding(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (1, 1)))


class WrappedGroupNorm(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


@pytest.mark.parametrize(
    "build",
    [ReLUBatchNorm, GatedGroupNorm, ConvGroupNorm, MaybeBatchNorm, BatchNorm2d, lambda: AfterReLU(2)],
)
def test_something_else_comes_first(build):
    (record,) = inspect_convolutions(nn.Sequential(nn.Conv2d(2, 2, 3), build()), layers="normalized")

    assert record.normalized_by is None and not record.standardized


@pytest.mark.parametrize(
    "build",
    [
        lambda: AfterPadding(2),
        WrappedGroupNorm,
    ],
)
def test_the_norm_comes_first(build):
    (record,) = inspect_convolutions(nn.Sequential(nn.Conv2d(2, 2, 3), build()), layers="normalized")

    assert record.normalized_by is not None and record.standardized


@pytest.mark.parametrize("limit", [16, 3.5**2])
def test_a_branch_on_a_number_is_seen(limit):
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        if int(x.shape[-1]) >= limit:
            y = F.relu(y)
        return m.n(y)

    assert norms(model_of(run))["a"] is None


class ReLUInside(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight, bias).relu()


def tied(m: Any, x: Tensor) -> Tensor:
    return F.conv_transpose2d(m.n(m.a(x)), m.a.weight, padding=1)


def weighted(m: Any, x: Tensor) -> Tensor:
    return m.n(m.a(x)) + x * m.a.weight.mean()


def alias_of_a_sum(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    shortcut = nn.Identity()(y)
    return m.n(shortcut + m.b(m.relu(y)))  # in place: the shortcut too


def view_of_what_changes(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = y.flatten(2)
    y.relu_()
    return m.n(z.unflatten(2, (4, 4)))


def copied_over(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y.copy_(y.relu())
    return m.n(y)


def coin(p: float) -> bool:
    return bool(torch.rand(()) < p)


def two_coins(m: Any, x: Tensor) -> Tensor:
    y = m.a(x) if coin(0.5) else x
    return m.n(y) if coin(0.5) else y


@pytest.mark.parametrize("run", [tied, weighted, alias_of_a_sum, view_of_what_changes, copied_over, two_coins])
def test_a_convolution_that_has_another_use(run):
    assert norms(model_of(run))["a"] is None


class DropPath(nn.Module):
    """Has the name of stochastic depth, and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def test_a_layer_with_the_name_of_dropout_and_more_inside():
    model = nn.Sequential(nn.Conv2d(2, 2, 3), DropPath(), nn.BatchNorm2d(2))
    records = inspect_convolutions(model, layers="normalized")

    assert [record.normalized_by for record in records] == [None]


def test_a_convolution_with_more_inside():
    (record,) = inspect_convolutions(nn.Sequential(ReLUInside(2, 2, 3), nn.BatchNorm2d(2)), layers="normalized")

    assert not record.standardized


def test_parts_of_a_split_are_as_many_as_they_are():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.norm = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(3)), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            parts = zip(self.layers, x.split([2, 2, 2], 1), strict=True)
            return self.norm(torch.cat([layer(part) for layer, part in parts], 1))

    assert norms(Mixed()) == {"layers.0": "norm", "layers.1": "norm", "layers.2": "norm"}


def test_a_mask_is_no_place():
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y[y < 0] = 0
        return m.n(y)

    assert norms(model_of(run))["a"] is None


def test_a_model_of_fx():
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)))

    assert norms(model) == {"0": "1"}


def test_what_a_script_does_is_not_known():
    script = torch.jit.script(nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()))
    (record,) = inspect_convolutions(nn.Sequential(nn.Conv2d(2, 2, 3), script), layers="normalized")

    assert "not known" in record.reason


def test_a_long_chain_of_additions_takes_no_time():
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.norm = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(600)), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return self.norm(x)

    assert set(norms(Chain()).values()) == {"norm"}


def test_alternatives_have_no_order(caplog):
    from ws_algorithm import apply_weight_standardization

    model = model_of(lambda m, x: m.b(m.a(x)) if x.shape[2] > 100 else m.c(m.a(x)))
    apply_weight_standardization(model, 1)

    assert any("in the place of others" in record.getMessage() for record in caplog.records)
