import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from ws_algorithm import apply_weight_standardization
from ws_algorithm.recipes.models.imagenet_resnet import build_imagenet_resnet

from .small_networks import count


class PaperConv2d(nn.Conv2d):
    """The layer as it stands in the paper's repository, https://github.com/joe-siyuan-qiao/WeightStandardization."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        std = weight.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5  # unbiased
        return F.conv2d(input, weight / std, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize(
    ("arch", "blocks"), [("resnet50", models.resnet50), ("resnext50_32x4d", models.resnext50_32x4d)]
)
def test_group_norm_and_weight_standardization_are_those_of_the_paper(arch, blocks):
    ours = build_imagenet_resnet(arch, num_classes=5).double()
    paper = blocks(num_classes=5, norm_layer=partial(nn.GroupNorm, 32)).double()
    for module in paper.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = PaperConv2d
        elif isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, mean=1, std=0.3)
            nn.init.normal_(module.bias, std=0.3)
    ours.module.load_state_dict(paper.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    apply_weight_standardization(ours, formula="paper", layers="normalized")

    with torch.no_grad():
        torch.testing.assert_close(ours((images, None)), paper(images))


@pytest.mark.parametrize(
    ("arch", "convolutions", "tensors"),
    [("resnet50", 53, 161), ("resnet101", 104, 314), ("resnext50_32x4d", 53, 161), ("resnext101_32x4d", 104, 314)],
)
def test_every_convolution_is_standardized(arch, convolutions, tensors):
    with torch.device("meta"):
        model = build_imagenet_resnet(arch)
    # convolution, scale and shift of each of the layers, and the classifier's two, as in the released files
    assert len(model.module.state_dict()) == tensors == 3 * convolutions + 2

    assert apply_weight_standardization(model, layers="normalized") == convolutions == count(model, nn.Conv2d)


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"])
def test_keys_and_shapes_are_torchvisions(arch):
    with torch.device("meta"):
        ours, theirs = build_imagenet_resnet(arch, norm="batch").module, models.get_model(arch)

    shapes = [{key: tensor.shape for key, tensor in network.state_dict().items()} for network in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_the_stride_is_in_the_3x3_convolution():
    with torch.device("meta"):
        model = build_imagenet_resnet("resnext101_32x4d")
    strided = {
        name: module.kernel_size
        for name, module in model.module.named_modules()
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2)
    }

    assert strided == {
        "conv1": (7, 7),
        **{f"layer{stage}.0.conv2": (3, 3) for stage in (2, 3, 4)},
        **{f"layer{stage}.0.downsample.0": (1, 1) for stage in (2, 3, 4)},
    }


@pytest.mark.parametrize(("arch", "outputs"), [("resnet50", 512), ("resnext50_32x4d", 1024)])
def test_convolutions_start_with_the_variance_of_the_reference(arch, outputs):
    network = build_imagenet_resnet(arch).module
    weight = network.get_parameter("layer4.0.conv2.weight")

    # 294,912 samples or more: 1 % is seven standard errors. In a ResNeXt C_out is of all 32 groups together
    torch.testing.assert_close(weight.std().item(), math.sqrt(2 / (3 * 3 * outputs)), rtol=0.01, atol=0.0)
    assert (network.get_parameter("layer4.0.bn3.weight") == 1).all()  # not zero
    assert (network.get_parameter("layer4.0.bn3.bias") == 0).all()


def test_group_norms_have_32_groups_unless_told_otherwise():
    with torch.device("meta"):
        model = build_imagenet_resnet("resnet50")

    assert {(module.num_groups, module.eps) for module in model.modules() if isinstance(module, nn.GroupNorm)} == {
        (32, 1e-5)
    }


@pytest.mark.parametrize("size", [32, 47, 96])
def test_images_of_any_size(size):
    model = build_imagenet_resnet("resnet18", num_classes=3)

    with torch.no_grad():
        assert model((torch.randn(1, 3, size, size), None)).shape == (1, 3)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match=r"`arch` \(='resnet51'\) must be one of resnet18, .*, resnext101_32x4d\."):
        build_imagenet_resnet("resnet51")  # pyright: ignore[reportArgumentType]
