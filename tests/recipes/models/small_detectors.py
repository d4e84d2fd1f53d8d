"""Detectors that a CPU can run, and small images with objects to detect."""

from typing import Any

import torch
from torch import Tensor

from ws_algorithm.recipes.detector import Batch, Detector
from ws_algorithm.recipes.models.rcnn import build_faster_rcnn, build_mask_rcnn

BUILDERS = {"faster_rcnn": build_faster_rcnn, "mask_rcnn": build_mask_rcnn}
CLASSES = 4  # with the background

SMALL: dict[str, Any] = {
    "arch": "resnet50",
    "num_classes": CLASSES,
    "min_size": 64,
    "max_size": 96,
    "anchor_scale": 4,
    "rpn_post_nms_top_n_train": 8,
    "rpn_post_nms_top_n_test": 8,
    "box_batch_size_per_image": 12,
}


def detector(name: str = "mask_rcnn", **arguments: Any) -> Detector:
    return BUILDERS[name](**(SMALL | arguments))


def network(model: Detector) -> Any:
    """The network in a detector, of whose parts type checkers know nothing."""
    return model.module


def image_and_target(boxes: list[list[float]], height: int = 64, width: int = 96) -> tuple[Tensor, dict[str, Tensor]]:
    """A random image, with a box and its full mask for each of `boxes`, labelled 1, 2, 3, 1 and so on."""
    corners = torch.tensor(boxes).reshape(-1, 4)
    masks = torch.zeros(len(corners), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, corners.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    labels = torch.arange(len(corners)) % (CLASSES - 1) + 1
    return torch.rand(3, height, width), {"boxes": corners, "labels": labels, "masks": masks}


def batch_of(*boxes: list[list[float]], **size: int) -> Batch:
    pairs = [image_and_target(own, **size) for own in boxes]
    return [image for image, _ in pairs], [target for _, target in pairs]


def in_double(batch: Batch) -> Batch:
    images, targets = batch
    kept = ("labels", "masks")
    return [image.double() for image in images], [
        {key: value if key in kept else value.double() for key, value in target.items()} for target in targets
    ]
