"""Blobs of Caffe2: Detectron's ``projects/GN``, and the ``.pkl`` files of the authors' fork of maskrcnn-benchmark.

https://github.com/facebookresearch/Detectron/tree/main/projects/GN
"""

from __future__ import annotations

import re

from torch import Tensor

from ws_algorithm.checkpoints.class_rows import arrange_rows
from ws_algorithm.checkpoints.sources import DETECTRON, Renamed, Rule, StateDict, rename, turn_channels_round

OPTIONS = {
    "image_format": "bgr255",
    "rounded_anchors": True,
    "exact_anchor_strides": True,
    "roi_align_aligned": False,
    "roi_align_sampling_ratio": 2,
}
_PARTS = {"w": "weight", "b": "bias", "s": "weight"}
_CONVS = {"a": "1", "b": "2", "c": "3"}
_LEVELS = {"5": "3", "4": "2", "3": "1", "2": "0"}  # of a stage, in a pyramid that starts with the finest


def from_detectron(state_dict: StateDict) -> Renamed:
    """Classifiers such as ``R-50-GN.pkl``, and detectors, which may keep the classifier that they started from."""
    return from_blobs(state_dict, formula=None)


def from_blobs(state_dict: StateDict, formula: str | None) -> Renamed:
    """A network of blobs that was trained by `formula`, or without standardization."""
    is_detector = any(name.startswith(("fpn_", "conv_rpn_")) for name in state_dict)
    body = "backbone.body." if is_detector else ""
    rules = [*_body_rules(body), *(_HEADS if is_detector else _CLASSIFIER), *_NO_WEIGHTS]
    renamed = rename(_without_momentum(state_dict), rules, formula, DETECTRON, options=OPTIONS if is_detector else {})
    arrange_rows(renamed.tensors, background_last=False)
    turn_channels_round(renamed, f"{body}conv1.weight")
    return renamed


def _without_momentum(state_dict: StateDict) -> dict[str, Tensor]:
    """All but the optimizer's blobs, each of which is named after one that is there."""
    suffix = "_momentum"
    momentum = {name for name in state_dict if name.endswith(suffix) and name.removesuffix(suffix) in state_dict}
    return {name: tensor for name, tensor in state_dict.items() if name not in momentum}


def _layer(found: re.Match[str]) -> str:
    return f"layer{int(found['stage']) - 1}.{found['block']}"


def _body_rules(body: str) -> list[Rule]:
    block = r"res(?P<stage>[2-5])_(?P<block>\d+)"

    def conv(found: re.Match[str]) -> str:
        return f"{body}{_layer(found)}.conv{_CONVS[found['conv']]}.weight"

    def norm(found: re.Match[str]) -> str:
        return f"{body}{_layer(found)}.bn{_CONVS[found['conv']]}.{_PARTS[found['part']]}"

    def downsample(found: re.Match[str]) -> str:
        return f"{body}{_layer(found)}.downsample.{'0' if found['part'] == 'w' else '1'}.{_PARTS[found['part']]}"

    return [
        (r"conv1_w", f"{body}conv1.weight"),
        (r"conv1_gn_(?P<part>[sb])", lambda found: f"{body}bn1.{_PARTS[found['part']]}"),
        (rf"{block}_branch2(?P<conv>[abc])_w", conv),
        (rf"{block}_branch2(?P<conv>[abc])_gn_(?P<part>[sb])", norm),
        (rf"{block}_branch1_(?P<part>w)", downsample),
        (rf"{block}_branch1_gn_(?P<part>[sb])", downsample),
    ]


def _with_norm(pattern: str, name: str) -> list[Rule]:
    """Rules for a convolution and the GroupNorm after it; `name` is a template with ``{}`` for the index."""

    def index(found: re.Match[str]) -> str:
        given = found["index"]
        return name.format(_LEVELS[given] if "fpn" in name else int(given) - 1)

    return [
        (f"{pattern}_w", lambda found: f"{index(found)}.0.weight"),
        (f"{pattern}_gn_(?P<part>[sb])", lambda found: f"{index(found)}.1.{_PARTS[found['part']]}"),
    ]


def _plain(blob: str, name: str) -> Rule:
    return f"{blob}_(?P<part>[wb])", lambda found: f"{name}.{_PARTS[found['part']]}"


_BOXES, _MASKS = "roi_heads.box_predictor", "roi_heads.mask_predictor"
_HEADS: list[Rule] = [
    # the last block of each stage, by its number: 2, 3, and 5 or 22 or 35
    *_with_norm(r"fpn_inner_res(?P<index>5)_2_sum", "backbone.fpn.inner_blocks.{}"),
    *_with_norm(r"fpn_inner_res(?P<index>[2-4])_\d+_sum_lateral", "backbone.fpn.inner_blocks.{}"),
    *_with_norm(r"fpn_res(?P<index>[2-5])_\d+_sum", "backbone.fpn.layer_blocks.{}"),
    *_with_norm(r"head_conv(?P<index>[1-4])", "roi_heads.box_head.{}"),
    *_with_norm(r"_(?:\[mask\]|mask)_fcn(?P<index>[1-4])", "roi_heads.mask_head.{}"),
    # anchors of 1:2, 1:1 and 2:1, each with its four numbers, in torchvision's order
    _plain("conv_rpn_fpn2", "rpn.head.conv.0.0"),
    _plain("rpn_cls_logits_fpn2", "rpn.head.cls_logits"),
    _plain("rpn_bbox_pred_fpn2", "rpn.head.bbox_pred"),
    _plain("fc6", "roi_heads.box_head.5"),
    _plain("cls_score", f"{_BOXES}.cls_score"),
    _plain("bbox_pred", f"{_BOXES}.bbox_pred"),
    _plain("conv5_mask", f"{_MASKS}.conv5_mask"),
    _plain("mask_fcn_logits", f"{_MASKS}.mask_fcn_logits"),
    (r"(?:pred|fc1000)_[wb]", None),  # Detectron keeps blobs of the weights that it started from
]
_CLASSIFIER: list[Rule] = [_plain("(?:pred|fc1000)", "fc")]
_NO_WEIGHTS: list[Rule] = [(r"lr", None)]
