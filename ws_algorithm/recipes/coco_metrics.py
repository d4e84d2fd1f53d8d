"""COCO's average precision of boxes and masks, as metrics of one number each."""

from __future__ import annotations

import importlib.util
from itertools import chain, zip_longest
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
_ABSENT = object()


def coco_metrics(*, masks: bool) -> dict[str, Metric]:
    """COCO's average precision: ``BoxAP50``, ``BoxAP75``, ``BoxAPs``, ``BoxAPm``, ``BoxAPl`` and ``BoxAP``.

    With `masks` also ``MaskAP50`` to ``MaskAP``.

    All are from 0 to 1, or -1 where there is no object to find: ``APs`` is of objects below 32 x 32 pixels, ``APm`` of
    those below 96 x 96, ``APl`` of the others. COCO's program runs once for all of them, on all processes' images.

    Update each with predictions and targets. A prediction has ``boxes (N, 4)`` as corners, ``scores``, ``labels`` and,
    for masks, ``masks (N, 1, H, W)`` or ``(N, H, W)``, in which 0.5 and more is the object; the 100 best of an image
    count. A target has no ``scores``, and may say ``iscrowd`` and ``area``, which else is the area of the mask or box.

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
    for ever where one process has more images than another, as the last batch of a data set may.
    """

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

    def update(self, preds: Detections, target: Detections) -> None:
        keys = ["boxes", "labels", *(["masks"] if "segm" in self.iou_type else [])]
        preds = [_on_cpu(item, [*keys, "scores"]) for item in preds]
        target = [_on_cpu(item, [*keys, *({"iscrowd", "area"} & item.keys())]) for item in target]
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
    return {key: tensor.cpu() for key, tensor in result.items()}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a module that was made unimportable
        return False
