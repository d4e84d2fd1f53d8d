"""COCO's average precision of boxes and masks, as metrics of one number each; its table, and its file of results."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torchmetrics import Metric
from torchmetrics.detection.mean_ap import MeanAveragePrecision

Detections = list[dict[str, Tensor]]

_KINDS = {"Box": "bbox", "Mask": "segm"}
# The plain average precision comes last: a run that names no metric to monitor takes the last
_FIGURES = {
    "AP50": "map_50",
    "AP75": "map_75",
    "APs": "map_small",
    "APm": "map_medium",
    "APl": "map_large",
    "AP": "map",
}
_SUMMARY = {
    **{name: _FIGURES[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")},
    **{"AR1": "mar_1", "AR10": "mar_10", "AR100": "mar_100"},
    **{"ARs": "mar_small", "ARm": "mar_medium", "ARl": "mar_large"},
}
_ABSENT = object()


def coco_metrics(*, masks: bool) -> dict[str, Metric]:
    """COCO's average precision: ``BoxAP50``, ``BoxAP75``, ``BoxAPs``, ``BoxAPm``, ``BoxAPl`` and ``BoxAP``.

    With `masks` also ``MaskAP50`` to ``MaskAP``.

    All are from 0 to 1, or -1 where there is no object to find: ``APs`` is of objects below 32 x 32 pixels, ``APm`` of
    those below 96 x 96, ``APl`` of the others. COCO's program runs once for all of them, on all processes' images.

    Update each with predictions and targets. A prediction has ``boxes (N, 4)`` as corners, ``scores``, ``labels`` and,
    for masks, ``masks (N, 1, H, W)`` or ``(N, H, W)``, in which 0.5 and more is the object; the 100 best of an image
    count. A target has no ``scores``, and may say ``iscrowd`` and ``area``, from 0 on, which else is the area of the
    mask or box.

    Raises:
        ValueError: If pycocotools is not installed.

    Source: https://cocodataset.org/#detection-eval.
    """
    if not _is_installed("pycocotools"):
        raise ValueError('COCO metrics need pycocotools: pip install "ws-algorithm[detection]"')
    with torch.device("cpu"):  # recipes are checked on the meta device, where tensors hold no thresholds
        evaluation = CocoEvaluation(masks=masks)
    return {
        f"{kind}{figure}": AveragePrecision(evaluation, f"{iou_type}_{key}" if masks else key)
        for kind, iou_type in _KINDS.items()
        if masks or kind == "Box"
        for figure, key in _FIGURES.items()
    }


class AveragePrecision(Metric):
    """One figure of an evaluation that several metrics share. Reset and update all of them alike.

    Whichever is updated first with a batch hands it on, and whichever is reset first empties the evaluation.

    Args:
        evaluation: What is shared.
        key: Which of its figures this is.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    def __init__(self, evaluation: CocoEvaluation, key: str) -> None:
        super().__init__(sync_on_compute=False)
        self.evaluation, self.key = evaluation, key
        self._round, self._batches = evaluation.round, 0

    def update(self, predictions: Detections, targets: Detections) -> None:
        self._batches += 1
        if self._batches > self.evaluation.batches:
            self.evaluation.update(predictions, targets)

    def compute(self) -> Tensor:
        return self.evaluation.compute()[self.key].squeeze()

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("What is shared has no figures of a single batch: call `update` and `compute`.")

    def reset(self) -> None:
        super().reset()
        if self._round == self.evaluation.round:
            self.evaluation.reset()
        self._round, self._batches = self.evaluation.round, 0


class CocoEvaluation(MeanAveragePrecision):
    """torchmetrics' evaluation by pycocotools, with COCO's own thresholds and any number of images on each process.

    torchmetrics rounds the thresholds to float32, and 0.1 is then not the recall of one object in ten. It also waits
    for ever where one process has more images than another, as the last batch of a data set may, and takes an area of 0
    for one that is not stated.

    It offers what ``ws-algorithm evaluate`` asks the ``evaluation`` of a metric for: a table, and a file of results.
    """

    results_name = "detections.json"

    def __init__(self, *, masks: bool) -> None:
        super().__init__(
            box_format="xyxy",
            iou_type=("bbox", "segm") if masks else "bbox",
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            backend="pycocotools",
        )
        self.warn_on_many_detections = False
        self.batches = self.round = 0
        self.image_ids: list[Tensor]
        self.add_state("image_ids", default=[], dist_reduce_fx=None)
        self._category_ids: list[int] | None = None
        self._path: Path | None = None

    def table(self, published: Mapping[str, float]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The twelve figures of COCO's summary, of boxes and masks side by side, and those that were published.

        To be called by all processes, after the evaluation.

        Args:
            published: Figures by the names of the metrics.

        Returns:
            Header and rows: average precision and average recall, as shares. ``AR1`` is with the best detection of
            each image alone, ``AR10`` with the ten best.
        """
        values = self.compute()
        kinds = {kind: iou_type for kind, iou_type in _KINDS.items() if iou_type in self.iou_type}
        prefixes = {kind: f"{iou_type}_" if len(kinds) > 1 else "" for kind, iou_type in kinds.items()}
        known = [kind for kind in kinds if any(f"{kind}{name}" in published for name in _SUMMARY)]
        header = ("", *(kind.lower() for kind in kinds), *(f"published {kind.lower()}" for kind in known))
        rows = []
        for name, key in _SUMMARY.items():
            measured = [f"{float(values[prefix + key]):.4f}" for prefix in prefixes.values()]
            figures = [published.get(f"{kind}{name}") for kind in known]
            rows.append((name, *measured, *("" if figure is None else f"{figure:.4f}" for figure in figures)))
        return header, rows

    def begin_results(self, path: Path, dataset: Any) -> None:
        """Keep in mind which image is which from the next reset on, for :meth:`write_results`.

        Args:
            path: The file to write then.
            dataset: Has ``category_ids``, by label from 1 on; its targets have ``image_id``.

        Raises:
            ValueError: If the data set has no category ids.
        """
        ids = getattr(dataset, "category_ids", None)
        if ids is None:
            raise ValueError("the data have no `category_ids`, by which COCO's results name classes.")
        self._path, self._category_ids = path, [int(number) for number in ids]

    def write_results(self) -> str:
        """Write what was detected in COCO's format of results; to be called by all processes, after the evaluation.

        A list with, for each detection, ``image_id``, ``category_id``, ``bbox`` as left, top, width and height in
        pixels, ``score`` and, with masks, ``segmentation`` as compressed run lengths. Images are in the order of the
        data set. Detections of a label for which the data have no category are left out; they count in no figure.

        Returns:
            What the file has, in words.
        """
        assert self._path is not None and self._category_ids is not None, "`begin_results` was called"
        with self.sync_context():
            images, results = len(self.image_ids), self._results(self._category_ids)
            found = sum(len(scores) for scores in self.detection_scores)
        if not (distributed.is_initialized() and distributed.get_rank() > 0):
            partial = self._path.with_name(f"{self._path.name}.partial")
            partial.write_text(json.dumps(results, separators=(",", ":")), encoding="utf-8")
            os.replace(partial, self._path)
        left_out = f", {found - len(results)} of unknown classes left out" if found > len(results) else ""
        return f"{len(results)} detections in {images} images{left_out}"

    def _results(self, category_ids: list[int]) -> list[dict[str, Any]]:
        assert len(self.image_ids) == len(self.detection_scores)
        results = []
        for position, image_id in enumerate(self.image_ids):
            boxes, scores = self.detection_box[position].tolist(), self.detection_scores[position].tolist()
            masks: Any = self.detection_mask[position] if "segm" in self.iou_type else ()
            for number, label in enumerate(self.detection_labels[position].tolist()):
                if not 1 <= label <= len(category_ids):
                    continue
                result = {"image_id": int(image_id), "category_id": category_ids[label - 1]}
                result |= {"bbox": boxes[number], "score": scores[number]}
                if masks:
                    size, counts = masks[number]
                    result["segmentation"] = {"size": list(size), "counts": counts.decode()}
                results.append(result)
        return results

    def update(self, preds: Detections, target: Detections) -> None:
        keys = ["boxes", "labels", *(["masks"] if "segm" in self.iou_type else [])]
        preds = [_on_cpu(item, [*keys, "scores"]) for item in preds]
        given, target = target, [_on_cpu(item, [*keys, *({"iscrowd", "area"} & item.keys())]) for item in target]
        if self._path is not None:
            self.image_ids.extend(torch.tensor(int(item["image_id"])) for item in given)
        super().update(preds, target)
        self.batches += 1

    def reset(self) -> None:
        super().reset()
        self.batches = 0
        self.round += 1

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        own = {name: getattr(self, name) for name in self._defaults}
        everyones: list[Any] = [None] * distributed.get_world_size(process_group)
        distributed.all_gather_object(everyones, own, process_group)
        for name in own:
            # In turns, as samplers deal images out: so equal scores come in the order of the data set
            turns = zip_longest(*(theirs[name] for theirs in everyones), fillvalue=_ABSENT)
            setattr(self, name, [item for item in chain.from_iterable(turns) if item is not _ABSENT])


def _on_cpu(item: dict[str, Tensor], keys: list[str]) -> dict[str, Tensor]:
    """Boxes without further rounding, masks as COCO encodes them."""
    result = {key: item[key].detach() for key in keys}
    result["boxes"] = result["boxes"].double()
    if "scores" in result:
        result["scores"] = result["scores"].float()
    if "masks" in result:
        masks = result["masks"]
        result["masks"] = ((masks[:, 0] if masks.ndim == 4 else masks) >= 0.5).to(torch.uint8)
    if "area" in result:  # COCO only compares areas, with 0, 32 x 32 and more: the least number counts as 0 does
        areas = result["area"].cpu().double()
        result["area"] = torch.where(areas == 0, torch.finfo(torch.float64).tiny, areas)
    return {key: tensor.cpu() for key, tensor in result.items()}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module that was made unimportable
        return False
