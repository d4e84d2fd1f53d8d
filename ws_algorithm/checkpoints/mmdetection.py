"""Faster and Mask R-CNN of mmdetection's ``configs/gn+ws``, of version 1 and of versions 2 and 3.

https://github.com/open-mmlab/mmdetection/tree/main/configs/gn%2Bws
"""

from __future__ import annotations

from ws_algorithm.checkpoints.class_rows import arrange_rows
from ws_algorithm.checkpoints.sources import IMAGENET, Renamed, Rule, StateDict, body_rules, rename, without_prefix

_OPTIONS = {"image_format": "rgb", "rounded_anchors": False, "exact_anchor_strides": True}
_ALIGNED = {"roi_align_aligned": True, "roi_align_sampling_ratio": 0}
_ALIGNED_V1 = {"roi_align_aligned": False, "roi_align_sampling_ratio": 2}

_BOXES, _MASKS = "roi_heads.box_predictor", "roi_heads.mask_predictor"


def from_mmdetection(state_dict: StateDict) -> Renamed:
    """The background is the last class of versions 2 and 3, the first of version 1; see :func:`arrange_rows`."""
    named = without_prefix(state_dict, "module.")
    background_last = any(name.startswith("roi_head.") for name in named)
    prefix = "roi_head." if background_last else ""
    options = {**_OPTIONS, **(_ALIGNED if background_last else _ALIGNED_V1)}
    renamed = rename(named, _rules(prefix), "paper", IMAGENET, options=options)
    arrange_rows(renamed.tensors, background_last=background_last)
    return renamed


def _rules(prefix: str) -> list[Rule]:
    both, norm = r"(weight|bias)", r"\.(?:gn|bn)\.(weight|bias)"
    box, mask = rf"{prefix}bbox_head\.", rf"{prefix}mask_head\."
    return [
        *body_rules("backbone.", "backbone.body."),
        (r"neck\.lateral_convs\.(\d)\.conv\.weight", r"backbone.fpn.inner_blocks.\1.0.weight"),
        (rf"neck\.lateral_convs\.(\d){norm}", r"backbone.fpn.inner_blocks.\1.1.\2"),
        (r"neck\.fpn_convs\.(\d)\.conv\.weight", r"backbone.fpn.layer_blocks.\1.0.weight"),
        (rf"neck\.fpn_convs\.(\d){norm}", r"backbone.fpn.layer_blocks.\1.1.\2"),
        (rf"rpn_head\.rpn_conv\.{both}", r"rpn.head.conv.0.0.\1"),
        (rf"rpn_head\.rpn_cls\.{both}", r"rpn.head.cls_logits.\1"),
        (rf"rpn_head\.rpn_reg\.{both}", r"rpn.head.bbox_pred.\1"),
        (rf"{box}shared_convs\.(\d)\.conv\.weight", r"roi_heads.box_head.\1.0.weight"),
        (rf"{box}shared_convs\.(\d){norm}", r"roi_heads.box_head.\1.1.\2"),
        (rf"{box}shared_fcs\.0\.{both}", r"roi_heads.box_head.5.\1"),
        (rf"{box}fc_cls\.{both}", rf"{_BOXES}.cls_score.\1"),
        (rf"{box}fc_reg\.{both}", rf"{_BOXES}.bbox_pred.\1"),
        (rf"{mask}convs\.(\d)\.conv\.weight", r"roi_heads.mask_head.\1.0.weight"),
        (rf"{mask}convs\.(\d){norm}", r"roi_heads.mask_head.\1.1.\2"),
        (rf"{mask}upsample\.{both}", rf"{_MASKS}.conv5_mask.\1"),
        (rf"{mask}conv_logits\.{both}", rf"{_MASKS}.mask_fcn_logits.\1"),
        (r"data_preprocessor\..*", None),
    ]
