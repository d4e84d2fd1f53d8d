import math

import pytest
import torch
from torch import nn

from ws_algorithm.recipes.models.cifar_resnet import CifarResNet, build_cifar_resnet

from .small_networks import count, parameters


def test_parameters_of_resnet_20_by_hand():
    stem = 3 * 16 * 9 + 2 * 16
    first = 6 * (16 * 16 * 9 + 2 * 16)
    second = (16 * 32 * 9 + 2 * 32) + 5 * (32 * 32 * 9 + 2 * 32) + (16 * 32 + 2 * 32)
    third = (32 * 64 * 9 + 2 * 64) + 5 * (64 * 64 * 9 + 2 * 64) + (32 * 64 + 2 * 64)
    head = 64 * 10 + 10

    assert parameters(build_cifar_resnet(10, depth=20, width=16, in_channels=3)) == stem + first + second + third + head


@pytest.mark.parametrize("depth", [8, 14, 20, 32])
def test_convolutions_by_depth(depth):
    with torch.device("meta"):
        model = build_cifar_resnet(10, depth)
    blocks = (depth - 2) // 6
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    projections = {name: module for name, module in convolutions.items() if module.kernel_size == (1, 1)}

    # two in each block of three stages, the stem, and a projection where the width changes
    assert len(convolutions) == 3 * 2 * blocks + 1 + 2
    assert list(projections) == ["module.layer2.0.downsample.0", "module.layer3.0.downsample.0"]
    assert [(conv.in_channels, conv.out_channels, conv.stride) for conv in projections.values()] == [
        (16, 32, (2, 2)),
        (32, 64, (2, 2)),
    ]
    assert all(conv.bias is None for conv in convolutions.values())
    assert count(model, nn.GroupNorm) == len(convolutions)


def test_bottlenecks_by_depth():
    with torch.device("meta"):
        model = build_cifar_resnet(10, depth=14, block="bottleneck")

    # three in each of two blocks of three stages, the stem, and a projection at the start of each stage
    assert count(model, nn.Conv2d) == 3 * 2 * 3 + 1 + 3
    assert model.module.get_parameter("fc.weight").shape == (10, 4 * 4 * 16)
    assert [model.module.get_submodule(f"layer{stage}.0.conv2").stride for stage in (1, 2, 3)] == [
        (1, 1),
        (2, 2),
        (2, 2),
    ]


@pytest.mark.parametrize(("block", "expansion"), [("basic", 1), ("bottleneck", 4)])
def test_stages_halve_the_image(block, expansion):
    model = CifarResNet(8, 8, 10, 1, nn.BatchNorm2d, block)
    sizes = []
    for name in ("conv1", "layer1", "layer2", "layer3"):
        getattr(model, name).register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape)))

    model(torch.randn(2, 1, 28, 28))

    assert sizes == [
        (2, 8, 28, 28),
        (2, 8 * expansion, 28, 28),
        (2, 16 * expansion, 14, 14),
        (2, 32 * expansion, 7, 7),
    ]


def test_convolutions_start_with_the_variance_that_keeps_gradients():
    weight = CifarResNet(8, 64, 10, 3, nn.BatchNorm2d).get_parameter("layer3.0.conv2.weight")

    # He et al. 2015 in the backward direction: 2 / (256 outputs x 9); 1 % is ten standard errors of 589,824 samples
    torch.testing.assert_close(weight.std().item(), math.sqrt(2 / (256 * 9)), rtol=0.01, atol=0.0)


def test_groups_are_eight_unless_told_otherwise():
    with torch.device("meta"):
        model = build_cifar_resnet(10)

    assert {module.num_groups for module in model.modules() if isinstance(module, nn.GroupNorm)} == {8}


@pytest.mark.parametrize("depth", [2, 7, 9, 18, 0, -4])
def test_a_depth_that_is_not_six_n_plus_two_is_refused(depth):
    with pytest.raises(ValueError, match=rf"`depth` \(={depth}\) must be 6 n \+ 2"):
        build_cifar_resnet(10, depth)


@pytest.mark.parametrize("width", [4, 12, 20])
def test_a_width_that_the_default_groups_do_not_divide_is_refused(width):
    with pytest.raises(ValueError, match=rf"`num_groups` \(=8\) must divide .* one has {width}\. .*channels_per_group"):
        build_cifar_resnet(10, 8, width)


def test_an_unknown_block_is_refused():
    with pytest.raises(ValueError, match=r"`block` \(='wide'\) must be 'basic' or 'bottleneck'"):
        build_cifar_resnet(10, block="wide")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("argument", ["width", "in_channels"])
def test_numbers_that_are_not_positive_are_refused(argument):
    numbers = {"depth": 8, "width": 8, "num_classes": 10, "in_channels": 3}

    with pytest.raises(ValueError, match=rf"`{argument}` \(=0\) must be at least 1"):
        CifarResNet(**{**numbers, argument: 0}, norm_layer=nn.BatchNorm2d, block="basic")
