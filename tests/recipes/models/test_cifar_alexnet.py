import math

import pytest
import torch
from torch import nn

from ws_algorithm.recipes.models.cifar_alexnet import CifarAlexNet, build_cifar_alexnet

from .small_networks import count


def test_the_published_network_has_the_published_keys():
    with torch.device("meta"):
        network = build_cifar_alexnet(10, norm="none").module
    layers = [f"features.{position}" for position in (0, 3, 6, 8, 10)] + ["classifier"]

    assert list(network.state_dict()) == [f"{layer}.{tensor}" for layer in layers for tensor in ("weight", "bias")]
    assert network.get_parameter("classifier.weight").shape == (10, 256)


@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d])
def test_three_of_five_convolutions_are_pooled(norm_layer):
    network = CifarAlexNet(10, 3, norm_layer)
    sizes = []
    for layer in network.features:
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
            layer.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))

    network(torch.randn(2, 3, 32, 32))

    assert sizes == [
        (64, 8, 8),
        (64, 4, 4),
        (192, 4, 4),
        (192, 2, 2),
        (384, 2, 2),
        (256, 2, 2),
        (256, 2, 2),
        (256, 1, 1),
    ]
    assert count(network, nn.ReLU) == 5


def test_a_norm_stands_after_each_convolution():
    with torch.device("meta"):
        layers = list(build_cifar_alexnet(10).module.get_submodule("features").children())
    after = [layers[position + 1] for position, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]

    assert [(norm.num_groups, norm.num_channels) for norm in after if isinstance(norm, nn.GroupNorm)] == [
        (32, channels) for channels in (64, 192, 384, 256, 256)
    ]


def test_convolutions_start_as_torchs_do():
    weight = build_cifar_alexnet(10).module.get_parameter("features.8.weight")
    bound = 1 / math.sqrt(192 * 9)

    assert weight.shape == (384, 192, 3, 3)
    assert weight.abs().max() <= bound
    # uniform: bound / sqrt(3). 1 % is eighteen standard errors of 663,552 samples
    torch.testing.assert_close(weight.std().item(), bound / math.sqrt(3), rtol=0.01, atol=0.0)


def test_groups_of_no_norm_are_refused():
    with pytest.raises(ValueError, match=r"`channels_per_group` \(=4\) is for norm='group', and `norm` is 'none'"):
        build_cifar_alexnet(10, norm="none", channels_per_group=4)


def test_29_pixels_are_enough_and_28_are_not():
    network = build_cifar_alexnet(10, norm="none").module

    assert network(torch.randn(1, 3, 29, 29)).shape == (1, 10)
    with pytest.raises(RuntimeError, match="Output size is too small"):
        network(torch.randn(1, 3, 28, 28))
