"""Which convolutions are followed by a norm, as read from the forward that is spelled out beside it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from looked_at import Model, conv, is_sure, look, model_of, norm, norms
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tracing.cautious import is_found_or_missed_aloud
from ws_algorithm.tracing.dataflow import INPUT, OUTPUT, WEIGHT, Dataflow, Follower, Operation

FOLLOWED: dict[str, Callable] = {
    "at once": lambda m, x: m.n(m.a(x)),
    "two norms": lambda m, x: m.m(m.n(m.a(x))),
    "shape": lambda m, x: m.n(m.a(x).flatten(2).transpose(1, 2).mT.reshape(1, 2, 4, 4).contiguous()[:, :2]),
    "in-place shape": lambda m, x: m.n(m.a(x).unsqueeze_(0).squeeze_(0)),
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
    "used twice": lambda m, x: m.m(m.a(m.n(m.a(x)))),
}


@pytest.mark.parametrize("way", FOLLOWED)
def test_a_norm_follows(way):
    model = model_of(FOLLOWED[way])

    found = norms(model)

    assert set(found) == {"a"}
    assert found["a"] is not None
    assert is_sure(model)


class PassOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads


NOT_TRACED: dict[str, Callable] = {
    "chunks": lambda m, x: m.n(torch.cat(list(m.a(x).chunk(2, 1))[::-1], 1)),
    "both branches": lambda m, x: m.n(m.a(x)) if x.mean() > 0 else m.m(m.a(x)),
    "checkpoint": lambda m, x: m.n(checkpoint(m.a, x, use_reentrant=False)),
    "reentrant checkpoint": lambda m, x: m.n(checkpoint(m.a, x, use_reentrant=True)),
    "function": lambda m, x: m.n(PassOn.apply(m.a(x))),
    "parts": lambda m, x: m.n(torch.cat([y for y in m.a(x).split([1, 1], 1)], 1)),
    "either norm": lambda m, x: m.n(m.a(x)) if len(x) > 1 else m.m(m.a(x)),
}


@pytest.mark.parametrize("way", NOT_TRACED)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of torch's reentrant checkpoint itself
def test_a_norm_that_follows_what_is_not_traced(way):
    assert is_found_or_missed_aloud(model_of(NOT_TRACED[way]), {"a": "n"})


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


def large_images_are_activated(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    if int(x.shape[-1]) >= 16:
        y = F.relu(y)
    return m.n(y)


def zero_where_negative(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[y < 0] = 0
    return m.n(y)


def tied(m: Any, x: Tensor) -> Tensor:
    return F.conv_transpose2d(m.n(m.a(x)), m.a.weight, padding=1)


def weighted(m: Any, x: Tensor) -> Tensor:
    return m.n(m.a(x)) + x * m.a.weight.mean()


def coin(p: float) -> bool:
    return bool(torch.rand(()) < p)


def two_coins(m: Any, x: Tensor) -> Tensor:
    y = m.a(x) if coin(0.5) else x
    return m.n(y) if coin(0.5) else y


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
            *(either_of_two, none_of_three, two_conditions_together, tensor_by_isinstance, tensor_by_is_tensor),
            *(normalized_in_training, one_image_is_not_normalized, sometimes_normalized, large_images_are_activated),
            *(zero_where_negative, tied, weighted, two_coins),
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


def test_a_norm_that_is_not_the_first_argument_by_name():
    """Of what comes by keyword, the order is free."""
    model = model_of(lambda m, x: F.layer_norm(normalized_shape=(4,), input=m.a(x)))

    assert is_found_or_missed_aloud(model, {"a": "layer_norm"})


def test_two_names_are_one_convolution():
    layer = conv()
    model = Model(lambda m, x: m.n(m.again(m.n(m.first(x)))), first=layer, again=layer, n=norm())

    assert norms(model) == {"first": "n"}
    assert len(look(model).choices) == 1


def test_parts_of_a_split_that_are_counted():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.norm = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(3)), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            one, two, three = x.split([2, 2, 2], 1)
            parts = zip(self.layers, (one, two, three), strict=True)
            return self.norm(torch.cat([layer(part) for layer, part in parts], 1))

    assert norms(Mixed()) == {"layers.0": "norm", "layers.1": "norm", "layers.2": "norm"}
    assert is_sure(Mixed())


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


def test_a_dataflow_of_operations():
    """Of ``conv(x) + conv(norm(conv(x)))``, whose last result a hidden part takes: three uses, the last one open."""
    layer, after, part = conv(), norm(), nn.Module()
    run = [
        Operation(INPUT, None),
        Operation("Conv2d", layer, (0,), 0),
        Operation("BatchNorm2d", after, (1,), 1),
        Operation("Conv2d", layer, (2,), 2),
        Operation("add", None, (1, 3), 1),
        Operation("Module", part, (4,), 4, hidden=True),
        Operation(OUTPUT, None, (5,), 5),
    ]

    flow = Dataflow(run)

    assert flow.calls == {layer: [1, 3]}
    assert flow.followers_of(layer) == [Follower(after, hidden=True), Follower(hidden=True)]
    assert list(flow.hidden) == [part]
    assert not flow.weights_used_otherwise - {None}


def test_the_order_is_that_of_last_use():
    first, second = conv(), conv()

    flow = Dataflow([Operation("Conv2d", layer) for layer in (first, second, first)])

    assert list(flow.calls) == [second, first]
    assert flow.calls == {second: [1], first: [0, 2]}


@pytest.mark.parametrize(
    "use, otherwise",
    [
        (Operation("conv2d", None, (0, 1), 0), False),
        (Operation("mean", None, (1,), 1), True),  # and nobody convolves with it
    ],
)
def test_a_weight_that_is_read(use, otherwise):
    layer = conv()

    flow = Dataflow([Operation(INPUT, None), Operation(WEIGHT, layer), use, Operation(OUTPUT, None, (2,), 2)])

    assert (layer in flow.weights_used_otherwise) is otherwise
    assert list(flow.calls) == ([] if otherwise else [layer])
