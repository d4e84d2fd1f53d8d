"""Converted classifiers and segmentation networks compute what those do that the checkpoints were written by.

Each network of a source is built as the source builds it, with random weights, in ``tests/sources``.
"""

import pytest
import torch
from converted_networks import (
    GN,
    TOLERANCE,
    as_expected_by,
    classifier,
    converted_file,
    count_standardized,
    loaded,
    relative_error,
)
from sources import deeplabv3_pytorch, detectron, mmdetection, weight_standardization
from sources.image_inputs import bgr_of_detectron, rgb_of_imagenet
from sources.random_weights import random_network
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet101
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import ASPP


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def images() -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


AUTHORS = {"R-50": (50, 1, "resnet50"), "X-50": (50, 32, "resnext50_32x4d")}
AUTHORS |= {"R-101": (101, 1, "resnet101"), "X-101": (101, 32, "resnext101_32x4d")}
KEYS = {50: 161, 101: 314}  # 53 or 104 convolutions, a norm of two tensors behind each, and the two of the classifier
SAVED = {"X-50": weight_standardization.save_in_training}  # the others as they were released


@pytest.mark.parametrize("name", ["R-50", "X-50", pytest.param("R-101", marks=pytest.mark.slow), "X-101"])
def test_a_classifier_of_the_authors(tmp_path, images, name):
    depth, groups, arch = AUTHORS[name]
    save = SAVED.get(name, weight_standardization.save_published)
    theirs = random_network(lambda: weight_standardization.Classifier(depth, groups))
    save(theirs, tmp_path / f"{name}-GN-WS.pth.tar")

    converted = converted_file(tmp_path / f"{name}-GN-WS.pth.tar", arch)
    ours = loaded(lambda: classifier(arch), converted)

    assert (converted.source, converted.formula) == ("weight_standardization", "paper")
    assert len(theirs.state_dict()) == len(converted.state_dict) == KEYS[depth]
    assert count_standardized(ours) == {50: 53, 101: 104}[depth]
    expected = theirs.double()(rgb_of_imagenet(images))
    assert relative_error(ours(as_expected_by(converted, images)), expected) <= TOLERANCE


def test_another_formula_or_another_order_of_colours_would_have_been_noticed(tmp_path, images):
    theirs = random_network(lambda: weight_standardization.Classifier(50))
    weight_standardization.save_published(theirs, tmp_path / "R-50-GN-WS.pth.tar")
    converted = converted_file(tmp_path / "R-50-GN-WS.pth.tar", "resnet50")
    expected, seen = theirs.double()(rgb_of_imagenet(images)), as_expected_by(converted, images)

    for formula in ("composer", "timm"):
        ours = loaded(lambda: classifier("resnet50"), converted, formula)
        assert relative_error(ours(seen), expected) > 0.01
    ours = loaded(lambda: classifier("resnet50"), converted)
    assert relative_error(ours(seen.flip(1)), expected) > 0.01


@pytest.mark.parametrize("norm", ["gn", "bn"])
def test_a_backbone_of_mmdetection_has_either_name_of_its_norms(tmp_path, images, norm):
    theirs = random_network(lambda: mmdetection.backbone(50))
    mmdetection.save_backbone(theirs, norm, tmp_path / "resnet50_gn_ws.pth")

    converted = converted_file(tmp_path / "resnet50_gn_ws.pth", "resnet50")
    ours = loaded(_body_of_resnet50, converted)

    assert (converted.source, converted.formula) == ("mmdetection_backbone", "paper")
    assert len(converted.state_dict) == 159  # those of the classifier but two
    stages, expected = ours(as_expected_by(converted, images)), theirs.double()(rgb_of_imagenet(images))
    for stage, own in zip(stages.values(), expected, strict=True):
        assert relative_error(stage, own) <= TOLERANCE


def _body_of_resnet50() -> nn.Module:
    return IntermediateLayerGetter(classifier("resnet50"), {f"layer{stage}": str(stage) for stage in range(1, 5)})


@pytest.mark.parametrize("depth, wrapped, momentum", [(50, False, False), (101, True, True)])
def test_a_classifier_of_detectron(tmp_path, images, depth, wrapped, momentum):
    theirs = detectron.Detectron(depth, detector=False)
    detectron.save(theirs, tmp_path / f"R-{depth}-GN.pkl", wrapped=wrapped, momentum=momentum)

    converted = converted_file(tmp_path / f"R-{depth}-GN.pkl", f"resnet{depth}")
    ours = loaded(lambda: classifier(f"resnet{depth}"), converted)

    assert (converted.source, converted.formula, converted.image_input.channels) == ("detectron", None, "rgb")
    assert len(theirs.blobs) == len(converted.state_dict) == KEYS[depth]
    expected = theirs.double().classify(bgr_of_detectron(images))
    assert relative_error(ours(as_expected_by(converted, images)), expected) <= TOLERANCE


class OurDeepLab(nn.Module):
    """torchvision's parts: rates for stride 16, and no convolution between ASPP and the layer that predicts."""

    def __init__(self) -> None:
        super().__init__()
        body = resnet101(norm_layer=GN, replace_stride_with_dilation=[False, False, True])
        self.backbone = IntermediateLayerGetter(body, {"layer4": "out"})
        self.classifier = nn.Sequential(ASPP(2048, (6, 12, 18)), nn.Conv2d(256, 21, 1))
        for parent in list(self.classifier.modules()):
            for name, norm in list(parent.named_children()):
                if isinstance(norm, nn.BatchNorm2d):
                    setattr(parent, name, GN(norm.num_features))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.classifier(self.backbone(x)["out"])
        return F.interpolate(scores, x.shape[2:], mode="bilinear", align_corners=True)


def test_deeplabv3(tmp_path, images):
    theirs = random_network(deeplabv3_pytorch.DeepLab)
    deeplabv3_pytorch.save(theirs, tmp_path / "deeplab.pth")

    converted = converted_file(tmp_path / "deeplab.pth", "deeplabv3_resnet101")
    ours = loaded(OurDeepLab, converted)

    assert (converted.source, converted.formula) == ("deeplabv3_pytorch", "paper")
    assert len(theirs.state_dict()) == len(converted.state_dict) == 332
    assert count_standardized(ours) == 110
    expected = theirs.double()(rgb_of_imagenet(images))
    assert relative_error(ours(as_expected_by(converted, images)), expected) <= TOLERANCE
