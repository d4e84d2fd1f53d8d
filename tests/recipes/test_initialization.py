import math

import pytest
import torch
from torch import nn

from ws_algorithm.recipes.initialization import initialize_convolutions


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel", [1, 3])
def test_variance_is_two_over_kernel_and_outputs(groups, kernel):
    convolution = nn.Conv2d(256 * groups, 512, kernel, groups=groups)

    initialize_convolutions(nn.Sequential(convolution))

    # 131,072 samples or more: 1.5 % is seven standard errors
    expected = math.sqrt(2 / (kernel * kernel * 512))
    torch.testing.assert_close(convolution.weight.std().item(), expected, rtol=0.015, atol=0.0)
    assert (convolution.bias == 0).all()


def test_other_layers_and_missing_biases_are_left_alone():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 2), nn.GroupNorm(2, 4))
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}

    initialize_convolutions(network)

    changed = [name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])]
    assert changed == ["0.weight"]
