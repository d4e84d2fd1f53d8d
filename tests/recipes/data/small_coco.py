"""A data set of a few images in COCO's layout, written into ``data`` of the current folder, to be broken at will.

Six training images, of which 10, 20 and 30 are wide (8 by 12 pixels) and 40, 50 and 60 tall (12 by 8): 30 has no
annotation, 50 a crowd alone. Categories are 2, 5 and 90.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from composer.core import DataSpec
from PIL import Image
from pycocotools import mask as coco_mask

from ws_algorithm.recipes.data.coco import build_coco_dataspec

WIDE, TALL = (8, 12), (12, 8)
SIZES = {10: WIDE, 20: WIDE, 30: WIDE, 40: TALL, 50: TALL, 60: TALL}
WITH_OBJECTS = {10, 20, 40, 60}
ANNOTATIONS = Path("data/annotations/instances_train2017.json")


def rectangle(x: float, y: float, width: float, height: float) -> list[float]:
    """A polygon."""
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def annotation(number: int, image: int, category: int, box: list[float], **others: Any) -> dict[str, Any]:
    entry = {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]}
    return entry | {"segmentation": [rectangle(*box)], "iscrowd": 0} | others


def content() -> dict[str, Any]:
    crowd = {"size": [*TALL], "counts": [12, 24, 60]}  # columns 1 and 2
    return {
        "images": [
            {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
            for number, (height, width) in SIZES.items()
        ],
        "annotations": [
            annotation(1, 10, 5, [2, 1, 4, 3]),
            annotation(2, 10, 90, [6, 2, 5, 6], area=17.5),
            annotation(3, 20, 2, [0, 0, 12, 8]),
            annotation(4, 40, 2, [1, 1, 2, 9]),
            annotation(5, 40, 5, [1, 0, 2, 12], iscrowd=1, segmentation=crowd),
            annotation(6, 50, 5, [1, 0, 2, 12], iscrowd=1, segmentation=crowd),
            annotation(7, 60, 90, [3, 4, 2, 2]),
        ],
        "categories": [{"id": 90, "name": "cow"}, {"id": 2, "name": "ant"}, {"id": 5, "name": "bee"}],
    }


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Compressed, as JSON has them."""
    runs: dict[str, Any] = coco_mask.encode(np.asfortranarray(mask))  # pyright: ignore[reportAssignmentType]
    return {"size": [*mask.shape], "counts": runs["counts"].decode()}


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*SIZES[number], 3)).astype(np.uint8)


def write(changed: dict[str, Any] | None = None, **splits: dict[str, Any]) -> None:
    """Write images and annotations of the training split, and of others by name."""
    for split, entries in {"train": changed or content(), **splits}.items():
        folder = Path(f"data/{split}2017")
        folder.mkdir(parents=True)
        for number in SIZES:
            Image.fromarray(pixels(number)).save(folder / f"{number}.png")
        ANNOTATIONS.parent.mkdir(exist_ok=True)
        (ANNOTATIONS.parent / f"instances_{split}2017.json").write_text(json.dumps(entries))


def build(split: str = "train", *, batch_size: int = 1, training: bool = False, **options: Any) -> DataSpec:
    options = {"root": "data", "flip": 0.0} | options
    return build_coco_dataspec(split, batch_size=batch_size, training=training, **options)


def samples(spec: DataSpec, epoch: int = 0) -> dict[int, tuple[Any, dict[str, Any]]]:
    """Images and targets by image id, in the order of the epoch."""
    return {target["image_id"]: (image, target) for batch in batches(spec, epoch) for image, target in batch}


def batches(spec: DataSpec, epoch: int = 0) -> list[list[tuple[Any, dict[str, Any]]]]:
    spec.dataloader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # as the Trainer does
    return [list(zip(*batch, strict=True)) for batch in spec.dataloader]
