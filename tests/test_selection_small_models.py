"""One convolution and one norm in every relation: the selection against a run that follows the tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensor_following import follow
from torch import nn

from ws_algorithm import inspect_convolutions


class Small(nn.Module):
    def __init__(self, body: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.dropout, self.body = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.Dropout(), body

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, x)


Body = Callable[[Any, torch.Tensor], Any]
FOLLOWED_BY_A_NORM: dict[str, Body] = {
    "at once": lambda net, x: net.norm(net.conv(x)),
    "after a sum": lambda net, x: net.norm(net.conv(x) + x),
    "after a sum in place": lambda net, x: [y := x.clone(), y.add_(net.conv(x)), net.norm(y)],
    "after dropout": lambda net, x: net.norm(net.dropout(net.conv(x)).add_(x)),
    "after cat and flip": lambda net, x: net.norm(torch.cat([x, net.conv(x)]).flip(0)),
    "after padding": lambda net, x: net.norm(F.pad(net.conv(x), (1, 1)).clone()),
    "after roll and chunk": lambda net, x: net.norm(torch.roll(net.conv(x), 1, 2).chunk(2, -1)[0]),
    "a function": lambda net, x: F.layer_norm(net.conv(x).permute(0, 2, 3, 1), (4,)),
    "on one path": lambda net, x: [F.batch_norm(y := net.conv(x), None, None, training=True), F.relu(y)],
    "twice": lambda net, x: net.norm(net.conv(net.norm(net.conv(x)))),
}
FOLLOWED_BY_NONE: dict[str, Body] = {
    "behind a norm": lambda net, x: net.conv(net.norm(x)),
    "relu": lambda net, x: net.norm(F.relu(net.conv(x))),
    "relu in place": lambda net, x: [y := net.conv(x), F.relu_(y), net.norm(y)],
    "a product": lambda net, x: net.norm(net.conv(x) * 2),
    "pooling": lambda net, x: net.norm(F.max_pool2d(net.conv(x), 2)),
    "interpolation": lambda net, x: net.norm(F.interpolate(net.conv(x), scale_factor=2.0)),
    "local response": lambda net, x: F.local_response_norm(net.conv(x), 2),
    "one of two uses": lambda net, x: [net.norm(net.conv(x)), net.conv(x)],
    "the second of two uses": lambda net, x: net.norm(net.conv(F.relu(net.conv(x)))),
    "unused": lambda net, x: net.norm(x),
}


@pytest.mark.parametrize("name", FOLLOWED_BY_A_NORM | FOLLOWED_BY_NONE)
def test_the_run_of_a_small_model(name):
    followed = follow(Small((FOLLOWED_BY_A_NORM | FOLLOWED_BY_NONE)[name]), torch.ones(2, 4, 8, 8))

    assert followed.normalized == ({"conv"} if name in FOLLOWED_BY_A_NORM else set())


@pytest.mark.parametrize("name", FOLLOWED_BY_A_NORM | FOLLOWED_BY_NONE)
def test_the_selection_from_a_small_model(name):
    records = inspect_convolutions(Small((FOLLOWED_BY_A_NORM | FOLLOWED_BY_NONE)[name]), layers="normalized")

    assert {r.name for r in records if r.normalized_by} == ({"conv"} if name in FOLLOWED_BY_A_NORM else set())
