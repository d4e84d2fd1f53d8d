import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ws_algorithm.recipes.models.cifar_densenet import DenseLayer, Transition, build_cifar_densenet

from .small_networks import count


def test_a_dense_layer_adds_to_its_input():
    layer = DenseLayer(6, 4, nn.BatchNorm2d)
    x = torch.randn(2, 6, 5, 5)

    out = F.conv2d(F.batch_norm(x, None, None, training=True).clamp(min=0), layer.conv1.weight)
    out = F.conv2d(F.batch_norm(out, None, None, training=True).clamp(min=0), layer.conv2.weight, padding=1)

    assert layer.conv1.out_channels == 16
    torch.testing.assert_close(layer(x), torch.cat([x, out], dim=1))


def test_a_transition_halves_channels_and_image():
    transition = Transition(9, nn.BatchNorm2d)
    x = torch.randn(2, 9, 6, 6)

    out = F.conv2d(F.batch_norm(x, None, None, training=True).clamp(min=0), transition.conv1.weight)

    torch.testing.assert_close(transition(x), out.view(2, 4, 3, 2, 3, 2).mean(dim=(3, 5)))


# Channels at the end of each block, by hand: 2 k, n times k more, half of it, and so on
@pytest.mark.parametrize(
    ("depth", "growth_rate", "ends", "group"),
    [(100, 12, (24 + 192, 108 + 192, 150 + 192), 6), (190, 40, (80 + 1240, 660 + 1240, 950 + 1240), 10)],
)
def test_channels_of_the_published_networks_and_their_groups(depth, growth_rate, ends, group):
    with torch.device("meta"):
        network = build_cifar_densenet(10, depth, growth_rate).module
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]

    inputs = ("trans1.conv1.weight", "trans2.conv1.weight", "fc.weight")
    assert tuple(network.get_parameter(name).shape[1] for name in inputs) == ends
    assert {norm.num_channels // norm.num_groups for norm in norms} == {group}
    assert count(network, nn.Conv2d) == depth - 1  # the classifier is the last layer
    assert len(norms) == depth - 2 + 1  # before each convolution but the stem, and before the classifier


@given(blocks=st.integers(1, 6), growth_rate=st.integers(1, 40))
def test_default_groups_are_the_greatest_that_fit(blocks, growth_rate):
    with torch.device("meta"):
        network = build_cifar_densenet(10, 6 * blocks + 4, growth_rate).module
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]

    (channels,) = {norm.num_channels // norm.num_groups for norm in norms}
    assert channels == math.gcd(*(norm.num_channels for norm in norms))


def test_convolutions_start_with_the_variance_of_the_reference():
    network = build_cifar_densenet(10, 10, 64).module
    weight = network.get_parameter("dense3.0.conv2.weight")

    assert weight.shape == (64, 256, 3, 3)
    # 2 % is over ten standard errors of 147,456 samples
    torch.testing.assert_close(weight.std().item(), math.sqrt(2 / (64 * 9)), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("depth", [4, 13, 99])
def test_a_depth_that_is_not_six_n_plus_four_is_refused(depth):
    with pytest.raises(ValueError, match=rf"`depth` \(={depth}\) must be 6 n \+ 4"):
        build_cifar_densenet(10, depth)


def test_a_growth_rate_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"`growth_rate` \(=0\) must be at least 1"):
        build_cifar_densenet(10, 10, growth_rate=0)
