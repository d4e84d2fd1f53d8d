"""A COCO annotation file with crowds, detections on it, and what pycocotools says of them.

As a program, ``small_coco_evaluation.py FOLDER RANK CASES...``: one of two processes that share the images of the file
in FOLDER. A case is the digits of the images that this process has; the figures of each are written to ``RANK.json``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, distributed

from ws_algorithm.recipes.coco_metrics import coco_metrics

SIZE = 240
CATEGORIES = [3, 7, 12]  # with gaps; labels are 1, 2 and 3
FIGURES = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5}  # places in the output of pycocotools

Item = dict[str, Tensor]


def three_quarters(left: float, top: float, width: float, height: float) -> np.ndarray:
    """The mask of a box without its lower right quarter."""
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[int(top) : int(top + height), int(left) : int(left + width)] = 1
    mask[int(top + height / 2) : int(top + height), int(left + width / 2) : int(left + width)] = 0
    return mask


def annotation(index: int, image: int, category: int, box: list[float], crowd: bool = False) -> dict[str, Any]:
    left, top, width, height = box
    middle, right, half, bottom = left + width / 2, left + width, top + height / 2, top + height
    corners = [left, top, right, top, right, half, middle, half, middle, bottom, left, bottom]
    run_lengths: Any = rle.encode(np.asfortranarray(three_quarters(*box)))
    run_lengths["counts"] = run_lengths["counts"].decode()
    return {
        "id": index,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": width * height * 0.75,
        "iscrowd": int(crowd),
        "segmentation": run_lengths if crowd else [corners],
    }


def write_annotations(path: Path, images: int = 5) -> None:
    """Objects of all sizes, six in an image, crowds in two; the last image has none."""
    generator = np.random.default_rng(0)
    annotations = []
    for image in range(1, images):
        for _ in range(6):
            width, height = (2 * generator.integers(4, 100, 2)).tolist()
            left, top = generator.integers(0, SIZE - width), generator.integers(0, SIZE - height)
            category = CATEGORIES[int(generator.integers(0, 3))]
            box = [float(left), float(top), float(width), float(height)]
            annotations.append(annotation(len(annotations) + 1, image, category, box, crowd=len(annotations) in (1, 6)))
    ids = range(1, images + 1)
    content = {
        "info": {},
        "images": [{"id": image, "height": SIZE, "width": SIZE, "file_name": f"{image}.jpg"} for image in ids],
        "annotations": annotations,
        "categories": [{"id": category, "name": str(category)} for category in CATEGORIES],
    }
    path.write_text(json.dumps(content))


def targets_of(coco: COCO) -> list[Item]:
    """What a data set gives for each image, in the order of their ids."""
    targets = []
    for image in sorted(coco.getImgIds()):
        own = coco.loadAnns(coco.getAnnIds(image))
        boxes = torch.tensor([entry["bbox"] for entry in own], dtype=torch.float32).reshape(-1, 4)
        masks = [torch.from_numpy(coco.annToMask(entry)) for entry in own]
        targets.append(
            {
                "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
                "labels": torch.tensor([CATEGORIES.index(entry["category_id"]) + 1 for entry in own]).long(),
                "masks": torch.stack(masks) if masks else torch.zeros(0, SIZE, SIZE, dtype=torch.uint8),
                "area": torch.tensor([entry["area"] for entry in own]),
                "iscrowd": torch.tensor([entry["iscrowd"] for entry in own]).long(),
            }
        )
    return targets


def detections_for(targets: list[Item]) -> list[Item]:
    """Each object twice, shifted a little, some as another class, and objects that are nowhere; scores have ties."""
    generator = torch.Generator().manual_seed(1)
    detections = []
    for target in targets:
        count = 2 * len(target["boxes"]) + 3
        boxes = torch.cat([target["boxes"].repeat(2, 1), torch.tensor([[5.0, 5.0, 50.0, 60.0]]).repeat(3, 1)])
        boxes = (boxes + torch.randint(-4, 5, (count, 4), generator=generator)).clamp(0, SIZE)
        boxes[:, 2:] = boxes[:, 2:].maximum(boxes[:, :2] + 2).clamp(max=SIZE)
        labels = torch.cat([target["labels"].repeat(2), torch.tensor([1, 2, 3])])
        wrong = torch.rand(count, generator=generator) < 0.1
        xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
        solid = torch.stack([torch.from_numpy(three_quarters(*box)) for box in xywh.tolist()])[:, None].float()
        detections.append(
            {
                "boxes": boxes,
                "labels": torch.where(wrong, labels % 3 + 1, labels),
                "scores": torch.randint(1, 10, (count,), generator=generator) / 10,
                "masks": 0.4 * torch.rand(count, 1, SIZE, SIZE, generator=generator) + 0.55 * solid,
            }
        )
    return detections


def as_results(detections: list[Item]) -> list[dict[str, Any]]:
    """Detections as entries of COCO's result file, for images 1, 2 and so on."""
    results = []
    for image, own in enumerate(detections, 1):
        for box, label, score, mask in zip(own["boxes"], own["labels"], own["scores"], own["masks"], strict=True):
            left, top, right, bottom = box.tolist()
            results.append(
                {
                    "image_id": image,
                    "category_id": CATEGORIES[int(label) - 1],
                    "bbox": [left, top, right - left, bottom - top],
                    "score": float(score),
                    "segmentation": rle.encode(np.asfortranarray((mask[0] >= 0.5).numpy().astype(np.uint8))),
                }
            )
    return results


def official_figures(coco: COCO, detections: list[Item]) -> dict[str, float]:
    """What COCO's own program says, by the names of the metrics."""
    found = {}
    for kind, iou_type in (("Box", "bbox"), ("Mask", "segm")):
        results = as_results(detections)
        if kind == "Mask":  # else the area of a detection is that of its box
            results = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
        evaluation = COCOeval(coco, coco.loadRes(results), iou_type)  # pyright: ignore[reportArgumentType]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        found |= {f"{kind}{figure}": float(evaluation.stats[place]) for figure, place in FIGURES.items()}
    return found


def figures(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: metric.compute().item() for name, metric in metrics.items()}


def main(folder: str, rank: str, *cases: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=2)
    targets = targets_of(COCO(f"{folder}/annotations.json"))
    detections = detections_for(targets)
    metrics, found = coco_metrics(masks=True), []
    for images in cases:
        for metric in metrics.values():
            metric.reset()
            for image in map(int, images):
                metric.update([detections[image]], [targets[image]])
        found.append(figures(metrics))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
