import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ws_algorithm.recipes.models.cifar_wide_resnet import CifarWideResNet, WideBlock, build_cifar_wide_resnet

from .small_networks import count


@pytest.mark.parametrize(("inputs", "stride"), [(6, 1), (4, 1), (6, 2)])
def test_a_shortcut_that_changes_shape_starts_after_the_first_relu(inputs, stride):
    block = WideBlock(inputs, 6, stride, 0.0, nn.BatchNorm2d)
    x = torch.randn(2, inputs, 8, 8)

    first = F.batch_norm(x, None, None, training=True).clamp(min=0)  # scale 1, shift 0
    out = F.conv2d(first, block.conv1.weight, None, stride, padding=1)
    out = F.conv2d(F.batch_norm(out, None, None, training=True).clamp(min=0), block.conv2.weight, None, padding=1)
    shortcut = x if block.downsample is None else F.conv2d(first, block.downsample.weight, None, stride)

    assert (block.downsample is None) == (inputs == 6 and stride == 1)
    torch.testing.assert_close(block(x), out + shortcut)


def test_dropout_is_between_the_convolutions_of_a_block_and_in_training_only():
    model = build_cifar_wide_resnet(10, 10, 1, dropout=0.5)
    images = torch.randn(1, 3, 32, 32)

    with torch.no_grad():
        assert not torch.equal(model((images, None)), model((images, None)))
        shares = []
        for module in model.modules():
            if isinstance(module, WideBlock):
                module.conv2.register_forward_hook(
                    lambda module, inputs, output: shares.append((inputs[0] == 0).double().mean().item())
                )
        model((images, None))
        # half of the channels' values are negative before the ReLU, and half of the others are dropped
        assert all(share == pytest.approx(0.75, abs=0.1) for share in shares)
        model.eval()
        assert torch.equal(model((images, None)), model((images, None)))


def test_stages_widen_and_halve_the_image():
    model = CifarWideResNet(10, 3, 0.0, 10, 1, nn.BatchNorm2d)
    sizes = []
    for name in ("conv1", "layer1", "layer2", "layer3"):
        getattr(model, name).register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape)))

    model(torch.randn(2, 1, 16, 16))

    assert sizes == [(2, 16, 16, 16), (2, 48, 16, 16), (2, 96, 8, 8), (2, 192, 4, 4)]


def test_layers_by_depth():
    with torch.device("meta"):
        network = build_cifar_wide_resnet(10, 28, 2).module

    # 24 in blocks, the stem and three shortcuts: with the classifier 26 weighted layers on the longest way
    assert count(network, WideBlock) == 12
    assert count(network, nn.Conv2d) == 24 + 1 + 3
    assert count(network, nn.GroupNorm) == 24 + 1


def test_layers_start_with_the_variances_of_the_reference():
    network = CifarWideResNet(10, 4, 0.0, 10, 3, nn.BatchNorm2d)
    weight = network.get_parameter("layer3.0.conv2.weight")

    # 1 % is ten standard errors of 589,824 samples
    torch.testing.assert_close(weight.std().item(), math.sqrt(2 / (256 * 9)), rtol=0.01, atol=0.0)
    assert (network.fc.bias == 0).all()


@pytest.mark.parametrize("depth", [4, 11, 26])
def test_a_depth_that_is_not_six_n_plus_four_is_refused(depth):
    with pytest.raises(ValueError, match=rf"`depth` \(={depth}\) must be 6 n \+ 4"):
        build_cifar_wide_resnet(10, depth)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_a_dropout_that_is_no_share_is_refused(dropout):
    with pytest.raises(ValueError, match=rf"`dropout` \(={dropout}\) must be at least 0 and below 1"):
        build_cifar_wide_resnet(10, 10, 1, dropout)
