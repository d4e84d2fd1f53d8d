"""Layers that do more than their name says: norms behind something else, convolutions with parts of their own."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from looked_at import Model, conv, is_sure, norm, norms
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


def test_the_norm_comes_first():
    (record,) = inspect_convolutions(nn.Sequential(nn.Conv2d(2, 2, 3), WrappedGroupNorm()), layers="normalized")

    assert record.normalized_by is not None and record.standardized


def test_the_norm_comes_first_in_a_forward_that_calls_that_of_torch():
    """``BatchNorm2d.forward`` asks for the number of dimensions of its input, which is not done while it is traced."""
    model = nn.Sequential(conv(), AfterPadding(2))

    assert norms(model)["0"] is not None
    assert is_sure(model)


class ReLUInside(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight, bias).relu()


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


def test_a_model_of_fx():
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)))

    assert norms(model) == {"0": "1"}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_what_a_script_does_is_not_known():
    script = torch.jit.script(nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()))
    (record,) = inspect_convolutions(nn.Sequential(nn.Conv2d(2, 2, 3), script), layers="normalized")

    assert "not known" in record.reason


def wrapped_by_a_user(x: Tensor) -> Tensor:
    return F.relu_(x)


torch.fx.wrap("wrapped_by_a_user")


def test_what_a_wrapped_function_does_is_not_known():
    """``torch.fx`` does not look into it; here it changes what it is given."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        wrapped_by_a_user(y)
        return m.n(y)

    model = Model(run, a=conv(), n=norm())

    assert norms(model) == {"a": None}
    assert not is_sure(model)


class ActsInside(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class BlockInAConvolution(nn.Conv2d):
    """The ``Conv2d`` of detectron2: a convolution that owns its norm and activation."""

    def __init__(self, *args: Any, norm: Any = None, activation: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        x = F.conv2d(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


class LowRank(nn.Conv2d):
    """A convolution that owns convolutions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.down, self.up = nn.Conv2d(2, 1, 3, padding=1), nn.Conv2d(1, 2, 1)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.up(self.down(input))


def test_a_convolution_that_activates_inside():
    assert norms(nn.Sequential(ActsInside(2, 2, 3), norm()))["0"] is None
    assert norms(nn.Sequential(BlockInAConvolution(2, 2, 3, activation=F.relu), norm()))["0"] is None


def test_a_convolution_that_normalizes_inside():
    model = nn.Sequential(BlockInAConvolution(2, 2, 3, norm=norm(), activation=F.relu), conv())

    assert norms(model) == {"0": "0.norm", "1": None}


def test_a_convolution_that_owns_convolutions():
    model = nn.Sequential(conv(), LowRank(2, 2, 3, padding=1), norm())

    assert norms(model) == {"0": None, "1.down": None, "1.up": "2", "1": "2"}


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_of_torch_with_norms_inside(first):
    """Norms stand at its start or, behind a sum, further in."""
    encoder = nn.TransformerEncoderLayer(2, 1, 4, batch_first=True, norm_first=first)
    model = Model(lambda m, x: m.layer(m.conv(x).flatten(2).mT), conv=conv(), layer=encoder)

    assert norms(model)["conv"] is not None or not is_sure(model)
