"""Names and shapes of the targets are those of the networks that torchvision and timm build."""

import pytest
import timm
import torch
from torch import nn

from ws_algorithm import apply_weight_standardization
from ws_algorithm.checkpoints.targets import MODELS, fitting_model, normalized_convolutions, target_shapes
from ws_algorithm.recipes.models.imagenet_resnet import build_imagenet_resnet
from ws_algorithm.recipes.models.rcnn import build_faster_rcnn, build_mask_rcnn

ARCHITECTURES = ("resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x4d")
# A norm of two tensors behind each of 53 or 104 convolutions, and the classifier. In a detector, without that one: 8
# convolutions of the pyramid and 4 of the box head with norms, 3 of proposals and 3 linear layers of two tensors each;
# 4 convolutions of the mask head with norms, and 2 of two tensors
CLASSIFIER = {"50": 53 * 3 + 2, "101": 104 * 3 + 2}
FASTER = {depth: count - 2 + 12 * 3 + 6 * 2 for depth, count in CLASSIFIER.items()}
MASK = {depth: count + 4 * 3 + 2 * 2 for depth, count in FASTER.items()}


def network_of(model: str, norm: str = "group") -> nn.Module:
    kind, arch = MODELS[model]
    with torch.device("meta"):
        if kind == "bit":
            return timm.create_model(model, num_classes=7)
        builder = {"classifier": build_imagenet_resnet, "faster_rcnn": build_faster_rcnn, "mask_rcnn": build_mask_rcnn}
        return builder[kind](arch, 7, norm=norm).module


def shapes_of(network: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in network.state_dict().items()]


def test_the_counts_are_those_that_are_published():
    assert (CLASSIFIER, FASTER, MASK) == ({"50": 161, "101": 314}, {"50": 207, "101": 360}, {"50": 223, "101": 376})


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("prefix, counts", [("", CLASSIFIER), ("faster_rcnn_", FASTER), ("mask_rcnn_", MASK)])
def test_a_target_is_the_network_of_torchvision(prefix, counts, arch):
    network = network_of(f"{prefix}{arch}")
    shapes = target_shapes(f"{prefix}{arch}", 7)

    assert list(shapes.items()) == shapes_of(network)
    assert len(shapes) == counts["101" if "101" in arch else "50"]
    assert fitting_model(network.state_dict()) == f"{prefix}{arch}"


@pytest.mark.parametrize("model", ["resnet18", "resnet34", "resnet50", "resnet152", "mask_rcnn_resnet50"])
def test_a_target_with_batch_norm_has_its_statistics(model):
    assert list(target_shapes(model, 7, "batch").items()) == shapes_of(network_of(model, "batch"))


@pytest.mark.parametrize("model", [model for model in MODELS if MODELS[model][0] == "bit"])
def test_a_target_of_big_transfer_is_the_network_of_timm(model):
    network = network_of(model)

    assert list(target_shapes(model, 7).items()) == shapes_of(network)
    assert fitting_model(network.state_dict()) == model


def test_deeplabv3_has_one_convolution_behind_the_projection():
    # 104 convolutions of the body and 6 of the head, a norm of two tensors behind each, and a last layer of two
    shapes = target_shapes("deeplabv3_resnet101", 21)

    assert len(shapes) == (104 + 6) * 3 + 2
    assert shapes["classifier.0.project.0.weight"] == (256, 5 * 256, 1, 1)
    assert shapes["classifier.1.weight"] == (21, 256, 1, 1)


@pytest.mark.parametrize("model", ["resnet18", "mask_rcnn_resnet50"])
def test_normalized_convolutions_are_those_that_the_selection_finds(model):
    network = network_of(model)
    apply_weight_standardization(network, layers="normalized")
    standardized = {name for name, module in network.named_modules() if hasattr(module, "parametrizations")}

    assert normalized_convolutions(model, target_shapes(model, 7)) == standardized


def test_an_unknown_model_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"`model` \(='resnet51'\) must be one of resnet18, .*mask_rcnn_resnet50"):
        target_shapes("resnet51", 7)


def test_a_network_of_another_width_fits_no_model():
    narrow = {name: torch.zeros(()).expand(shape) for name, shape in target_shapes("resnet50", 7).items()}
    narrow["layer1.0.conv2.weight"] = torch.zeros(())[None, None, None].expand(32, 32, 3, 3)

    assert fitting_model(narrow) is None
