import math

import pytest
import torch
from torch import nn
from torchvision import models

from ws_algorithm.recipes.models.cifar_vgg import CifarVGG, build_cifar_vgg

from .small_networks import count


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_convolutions_are_those_of_torchvisions_with_batch_norm(depth):
    with torch.device("meta"):
        ours = build_cifar_vgg(10, depth, norm="batch").module.features
        theirs = models.get_model(f"vgg{depth}_bn").features

    assert str(ours) == str(theirs)


def test_outputs_are_those_of_torchvisions_features():
    ours = CifarVGG(11, 10, 3, nn.BatchNorm2d)
    theirs = models.vgg11_bn(init_weights=False).features
    theirs.load_state_dict(ours.features.state_dict())
    images = torch.randn(2, 3, 32, 32)

    with torch.no_grad():
        features = theirs(images)
        torch.testing.assert_close(ours(images), features.flatten(1) @ ours.classifier.weight.T)
    assert features.shape == (2, 512, 1, 1)


def test_layers_start_with_the_variances_of_the_reference():
    network = CifarVGG(11, 10, 3, nn.BatchNorm2d)
    weight = network.get_parameter("features.25.weight")

    assert weight.shape == (512, 512, 3, 3)
    # 1 % is over twenty standard errors of 2,359,296 samples
    torch.testing.assert_close(weight.std().item(), math.sqrt(2 / (512 * 9)), rtol=0.01, atol=0.0)
    # 5 % is five standard errors of 5,120 samples
    torch.testing.assert_close(network.classifier.weight.std().item(), 0.01, rtol=0.05, atol=0.0)
    assert all((bias == 0).all() for name, bias in network.named_parameters() if name.endswith("bias"))


def test_a_norm_stands_after_each_convolution():
    with torch.device("meta"):
        network = build_cifar_vgg(10, 19).module

    assert count(network, nn.Conv2d) == count(network, nn.GroupNorm) == 16
    assert {module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)} == {32}


def test_an_unknown_depth_is_refused():
    with pytest.raises(ValueError, match=r"`depth` \(=12\) must be one of 11, 13, 16, 19"):
        build_cifar_vgg(10, 12)
