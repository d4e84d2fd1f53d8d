import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ws_algorithm.recipes.models.cifar_preresnet import (
    CifarPreResNet,
    PreActBasicBlock,
    PreActBottleneck,
    build_cifar_preresnet,
)

from .small_networks import count


@pytest.mark.parametrize("block", [PreActBasicBlock, PreActBottleneck])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_normalizes_before_it_convolves(block, stride):
    module = block(8, 4, stride, nn.BatchNorm2d)
    x = torch.randn(2, 8, 6, 6)

    out = x
    for number in range(1, 3 if block is PreActBasicBlock else 4):
        convolution, norm = getattr(module, f"conv{number}"), getattr(module, f"bn{number}")
        normalized = F.batch_norm(out, None, None, norm.weight, norm.bias, training=True)
        padding = 1 if convolution.kernel_size == (3, 3) else 0
        out = F.conv2d(normalized.clamp(min=0), convolution.weight, None, convolution.stride, padding)
    shortcut = x if module.downsample is None else F.conv2d(x, module.downsample[0].weight, None, stride)

    torch.testing.assert_close(module(x), out + shortcut)
    assert out.shape == (2, 4 * block.expansion, 6 // stride, 6 // stride)


def test_shape_is_changed_once_per_stage():
    with torch.device("meta"):
        basic, bottleneck = (build_cifar_preresnet(10, 14, block=block).module for block in ("basic", "bottleneck"))

    # stem, two blocks in each of three stages, shortcuts without norm; a bottleneck widens the first stage too
    assert count(basic, nn.Conv2d) == 1 + 3 * 2 * 2 + 2
    assert count(basic, nn.GroupNorm) == 3 * 2 * 2 + 1
    assert count(bottleneck, nn.Conv2d) == 1 + 3 * 2 * 3 + 3
    assert count(bottleneck, nn.GroupNorm) == 3 * 2 * 3 + 1


def test_nothing_is_normalized_between_the_stem_and_the_first_block():
    model = CifarPreResNet(8, 8, 10, 1, nn.BatchNorm2d, "basic")
    seen = []
    model.conv1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.layer1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))

    model(torch.randn(2, 1, 12, 12))

    assert seen[0] is seen[1]


def test_convolutions_start_with_the_variance_of_the_reference():
    weight = CifarPreResNet(8, 64, 10, 3, nn.BatchNorm2d, "basic").get_parameter("layer3.0.conv2.weight")

    # 1 % is ten standard errors of 589,824 samples
    torch.testing.assert_close(weight.std().item(), math.sqrt(2 / (256 * 9)), rtol=0.01, atol=0.0)


def test_the_published_network_is_the_164_layers_of_the_paper():
    with torch.device("meta"):
        network = build_cifar_preresnet(10, depth=110).module
    shortcuts = 3

    assert count(network, PreActBottleneck) == 3 * 18
    assert count(network, nn.Conv2d, nn.Linear) - shortcuts == 164


@pytest.mark.parametrize("depth", [2, 11, 163])
def test_a_depth_that_is_not_six_n_plus_two_is_refused(depth):
    with pytest.raises(ValueError, match=rf"`depth` \(={depth}\) must be 6 n \+ 2"):
        build_cifar_preresnet(10, depth)


def test_an_unknown_block_is_refused():
    with pytest.raises(ValueError, match=r"`block` \(='wide'\) must be 'basic' or 'bottleneck'"):
        build_cifar_preresnet(10, block="wide")  # pyright: ignore[reportArgumentType]
