"""A data set of painted rectangles in COCO's layout, a detector that finds them by their colour, and a run of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from ws_algorithm.recipes import registry
from ws_algorithm.recipes.coco_metrics import coco_metrics
from ws_algorithm.recipes.detector import Detector
from ws_algorithm.recipes.train import train

IDS = [30, 4, 11, 9, 31]  # with gaps, and not in their order
CATEGORIES = {3: "three", 7: "seven", 12: "twelve"}  # labels are 1, 2 and 3
HEIGHT, WIDTH = 48, 64
SCORES = (0.9, 0.6, 0.7)
Box = tuple[int, int, int, int]  # left, top, width, height
# Labels by image: label 3 is found as label 2, label 2 two pixels to the right
OBJECTS: dict[int, dict[int, Box]] = {
    30: {1: (4, 4, 20, 12), 2: (30, 20, 20, 20)},
    4: {1: (8, 8, 12, 30)},
    11: {},
    9: {2: (10, 10, 36, 34), 3: (50, 2, 8, 8)},
    31: {1: (2, 2, 30, 30), 2: (40, 8, 12, 10), 3: (40, 30, 10, 10)},
}


class FindsColours(nn.Module):
    """Gray 60, 120 and 180 are the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        return {"loss": self.weight**2} if self.training else [self._found(image) for image in images]

    def _found(self, image: Tensor) -> dict[str, Tensor]:
        found = []
        for label, score in zip((1, 2, 3), SCORES, strict=True):
            mask = (255 * image[0]).round() == 60 * label
            if label == 2:
                mask = mask.roll(2, dims=1)
            if mask.any():
                ys, xs = mask.nonzero().T
                box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                found.append((box, 2 if label == 3 else label, score, mask.float()[None]))
        boxes, labels, scores, masks = zip(*found, strict=True) if found else ((), (), (), ())
        return {
            "boxes": torch.tensor(boxes).reshape(-1, 4).float(),
            "labels": torch.tensor(labels).long(),
            "scores": torch.tensor(scores),
            "masks": torch.stack(masks) if masks else torch.zeros(0, 1, *image.shape[1:]),
        }


def build_painted(num_classes: int = 4) -> Detector:
    return Detector(FindsColours(), coco_metrics(masks=True))


def paint(objects: dict[int, Box]) -> Image.Image:
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    for label, (left, top, width, height) in objects.items():
        pixels[top : top + height, left : left + width] = 60 * label
    return Image.fromarray(pixels)


def write_painted(root: Path) -> None:
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    annotations = []
    for image, objects in OBJECTS.items():
        paint(objects).save(root / "val2017" / f"{image}.png")
        for label, (left, top, width, height) in objects.items():
            right, bottom = left + width, top + height
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": list(CATEGORIES)[label - 1],
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                }
            )
    content = {
        "info": {},
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH, "file_name": f"{i}.png"} for i in IDS],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
    }
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))


def run_painted(folder: Path) -> Path:
    """A run of one step in a new folder, with its data beside it; `register` was called."""
    write_painted(folder / "data")
    data = {"name": "coco", "split": "val", "root": str(folder / "data")}
    recipe = {
        "model": {"name": "painted"},
        "train_dataloader": data,
        "eval_dataloader": data,
        "max_duration": "1ba",
        "global_train_batch_size": 2,
        "optimizers": {"name": "SGD", "lr": 0.1},
        "save_folder": str(folder / "run"),
    }
    (folder / "painted.yaml").write_text(yaml.safe_dump(recipe))
    train(str(folder / "painted.yaml"))
    return folder / "run"


def register() -> None:
    registry.MODELS["painted"] = build_painted
