import math

import pytest
import torch
from torch import nn

from ws_algorithm.recipes.models.cifar_resnext import CifarResNeXt, build_cifar_resnext

from .small_networks import count


@pytest.mark.parametrize(("cardinality", "base_width"), [(8, 64), (16, 64), (4, 24)])
def test_3x3_convolutions_are_in_groups(cardinality, base_width):
    with torch.device("meta"):
        network = CifarResNeXt(11, cardinality, base_width, 10, 3, nn.BatchNorm2d)
    grouped = [network.get_submodule(f"layer{stage}.0.conv2") for stage in (1, 2, 3)]

    assert [(conv.out_channels, conv.groups) for conv in grouped if isinstance(conv, nn.Conv2d)] == [
        (cardinality * base_width * factor, cardinality) for factor in (1, 2, 4)
    ]
    assert [network.get_submodule(f"layer{stage}.0.conv3").out_channels for stage in (1, 2, 3)] == [256, 512, 1024]


def test_stages_halve_the_image():
    model = CifarResNeXt(11, 2, 4, 10, 1, nn.BatchNorm2d)
    sizes = []
    for name in ("conv1", "layer1", "layer2", "layer3"):
        getattr(model, name).register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape)))

    model(torch.randn(2, 1, 16, 16))

    assert sizes == [(2, 64, 16, 16), (2, 256, 16, 16), (2, 512, 8, 8), (2, 1024, 4, 4)]


def test_layers_by_depth():
    with torch.device("meta"):
        network = build_cifar_resnext(10, 29).module

    # three in each of three blocks of three stages, the stem, and a shortcut in each stage; a norm after each
    assert count(network, nn.Conv2d) == count(network, nn.GroupNorm) == 27 + 1 + 3
    assert {module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)} == {32}


def test_layers_start_with_the_variances_of_the_reference():
    network = CifarResNeXt(11, 8, 32, 10, 3, nn.BatchNorm2d)
    weight = network.get_parameter("layer3.0.conv2.weight")

    assert weight.shape == (1024, 128, 3, 3)
    # C_out is of all groups together; 1 % is over ten standard errors of 1,179,648 samples
    torch.testing.assert_close(weight.std().item(), math.sqrt(2 / (1024 * 9)), rtol=0.01, atol=0.0)
    # 4 % is over five standard errors of 10,240 samples
    torch.testing.assert_close(network.fc.weight.std().item(), math.sqrt(2 / 1024), rtol=0.04, atol=0.0)
    assert (network.fc.bias == 0).all()


@pytest.mark.parametrize("depth", [2, 28, 30])
def test_a_depth_that_is_not_nine_n_plus_two_is_refused(depth):
    with pytest.raises(ValueError, match=rf"`depth` \(={depth}\) must be 9 n \+ 2"):
        build_cifar_resnext(10, depth)


@pytest.mark.parametrize("argument", ["cardinality", "base_width", "in_channels"])
def test_numbers_that_are_not_positive_are_refused(argument):
    numbers = {"depth": 11, "cardinality": 2, "base_width": 4, "num_classes": 10, "in_channels": 3}

    with pytest.raises(ValueError, match=rf"`{argument}` \(=0\) must be at least 1"):
        CifarResNeXt(**{**numbers, argument: 0}, norm_layer=nn.BatchNorm2d)
