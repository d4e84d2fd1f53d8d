"""COCO annotations to what a detector is told of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

Target = dict[str, Any]


def object_targets(
    annotations: Sequence[Mapping[str, Any]],
    image_id: int,
    size: tuple[int, int],
    label_of: Mapping[int, int],
    *,
    masks: bool,
) -> Target:
    """The objects of an image.

    Args:
        annotations: Well-formed, as COCO has them; ``iscrowd``, where it is, is a number.
        image_id: Of the image.
        size: Its height and width.
        label_of: Labels by category id.
        masks: Whether masks are drawn.

    Returns:
        ``boxes`` ``(N, 4)`` from left and top to right and bottom, in pixels; ``labels`` ``(N,)``; ``masks``
        ``(N, H, W)`` of 0 and 1, if asked for; ``image_id``; ``area`` ``(N,)`` as the file states it, or of the box
        where it does not; ``iscrowd`` ``(N,)`` of 0 and 1.
    """
    boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float64).reshape(-1, 4)
    stated = [annotation.get("area") for annotation in annotations]
    areas = [side if side is not None else box[2] * box[3] for side, box in zip(stated, boxes.tolist(), strict=True)]
    boxes[:, 2:] += boxes[:, :2]
    target: Target = {
        "boxes": tv_tensors.BoundingBoxes(boxes.float(), format="XYXY", canvas_size=size),  # pyright: ignore
        "labels": torch.tensor([label_of[annotation["category_id"]] for annotation in annotations], dtype=torch.int64),
        "image_id": image_id,
        "area": torch.tensor(areas, dtype=torch.float32),
        "iscrowd": torch.tensor([int(annotation.get("iscrowd", 0)) for annotation in annotations], dtype=torch.int64),
    }
    if masks:
        drawn = [draw_mask(annotation["segmentation"], size) for annotation in annotations]
        target["masks"] = tv_tensors.Mask(torch.stack(drawn) if drawn else torch.zeros(0, *size, dtype=torch.uint8))
    return target


def draw_mask(segmentation: Any, size: tuple[int, int]) -> Tensor:
    """Pixels of an object, 0 or 1, ``(H, W)``.

    Args:
        segmentation: A list of polygons, or run lengths, compressed or not.
        size: Height and width of the image.
    """
    from pycocotools import mask as coco_mask

    height, width = size
    runs = segmentation
    if isinstance(segmentation, list):
        runs = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        runs = coco_mask.frPyObjects(segmentation, height, width)
    return torch.from_numpy(np.ascontiguousarray(coco_mask.decode(runs)))
