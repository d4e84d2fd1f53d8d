"""A network as a ``ComposerModel`` that detects objects: its losses and its metrics."""

from __future__ import annotations

from typing import Any

from composer.models import ComposerModel
from torch import Tensor, nn
from torchmetrics import Metric

Targets = list[dict[str, Tensor]]
Batch = tuple[list[Tensor], Targets]


class Detector(ComposerModel):
    """Losses in training, detections in evaluation.

    A batch is ``(images, targets)``: images ``(3, H, W)`` of any size, and for each a target with ``boxes (N, 4)``,
    ``labels (N,)`` and, for masks, ``masks (N, H, W)``; none of them need have an object.

    Args:
        network: One of torchvision's detectors: ``network(images, targets)`` gives losses by name in training,
            ``network(images)`` a prediction for each image in evaluation.
        metrics: Metrics of evaluation by name, updated with predictions and targets.
    """

    def __init__(self, network: nn.Module, metrics: dict[str, Metric]) -> None:
        super().__init__()
        self.module = network
        self._metrics = metrics

    def forward(self, batch: Batch) -> Any:
        images, targets = batch
        return self.module(list(images), list(targets)) if self.training else self.module(list(images))

    def loss(self, outputs: dict[str, Tensor], batch: Batch, *args: Any, **kwargs: Any) -> Any:
        """The losses of the network, and their sum as ``"total"``."""
        return {**outputs, "total": sum(outputs.values(), start=next(iter(outputs.values())).new_zeros(()))}

    def eval_forward(self, batch: Batch, outputs: Any = None) -> Targets:
        """Detections, also where `outputs` of training are at hand: those are losses."""
        return self.forward(batch)

    def predict(self, images: list[Tensor], *, score_threshold: float = 0.5) -> Targets:
        """The objects in each image, the best first.

        Args:
            images: ``(3, H, W)``, as the data give them.
            score_threshold: The least score of an object. Default: ``0.5``.

        Returns:
            For each image ``boxes (N, 4)`` as corners in pixels, ``labels (N,)``, ``scores (N,)`` and, for masks,
            ``masks (N, H, W)`` of bools.
        """
        objects = []
        for found in self.eval_forward((images, [])):
            order = found["scores"].argsort(descending=True, stable=True)
            kept = {key: value[order[found["scores"][order] >= score_threshold]] for key, value in found.items()}
            objects.append(kept | ({"masks": kept["masks"][:, 0] >= 0.5} if "masks" in kept else {}))
        return objects

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        """The metrics of evaluation; none in training, where nothing is detected."""
        return {} if is_train else self._metrics

    def update_metric(self, batch: Batch, outputs: Targets, metric: Metric) -> None:
        _, targets = batch
        metric.update(outputs, list(targets))
