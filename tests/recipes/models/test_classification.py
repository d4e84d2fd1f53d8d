import math

import pytest
import torch
from torch import nn

from ws_algorithm.recipes import registry
from ws_algorithm.recipes.models.classification import CifarResNet, build_cifar_resnet, resolve_norm_layer

# The smallest network of each builder, for images of 3x16x16 in seven classes
SMALL = {"cifar_resnet": {"num_classes": 7, "depth": 8, "width": 8}}


def count(model: nn.Module, *kinds: type[nn.Module]) -> int:
    return sum(isinstance(module, kinds) for module in model.modules())


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_builder_is_tested():
    assert SMALL.keys() == registry.MODELS.keys()


@pytest.mark.parametrize("name", SMALL)
def test_one_output_per_class(name):
    model = registry.MODELS[name](**SMALL[name])

    outputs = model((torch.randn(2, 3, 16, 16), torch.tensor([0, 6])))

    assert outputs.shape == (2, 7)
    assert outputs.isfinite().all()


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_the_image_and_every_parameter(name, norm):
    model = registry.MODELS[name](**SMALL[name], norm=norm)
    images = torch.randn(4, 3, 16, 16, requires_grad=True)
    batch = (images, torch.tensor([0, 1, 2, 3]))

    model.loss(model(batch), batch).backward()

    assert images.grad is not None and (images.grad != 0).any(dim=(1, 2, 3)).all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_one_image_does_not_see_another_unless_with_batch_norm(name):
    images = torch.randn(4, 3, 16, 16)
    for norm, independent in (("group", True), ("batch", False)):
        model = registry.MODELS[name](**SMALL[name], norm=norm)
        together, alone = model((images, None)), model((images[:2], None))
        assert torch.allclose(together[:2], alone, atol=1e-5) == independent  # kernels differ in the last bits


@pytest.mark.parametrize(
    ("norm", "chosen", "other"), [("batch", nn.BatchNorm2d, nn.GroupNorm), ("group", nn.GroupNorm, nn.BatchNorm2d)]
)
@pytest.mark.parametrize("name", SMALL)
def test_all_norms_are_of_the_chosen_kind(name, norm, chosen, other):
    model = registry.MODELS[name](**SMALL[name], norm=norm)

    assert count(model, chosen) == count(model, nn.Conv2d) > 0  # one after each convolution
    assert count(model, other) == 0


@pytest.mark.parametrize("name", SMALL)
def test_norms_do_not_change_the_number_of_parameters(name):
    assert parameters(registry.MODELS[name](**SMALL[name], norm="batch")) == parameters(
        registry.MODELS[name](**SMALL[name], norm="group")
    )


@pytest.mark.parametrize("name", SMALL)
def test_building_on_the_meta_device_takes_no_memory(name):
    state = torch.get_rng_state()
    with torch.device("meta"):
        model = registry.MODELS[name](**SMALL[name])

    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert parameters(model) == parameters(registry.MODELS[name](**SMALL[name]))


@pytest.mark.parametrize("name", SMALL)
def test_metrics_and_loss_are_those_of_classification(name):
    metrics = registry.MODELS[name](**SMALL[name]).get_metrics(is_train=False)

    assert list(metrics) == ["CrossEntropy", "MulticlassAccuracy"]
    assert metrics["MulticlassAccuracy"].num_classes == 7


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


def test_stages_halve_the_image():
    model = CifarResNet(8, 8, 10, 1, nn.BatchNorm2d)
    sizes = []
    for name in ("conv1", "layer1", "layer2", "layer3"):
        getattr(model, name).register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape)))

    model(torch.randn(2, 1, 28, 28))

    assert sizes == [(2, 8, 28, 28), (2, 8, 28, 28), (2, 16, 14, 14), (2, 32, 7, 7)]


def test_convolutions_start_with_the_variance_that_keeps_gradients():
    weight = CifarResNet(8, 64, 10, 3, nn.BatchNorm2d).get_parameter("layer3.0.conv2.weight")

    # He et al. 2015 in the backward direction: 2 / (256 outputs x 9); 1 % is seven standard errors of 589,824 samples
    torch.testing.assert_close(weight.std().item(), math.sqrt(2 / (256 * 9)), rtol=0.01, atol=0.0)


@pytest.mark.parametrize("depth", [2, 7, 9, 18, 0, -4])
def test_a_depth_that_is_not_six_n_plus_two_is_refused(depth):
    with pytest.raises(ValueError, match=rf"`depth` \(={depth}\) must be 6 n \+ 2"):
        build_cifar_resnet(10, depth)


@pytest.mark.parametrize(("groups", "width"), [(8, 12), (32, 16), (0, 16), (-4, 16)])
def test_groups_that_do_not_divide_the_width_are_refused(groups, width):
    with pytest.raises(ValueError, match=rf"`num_groups` \(={groups}\) must divide `width` \(={width}\)"):
        build_cifar_resnet(10, 8, width, num_groups=groups)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ValueError, match=r"`norm` \(='layer'\) must be 'batch' or 'group'"):
        resolve_norm_layer("layer", 8, 16)


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_every_group_norm_has_the_number_of_groups(groups):
    model = build_cifar_resnet(10, 8, 16, num_groups=groups)

    assert {module.num_groups for module in model.modules() if isinstance(module, nn.GroupNorm)} == {groups}
