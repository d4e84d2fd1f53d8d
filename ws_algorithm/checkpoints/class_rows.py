"""The last layers of a detector: rows for every class, those of the background first."""

from __future__ import annotations

from torch import Tensor, cat, zeros_like

_CLASSES = "roi_heads.box_predictor.cls_score"
_ROWS = {"roi_heads.box_predictor.bbox_pred": 4, "roi_heads.mask_predictor.mask_fcn_logits": 1}


def arrange_rows(tensors: dict[str, Tensor], *, background_last: bool) -> None:
    """Give scores, boxes and masks the rows that torchvision's detectors have; tensors are named as theirs.

    - Scores of a background that comes last move to the front.
    - Boxes and masks without a background get zeros for it, which nothing reads.
    - Boxes and masks that are one for all classes are repeated for each.

    Tensors of other shapes stay as they are.
    """
    classes = tensors.get(f"{_CLASSES}.weight")
    if classes is None or classes.ndim == 0:
        return
    for part in ("weight", "bias"):
        scores = tensors.get(f"{_CLASSES}.{part}")
        if scores is not None and background_last:
            tensors[f"{_CLASSES}.{part}"] = scores.roll(1, 0)
        for layer, rows in _ROWS.items():
            tensor = tensors.get(f"{layer}.{part}")
            if tensor is not None and tensor.ndim > 0:
                tensors[f"{layer}.{part}"] = _for_each_class(tensor, rows, len(classes), background_last)


def _for_each_class(tensor: Tensor, rows: int, num_classes: int, background_last: bool) -> Tensor:
    """Rows of boxes or masks, `rows` for each class; `num_classes` counts the background."""
    others = [1] * (tensor.ndim - 1)
    if len(tensor) == rows * num_classes:
        return tensor
    if len(tensor) == rows:
        return tensor.repeat(num_classes, *others)
    if len(tensor) == rows * (num_classes - 1) and background_last:
        return cat([zeros_like(tensor[:rows]), tensor])
    if len(tensor) == 2 * rows and not background_last:  # the background, and all else
        return cat([tensor[:rows], tensor[rows:].repeat(num_classes - 1, *others)])
    return tensor
