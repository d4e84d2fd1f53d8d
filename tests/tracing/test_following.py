"""Which convolutions are followed by a norm, as read from the forward that is spelled out beside it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from looked_at import Model, conv, is_sure, look, model_of, norm, norms
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

FOLLOWED: dict[str, Callable] = {
    "at once": lambda m, x: m.n(m.a(x)),
    "two norms": lambda m, x: m.m(m.n(m.a(x))),
    "shape": lambda m, x: m.n(m.a(x).flatten(2).transpose(1, 2).mT.reshape(1, 2, 4, 4).contiguous()[:, :2]),
    "in-place shape": lambda m, x: m.n(m.a(x).unsqueeze_(0).squeeze_(0)),
    "chunks": lambda m, x: m.n(torch.cat(list(m.a(x).chunk(2, 1))[::-1], 1)),
    "split": lambda m, x: m.n(m.a(x).split([1, 1], dim=1)[0].repeat(1, 2, 1, 1)),
    "dropout": lambda m, x: m.n(F.dropout(m.a(x), 0.5, m.training)),
    "sum": lambda m, x: m.n(m.a(x) + x),
    "sum from the right": lambda m, x: m.n(1 + m.a(x)),
    "sum of a list": lambda m, x: m.n(sum([x, m.a(x)])),
    "torch.add": lambda m, x: m.n(torch.add(x, m.a(x))),
    "types": lambda m, x: m.n(m.a(x).float().to(x.dtype).type_as(x).to(x)),
    "pad": lambda m, x: m.n(F.pad(m.a(x), (1, 1))),
    "pixel shuffle": lambda m, x: m.n(F.pixel_shuffle(F.pixel_unshuffle(m.a(x), 2), 2)),
    "group_norm": lambda m, x: F.group_norm(m.a(x), 2),
    "layer_norm": lambda m, x: F.layer_norm(m.a(x), (4,)),
    "batch_norm": lambda m, x: F.batch_norm(m.a(x), None, None, training=True),
    "instance_norm": lambda m, x: F.instance_norm(m.a(x)),
    "rms_norm": lambda m, x: F.rms_norm(m.a(x), (4,)),
    "forward by name": lambda m, x: m.n.forward(m.a.forward(x)),
    "unbound forward": lambda m, x: m.n(nn.Conv2d.forward(m.a, x)),
    "functional": lambda m, x: m.n(F.conv2d(x, m.a.weight, m.a.bias, padding=1)),
    "weight times 2": lambda m, x: m.n(F.conv2d(x, m.a.weight * 2, m.a.bias, padding=1)),
    "weight times input": lambda m, x: m.n(F.conv2d(x, m.a.weight * x.mean(), m.a.bias, padding=1)),
    "input times weight": lambda m, x: m.n(F.conv2d(x, x.mean() * m.a.weight, m.a.bias, padding=1)),
    "keyword": lambda m, x: m.n(F.conv2d(input=x, weight=m.a.weight, padding=1)),
    "constant input": lambda m, x: m.n(m.a(torch.ones(1, 2, 4, 4)) + x),
    "both branches": lambda m, x: m.n(m.a(x)) if x.mean() > 0 else m.m(m.a(x)),
    "used twice": lambda m, x: m.m(m.a(m.n(m.a(x)))),
    "checkpoint": lambda m, x: m.n(checkpoint(m.a, x, use_reentrant=False)),
    "reentrant checkpoint": lambda m, x: m.n(checkpoint(m.a, x, use_reentrant=True)),
    "function": lambda m, x: m.n(PassOn.apply(m.a(x))),
}


class PassOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads


@pytest.mark.parametrize("way", FOLLOWED)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of torch's reentrant checkpoint itself
def test_a_norm_follows(way):
    model = model_of(FOLLOWED[way])

    found = norms(model)

    assert set(found) == {"a"}
    assert found["a"] is not None
    assert is_sure(model)


def relu_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y.relu_()
    return m.n(y)


def functional_relu_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    F.relu(y, inplace=True)
    return m.n(y)


def layer_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    m.relu(y)
    return m.n(y)


def multiplied_into_itself(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    torch.mul(y, 2, out=y)
    return m.n(y)


def through_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    F.relu_(y.view(-1))
    return m.n(y)


def either_of_two(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.n(y) if x.shape[0] == 1 or x.shape[1] == 3 else y


def none_of_three(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    if x.shape[0] == 1:
        y = m.n(y)
    elif x.shape[0] == 2:
        y = m.m(y)
    return y


def two_conditions_together(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    if x.shape[0] == 1:
        y = F.relu(y) if x.shape[1] > 3 else y
    else:
        y = F.relu(y) if x.shape[2] > 3 else y
    return m.n(y)


def tensor_by_isinstance(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    if isinstance(y, Tensor):
        y = F.relu(y)
    return m.n(y)


def tensor_by_is_tensor(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.n(F.relu(y) if torch.is_tensor(y) else y)


def normalized_in_training(m: Any, x: Tensor) -> Tensor:
    return m.n(m.a(x)) if m.training else m.a(x)


def one_image_is_not_normalized(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.n(y) if len(x) > 1 else y


def sometimes_normalized(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.n(y) if torch.rand(()) < 0.9 else y


NOT_FOLLOWED: dict[str, Callable] = {
    "relu": lambda m, x: m.n(m.relu(m.a(x))),
    "functional relu": lambda m, x: m.n(F.relu(m.a(x))),
    "pooling": lambda m, x: m.n(F.avg_pool2d(m.a(x), 2)),
    "mean": lambda m, x: m.n(m.a(x).mean((2, 3), keepdim=True)),
    "multiplication": lambda m, x: m.n(m.a(x) * 2),
    "multiplication in place": lambda m, x: m.n(m.a(x).mul_(2)),
    "gate": lambda m, x: m.n(x * torch.sigmoid(m.a(x))),
    "interpolation": lambda m, x: m.n(F.interpolate(m.a(x), scale_factor=2)),
    "second use": lambda m, x: m.a(m.n(m.a(x))),
    "first use": lambda m, x: m.n(m.a(m.a(x))),
    "softmax": lambda m, x: m.n(m.a(x).softmax(1)),
    "one branch": lambda m, x: m.n(m.a(x)) if x.mean() > 0 else m.a(x),
    "shape lent by expand_as": lambda m, x: m.n(torch.ones(1).expand_as(m.a(x))),
    "type lent by type_as": lambda m, x: m.n(torch.ones(1, 2, 4, 4).type_as(m.a(x))),
    "device lent by to": lambda m, x: m.n(torch.ones(1, 2, 4, 4).to(m.a(x))),
    "shift of a norm": lambda m, x: F.layer_norm(torch.ones(1, 4), (4,), bias=m.a(x).mean((0, 1, 2))),
    "scale of a norm": lambda m, x: F.layer_norm(torch.ones(1, 4), (4,), weight=m.a(x)[0, 0, 0]),
    "function": lambda m, x: m.n(Double.apply(m.a(x))),
    **{
        run.__name__: run
        for run in (
            *(relu_in_place, functional_relu_in_place, layer_in_place, multiplied_into_itself, through_a_view),
            *(either_of_two, none_of_three, two_conditions_together, tensor_by_isinstance, tensor_by_is_tensor),
            *(normalized_in_training, one_image_is_not_normalized, sometimes_normalized),
        )
    },
}


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads


@pytest.mark.parametrize("way", NOT_FOLLOWED)
def test_no_norm_follows(way):
    assert norms(model_of(NOT_FOLLOWED[way])).get("a") is None


def add_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.b(x)
    y.add_(m.a(x))
    return m.n(y)


def written_into(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(1, 2, 4, 4)
    y[:, :] = m.a(x)
    return m.n(y)


def copied_into(m: Any, x: Tensor) -> Tensor:
    y = x.new_empty(1, 2, 4, 4)
    y.copy_(m.a(x))
    return m.n(y)


def added_out(m: Any, x: Tensor) -> Tensor:
    y = x.new_empty(1, 2, 4, 4)
    torch.add(m.a(x), 1, out=y)
    return m.n(y)


@pytest.mark.parametrize("run", [add_in_place, written_into, copied_into, added_out])
def test_a_norm_that_follows_is_found_or_missed_aloud(run):
    model = model_of(run)

    assert norms(model)["a"] == "n" or not is_sure(model)


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


def test_two_names_are_one_convolution():
    layer = conv()
    model = Model(lambda m, x: m.n(m.again(m.n(m.first(x)))), first=layer, again=layer, n=norm())

    assert norms(model) == {"first": "n"}
    assert len(look(model).choices) == 1
