"""Faster R-CNN and Mask R-CNN with a feature pyramid."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.resnet import ResNet

from ws_algorithm.recipes.coco_metrics import coco_metrics
from ws_algorithm.recipes.detection_input import DetectionInput, ImageFormat, image_input
from ws_algorithm.recipes.detector import Detector
from ws_algorithm.recipes.network_arguments import check_at_least, check_between
from ws_algorithm.recipes.norm_layers import Norm, NormLayer, resolve_norm_layer
from ws_algorithm.recipes.pretrained import has_module, load_pretrained
from ws_algorithm.recipes.region_proposals import LevelAnchors, ProposalNetwork
from ws_algorithm.recipes.resnets import build_resnet
from ws_algorithm.recipes.roi_heads import BoxPredictor, LevelRoIAlign, MaskPredictor, RegionHeads

Architecture = Literal["resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x4d"]
BoxHead = Literal["4conv1fc", "2fc"]

_CHANNELS = 256
_HIDDEN = 1024

_CLASS_HEADS = ("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred")
_CLASS_HEADS += ("roi_heads.mask_predictor.mask_fcn_logits",)


def build_faster_rcnn(
    arch: Architecture,
    num_classes: int = 81,
    norm: Norm = "group",
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    box_head: BoxHead = "4conv1fc",
    frozen_stages: int = 0,
    pretrained: str | None = None,
    *,
    min_size: int = 800,
    max_size: int = 1333,
    image_format: ImageFormat = "rgb",
    anchor_scale: int = 8,
    rounded_anchors: bool = True,
    exact_anchor_strides: bool = False,
    rpn_pre_nms_top_n_train: int = 2000,
    rpn_pre_nms_top_n_test: int = 1000,
    rpn_post_nms_top_n_train: int = 2000,
    rpn_post_nms_top_n_test: int = 1000,
    rpn_batch_size_per_image: int = 256,
    rpn_box_beta: float = 1 / 9,
    roi_align_aligned: bool = False,
    roi_align_sampling_ratio: int = 2,
    match_low_quality: bool = False,
    box_batch_size_per_image: int = 512,
    box_beta: float = 1 / 9,
    box_head_std: float | None = None,
    box_score_thresh: float = 0.05,
    box_nms_thresh: float = 0.5,
    box_detections_per_img: int = 100,
) -> Detector:
    """Faster R-CNN: torchvision's, with norms where mmdetection, Detectron and maskrcnn-benchmark have them.

    With `norm` ``"group"`` or ``"batch"``, norms follow the convolutions of the ResNet, of the feature pyramid and of
    the box head. No norm is in the region proposal network or after the last layers. With ``"frozen"`` they are in the
    ResNet alone. Keys of the weights are torchvision's. The defaults from `min_size` on are torchvision's too;
    ``docs/detection.md`` has a table of what the references have instead.

    Args:
        arch: ``"resnet50"``, ``"resnet101"``, ``"resnext50_32x4d"`` or ``"resnext101_32x4d"``.
        num_classes: Number of classes, the background, label 0, among them. Default: ``81``.
        norm: ``"group"``, ``"batch"`` or ``"frozen"``; see :func:`resolve_norm_layer`. Default: ``"group"``.
        num_groups: Groups of each GroupNorm. Default: 32, as in the paper.
        channels_per_group: In place of `num_groups`: channels in each group.
        box_head: ``"4conv1fc"``, four convolutions of 256 channels and a layer of 1024; or ``"2fc"``, two such layers.
        frozen_stages: 0, everything trains; or the stages of the ResNet, 1 to 4, that do not, with the stem. 1 is what
            Detectron calls ``FREEZE_AT`` 2. Default: ``0``.
        pretrained: A file of weights; see :func:`load_pretrained`. Either of a whole detector, whose last layers start
            anew if it has another number of classes; or classification weights for the ResNet, whose classifier is left
            out. Default: ``None``, random weights.
        min_size: What the shorter side of an image becomes, in pixels. Default: ``800``.
        max_size: The longest that the longer side becomes. Default: ``1333``.
        image_format: ``"rgb"`` or ``"bgr255"``; see :class:`DetectionInput`. Default: ``"rgb"``.
        anchor_scale: Size of anchors in strides of their level: 8 is 32 to 512 pixels. Default: ``8``.
        rounded_anchors: Whether anchors have whole pixels; see :class:`LevelAnchors`. Default: ``True``.
        exact_anchor_strides: Whether anchors of P6 are 64 pixels apart; see :class:`LevelAnchors`. Default: ``False``.
        rpn_pre_nms_top_n_train: Proposals of each level before NMS in training. Default: ``2000``.
        rpn_pre_nms_top_n_test: The same in evaluation. Default: ``1000``.
        rpn_post_nms_top_n_train: Proposals of each image after NMS in training. Default: ``2000``.
        rpn_post_nms_top_n_test: The same in evaluation. Default: ``1000``.
        rpn_batch_size_per_image: Anchors of each image in the losses. Default: ``256``.
        rpn_box_beta: Beta of the smooth L1 loss of proposals; 0 is L1. Default: 1/9.
        roi_align_aligned: Whether RoIAlign takes features at their centres. Default: ``False``.
        roi_align_sampling_ratio: Its samples along each side of a place; 0 for as many as fit. Default: ``2``.
        match_low_quality: Whether the best proposal of an object is always its own; see :class:`BestProposalMatcher`.
            Default: ``False``.
        box_batch_size_per_image: Proposals of each image in the losses. Default: ``512``.
        box_beta: Beta of the smooth L1 loss of boxes; 0 is L1. Default: 1/9.
        box_head_std: Standard deviation from which the convolutions of the box head start. Default: ``None``, those
            of He et al. over the outputs.
        box_score_thresh: The score that a detection exceeds. Default: ``0.05``.
        box_nms_thresh: The IoU above which NMS drops the worse of two. Default: ``0.5``.
        box_detections_per_img: Detections of an image at most. Default: ``100``.

    Shapes: a batch as :class:`Detector` takes it; predictions have ``boxes (N, 4)`` as corners in pixels of the image,
    ``labels (N,)`` and ``scores (N,)``.

    Raises:
        ValueError: If an argument is not one of these, the groups do not divide a layer, the file does not fit, or
            pycocotools is not installed.

    Source: Ren et al. 2015, https://arxiv.org/abs/1506.01497; Lin et al. 2017, https://arxiv.org/abs/1612.03144.
    """
    return _build(masks=False, binary_mask_targets=False, **locals())


def build_mask_rcnn(
    arch: Architecture,
    num_classes: int = 81,
    norm: Norm = "group",
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    box_head: BoxHead = "4conv1fc",
    frozen_stages: int = 0,
    pretrained: str | None = None,
    *,
    min_size: int = 800,
    max_size: int = 1333,
    image_format: ImageFormat = "rgb",
    anchor_scale: int = 8,
    rounded_anchors: bool = True,
    exact_anchor_strides: bool = False,
    rpn_pre_nms_top_n_train: int = 2000,
    rpn_pre_nms_top_n_test: int = 1000,
    rpn_post_nms_top_n_train: int = 2000,
    rpn_post_nms_top_n_test: int = 1000,
    rpn_batch_size_per_image: int = 256,
    rpn_box_beta: float = 1 / 9,
    roi_align_aligned: bool = False,
    roi_align_sampling_ratio: int = 2,
    match_low_quality: bool = False,
    box_batch_size_per_image: int = 512,
    box_beta: float = 1 / 9,
    box_head_std: float | None = None,
    box_score_thresh: float = 0.05,
    box_nms_thresh: float = 0.5,
    box_detections_per_img: int = 100,
    binary_mask_targets: bool = False,
) -> Detector:
    """Mask R-CNN: :func:`build_faster_rcnn` with a mask head, of four convolutions of 256 channels and, with `norm`
    ``"group"`` or ``"batch"``, a norm after each.

    Args:
        binary_mask_targets: Whether the masks to learn are 0 or 1; see :class:`RegionHeads`. Default: ``False``.

    Shapes: targets have ``masks (N, H, W)`` too, predictions ``masks (N, 1, H, W)`` from 0 to 1.

    Source: He et al. 2017, https://arxiv.org/abs/1703.06870.
    """
    return _build(masks=True, **locals())


def _build(*, masks: bool, **given: Any) -> Detector:
    _check(given)
    norm_layer: NormLayer = resolve_norm_layer(given["norm"], given["num_groups"], given["channels_per_group"])
    head_norm = None if given["norm"] == "frozen" else norm_layer
    pretrained, sees = given["pretrained"], image_input(given["image_format"])
    body = build_resnet(given["arch"], get_args(Architecture), norm_layer)
    body.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    of_detector = pretrained if pretrained is not None and has_module(pretrained, "backbone.body") else None
    if pretrained is not None and of_detector is None:
        load_pretrained(body, pretrained, dropped=["fc"], image_input=sees)
    network = GeneralizedRCNN(
        _backbone(body, head_norm, given["frozen_stages"]),
        _proposal_network(given),
        _region_heads(given, head_norm, masks=masks),
        DetectionInput(given["min_size"], given["max_size"], given["image_format"]),
    )
    if of_detector is not None:
        load_pretrained(network, of_detector, heads=_CLASS_HEADS[: 3 if masks else 2], image_input=sees)
    return Detector(network, coco_metrics(masks=masks))


def _check(given: dict[str, Any]) -> None:
    counts = [name for name in given if name.startswith("rpn_pre_") or name.startswith("rpn_post_")]
    counts += ["rpn_batch_size_per_image", "box_batch_size_per_image", "box_detections_per_img", "anchor_scale"]
    check_at_least(2, num_classes=given["num_classes"])
    check_at_least(1, min_size=given["min_size"], **{name: given[name] for name in counts})
    check_at_least(0, roi_align_sampling_ratio=given["roi_align_sampling_ratio"])
    check_at_least(given["min_size"], max_size=given["max_size"])
    check_between(0, 4, frozen_stages=given["frozen_stages"])
    check_between(0, 1, box_score_thresh=given["box_score_thresh"], box_nms_thresh=given["box_nms_thresh"])
    check_between(0, float("inf"), rpn_box_beta=given["rpn_box_beta"], box_beta=given["box_beta"])
    if given["box_head"] not in get_args(BoxHead):
        raise ValueError(f"`box_head` (={given['box_head']!r}) must be '4conv1fc' or '2fc'.")
    if given["box_head_std"] is not None:
        check_between(0, float("inf"), box_head_std=given["box_head_std"])
        if given["box_head"] != "4conv1fc":
            raise ValueError(f"`box_head_std` (={given['box_head_std']}) is for `box_head` '4conv1fc'. Leave it out.")


def _backbone(body: ResNet, pyramid_norm: NormLayer | None, frozen_stages: int) -> BackboneWithFPN:
    """The four stages of a ResNet and the pyramid on them, whose P6 is every second place of P5."""
    trainable = 4 - frozen_stages if frozen_stages else 5  # of the four stages and the stem, from the last one on
    return _resnet_fpn_extractor(body, trainable, norm_layer=pyramid_norm)


def _proposal_network(given: dict[str, Any]) -> ProposalNetwork:
    modes = {"training": "train", "testing": "test"}
    return ProposalNetwork(
        _CHANNELS,
        LevelAnchors(
            given["anchor_scale"], rounded=given["rounded_anchors"], exact_strides=given["exact_anchor_strides"]
        ),
        batch_size_per_image=given["rpn_batch_size_per_image"],
        pre_nms_top_n={mode: given[f"rpn_pre_nms_top_n_{short}"] for mode, short in modes.items()},
        post_nms_top_n={mode: given[f"rpn_post_nms_top_n_{short}"] for mode, short in modes.items()},
        box_beta=given["rpn_box_beta"],
    )


def _region_heads(given: dict[str, Any], norm_layer: NormLayer | None, *, masks: bool) -> RegionHeads:
    pooling = (given["roi_align_sampling_ratio"], given["roi_align_aligned"])
    mask_parts: dict[str, Any] = {}
    if masks:
        mask_parts = {
            "mask_roi_pool": LevelRoIAlign(14, *pooling),
            "mask_head": MaskRCNNHeads(_CHANNELS, [_CHANNELS] * 4, 1, norm_layer=norm_layer),
            "mask_predictor": MaskPredictor(_CHANNELS, given["num_classes"]),
        }
    return RegionHeads(
        box_roi_pool=LevelRoIAlign(7, *pooling),
        box_head=_box_head(given["box_head"], norm_layer, given["box_head_std"]),
        box_predictor=BoxPredictor(_HIDDEN, given["num_classes"]),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=given["box_batch_size_per_image"],
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=given["box_score_thresh"],
        nms_thresh=given["box_nms_thresh"],
        detections_per_img=given["box_detections_per_img"],
        box_beta=given["box_beta"],
        match_low_quality=given["match_low_quality"],
        binary_mask_targets=given["binary_mask_targets"],
        **mask_parts,
    )


def _box_head(kind: str, norm_layer: NormLayer | None, std: float | None) -> nn.Module:
    """The box head, with linear layers that start as in Detectron and maskrcnn-benchmark."""
    if kind == "4conv1fc":
        head: nn.Module = FastRCNNConvFCHead((_CHANNELS, 7, 7), [_CHANNELS] * 4, [_HIDDEN], norm_layer=norm_layer)
    else:
        head = TwoMLPHead(_CHANNELS * 7 * 7, _HIDDEN)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=1)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d) and std is not None:
            nn.init.normal_(module.weight, std=std)
    return head
