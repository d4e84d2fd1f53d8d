"""How many convolutions are standardized in the networks that the papers train, and which are not.

The networks of Weight Standardization (https://arxiv.org/abs/1903.10520) have group normalization everywhere but in the
layers that predict. They are built here from the parts of torchvision.
"""

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchvision
from tensor_following import CONVOLUTIONS, follow
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.segmentation.deeplabv3 import ASPP, DeepLabHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from ws_algorithm import apply_weight_standardization, is_weight_standardized, remove_weight_standardization

GN = functools.partial(nn.GroupNorm, 32)
CHANNELS = 256  # of the feature pyramid
RPN = {"rpn.head.conv.0.0", "rpn.head.cls_logits", "rpn.head.bbox_pred"}
MASKS = {"roi_heads.mask_predictor.mask_fcn_logits"}
# Small images and few proposals: only for the run that the counts are compared with
SETTINGS: dict[str, Any] = {"min_size": 128, "max_size": 160, "rpn_post_nms_top_n_test": 10}


def _resnet(name: str) -> nn.Module:
    return torchvision.models.get_model(name, norm_layer=GN)


def _deeplabv3(head: type[nn.Module]) -> nn.Module:
    model = torchvision.models.segmentation.deeplabv3_resnet101(weights=None, weights_backbone=None, aux_loss=False)
    model.classifier = head(2048, 21)
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, GN(norm.num_features))
    return model


class PaperDeepLabHead(nn.Sequential):
    """ASPP and the layer that predicts, without the 3x3 convolution that torchvision has between them.

    https://github.com/chenxi116/DeepLabv3.pytorch, which the paper names as its source.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(ASPP(in_channels, (6, 12, 18)), nn.Conv2d(256, num_classes, 1))


def _parts(resnet: str) -> dict[str, Any]:
    """A backbone and a box head that are normalized, as in the paper; torchvision's own have frozen norms, or none."""
    backbone = resnet_fpn_backbone(backbone_name=resnet, weights=None, norm_layer=GN, trainable_layers=5)
    backbone.fpn = FeaturePyramidNetwork([256, 512, 1024, 2048], CHANNELS, LastLevelMaxPool(), norm_layer=GN)
    box_head = FastRCNNConvFCHead((CHANNELS, 7, 7), [CHANNELS] * 4, [1024], norm_layer=GN)
    return {"backbone": backbone, "num_classes": 91, "box_head": box_head, **SETTINGS}


def _faster_rcnn(resnet: str) -> nn.Module:
    return FasterRCNN(**_parts(resnet))


def _mask_rcnn(resnet: str) -> nn.Module:
    return MaskRCNN(**_parts(resnet), mask_head=MaskRCNNHeads(CHANNELS, [CHANNELS] * 4, 1, norm_layer=GN))


# ResNet-50: stem 1 + 3 convolutions in each of 3 + 4 + 6 + 3 = 16 blocks + 4 shortcuts = 53
# ResNet-101: 1 + 3 x (3 + 4 + 23 + 3) + 4 = 104
# DeepLabv3: backbone 104 + of ASPP one 1x1, three dilated, one of the pooled image and the projection of all = 6: 110.
# The head of torchvision has one more, a 3x3 before the layer that predicts: 111
# Faster R-CNN: backbone 53 + a lateral and an output one at each of 4 levels of the pyramid = 8 + box head 4 = 65
# Mask R-CNN: 65 + mask head 4 = 69; the transposed convolution behind it is none of those that can be standardized
# With ResNet-101 there are 104 - 53 = 51 more: 116 and 120
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, set[str]]] = {
    "ResNet-50": (lambda: _resnet("resnet50"), 53, set()),
    "ResNet-101": (lambda: _resnet("resnet101"), 104, set()),
    "DeepLabv3 R-101": (lambda: _deeplabv3(PaperDeepLabHead), 104 + 6, {"classifier.1"}),
    "DeepLabv3 R-101 of torchvision": (lambda: _deeplabv3(DeepLabHead), 104 + 6 + 1, {"classifier.4"}),
    "Faster R-CNN R-50": (lambda: _faster_rcnn("resnet50"), 53 + 8 + 4, RPN),
    "Faster R-CNN R-101": (lambda: _faster_rcnn("resnet101"), 104 + 8 + 4, RPN),
    "Mask R-CNN R-50": (lambda: _mask_rcnn("resnet50"), 53 + 8 + 4 + 4, RPN | MASKS),
    "Mask R-CNN R-101": (lambda: _mask_rcnn("resnet101"), 104 + 8 + 4 + 4, RPN | MASKS),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, int, set[str]]]:
    build, count, left_out = NETWORKS[request.param]
    torch.manual_seed(17)
    yield build(), count, left_out
    gc.collect()


def test_the_count_is_that_of_a_run(network):
    model, count, left_out = network
    image = torch.rand(3, 64, 64)
    followed = follow(model.eval(), [image] if hasattr(model, "rpn") else image[None])

    assert len(followed.normalized) == count
    assert set(followed.order) - followed.normalized == left_out


@pytest.mark.parametrize("training", [True, False])
def test_normalized_convolutions_are_those_of_the_papers(network, training):
    model, count, left_out = network
    model.train(training)
    convolutions = {name: child for name, child in model.named_modules() if isinstance(child, CONVOLUTIONS)}
    try:
        assert apply_weight_standardization(model, layers="normalized") == count
        assert {name for name, conv in convolutions.items() if not is_weight_standardized(conv)} == left_out
    finally:
        remove_weight_standardization(model)
