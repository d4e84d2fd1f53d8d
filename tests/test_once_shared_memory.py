"""``standardize_once`` where autograd gives one piece of memory to the gradients of several parameters.

The gradient of a sum is one tensor for all summands, and a view of it for those that were viewed.
"""

from typing import Any

import pytest
import torch
from exact_twins import SEED, Context, check, images
from torch import Tensor, nn
from torch.nn.functional import conv2d

from ws_algorithm import apply_weight_standardization

COUNTS = pytest.mark.parametrize("count", [1, 2, 3])


class Sum(nn.Module):
    """Convolves with the sum of the weights of a 2-d and a 1-d convolution of as many elements."""

    def __init__(self, is_second_plain: bool = False) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv1d(3, 4, 9)
        apply_weight_standardization(self.first if is_second_plain else self)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.first.weight + self.second.weight.view(4, 3, 3, 3))


class SumAsItIs(Sum):
    """The gradients of both weights are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.second = nn.Conv2d(3, 4, 3)
        apply_weight_standardization(self.second)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.first.weight + self.second.weight)


class SumOfThree(Sum):
    """The second twice."""

    def forward(self, x: Tensor) -> Tensor:
        viewed = self.second.weight.view(4, 3, 3, 3)
        return conv2d(x, self.first.weight + viewed + self.second.weight.view(4, 3, 3, 3))


class Concatenation(Sum):
    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, torch.cat([self.first.weight, self.second.weight.view(4, 3, 3, 3)]))


class OneWeight(Sum):
    """The weight beside views of itself."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight
        return conv2d(x, weight + weight.view(4, 27).view(4, 3, 3, 3)) + conv2d(x, self.second.weight.view(4, 3, 3, 3))


def accumulate(count: int) -> Any:
    def loop(model: Any, context: Context) -> None:
        with context(model):
            for batch in images(count=count):
                model(batch).square().mean().backward()

    return loop


@COUNTS
@pytest.mark.parametrize("kind", [Sum, SumAsItIs, SumOfThree, Concatenation, OneWeight])
def test_weights_that_are_added_after_one_is_viewed(kind, count):
    check(kind, accumulate(count))


@COUNTS
def test_a_weight_that_is_added_to_a_plain_one(count):
    """The gradient of the plain weight is accumulated in memory of its own."""
    check(lambda: Sum(is_second_plain=True), accumulate(count))


@COUNTS
def test_steps_of_an_optimizer(count):
    def loop(model: Any, context: Context) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for is_to_none in (True, False, True):
            optimizer.zero_grad(set_to_none=is_to_none)
            accumulate(count)(model, context)
            optimizer.step()
        return model.state_dict()

    check(Sum, loop, tolerance=1e-11)  # roundings of three steps
