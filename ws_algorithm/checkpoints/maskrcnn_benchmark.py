"""Faster and Mask R-CNN of the authors' fork of maskrcnn-benchmark, and the ImageNet weights that it starts from.

https://github.com/joe-siyuan-qiao/maskrcnn-benchmark
"""

from __future__ import annotations

import re

from ws_algorithm.checkpoints.class_rows import arrange_rows
from ws_algorithm.checkpoints.detectron import OPTIONS, from_blobs
from ws_algorithm.checkpoints.sources import (
    DETECTRON,
    Renamed,
    Rule,
    StateDict,
    body_rules,
    rename,
    turn_channels_round,
    without_prefix,
)

_STEM = "backbone.body.conv1.weight"


def from_maskrcnn_benchmark(state_dict: StateDict) -> Renamed:
    """A detector, or the blobs of ``R-50-GN-WS.pkl`` and the like."""
    if "conv1_w" in state_dict:
        return from_blobs(state_dict, formula="paper")
    named = without_prefix(state_dict, "module.")
    renamed = rename(named, _RULES, "paper", DETECTRON, options=OPTIONS)
    arrange_rows(renamed.tensors, background_last=False)
    turn_channels_round(renamed, _STEM)
    return renamed


def _with_norm(pattern: str, name: str, step: int = 0) -> list[Rule]:
    """Rules for a convolution and the norm after it: in a pair, or every `step` places in one sequence."""

    def place(found: re.Match[str]) -> str:
        index = int(found["index"])
        return f"{name}.{index // step}.{index % step}" if step else f"{name}.{index - 1}.{found['place']}"

    if step:
        return [(rf"{pattern}\.(?P<index>\d+)\.(weight|bias)", lambda found: f"{place(found)}.{found[2]}")]
    return [(rf"{pattern}(?P<index>[1-4])\.(?P<place>[01])\.(weight|bias)", lambda found: f"{place(found)}.{found[3]}")]


_BOXES, _MASKS = r"roi_heads\.box", r"roi_heads\.mask"
_RULES: list[Rule] = [
    *body_rules("backbone.body.stem.", "backbone.body."),
    *body_rules("backbone.body.", "backbone.body."),
    *_with_norm(r"backbone\.fpn\.fpn_inner", "backbone.fpn.inner_blocks"),
    *_with_norm(r"backbone\.fpn\.fpn_layer", "backbone.fpn.layer_blocks"),
    (r"rpn\.head\.conv\.(weight|bias)", r"rpn.head.conv.0.0.\1"),
    (r"(rpn\.head\.(?:cls_logits|bbox_pred)\.(?:weight|bias))", r"\1"),
    *_with_norm(rf"{_BOXES}\.feature_extractor\.xconvs", "roi_heads.box_head", step=3),
    (rf"{_BOXES}\.feature_extractor\.fc6\.(weight|bias)", r"roi_heads.box_head.5.\1"),
    (rf"{_BOXES}\.predictor\.((?:cls_score|bbox_pred)\.(?:weight|bias))", r"roi_heads.box_predictor.\1"),
    *_with_norm(rf"{_MASKS}\.feature_extractor\.mask_fcn", "roi_heads.mask_head"),
    (rf"{_MASKS}\.predictor\.((?:conv5_mask|mask_fcn_logits)\.(?:weight|bias))", r"roi_heads.mask_predictor.\1"),
    (r"rpn\.anchor_generator\.cell_anchors\.\d+", None),  # constants
]
