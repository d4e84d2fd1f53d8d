"""A network as a ``ComposerModel`` that classifies: its loss and its metrics."""

from __future__ import annotations

import torch
from composer.metrics import CrossEntropy
from composer.models import ComposerClassifier
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy


class ImageClassifier(ComposerClassifier):
    """Cross-entropy loss, and the metrics ``CrossEntropy``, ``MulticlassAccuracy`` and ``Top5Accuracy``.

    Accuracies are shares of all images, from 0 to 1. ``Top5Accuracy``, whether the label is among the five highest
    outputs, is there with more than five classes. ``CrossEntropy`` is Composer's, the mean over batches of their
    means. In training there is ``MulticlassAccuracy`` alone. The best checkpoint of a run is that of the highest
    ``MulticlassAccuracy``, unless the recipe says otherwise.

    Args:
        network: Maps images ``(N, C, H, W)`` to outputs ``(N, num_classes)``.
        num_classes: Number of classes.
    """

    default_monitor = "MulticlassAccuracy"

    def __init__(self, network: nn.Module, num_classes: int) -> None:
        metrics: dict[str, Metric | MetricCollection] = {
            "CrossEntropy": CrossEntropy(),
            "MulticlassAccuracy": MulticlassAccuracy(num_classes, average="micro"),
        }
        if num_classes > 5:
            metrics["Top5Accuracy"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        # Groups would let metrics share a state that was equal after the first batch
        collection = MetricCollection(metrics, compute_groups=False)
        super().__init__(network, num_classes=num_classes, val_metrics=collection)

    def predict(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """How probable each class is for each image, by softmax.

        Args:
            images: ``(C, H, W)``, as the data give them, of one size.

        Returns:
            For each image ``probabilities (num_classes,)``.
        """
        outputs = self.eval_forward((torch.stack(images), None))
        return [{"probabilities": row} for row in outputs.float().softmax(1)]

    def per_class_metric(self) -> Metric:
        """A new metric whose ``compute()`` gives the accuracy of each class.

        Returns:
            A metric to update with outputs ``(N, num_classes)`` and labels ``(N,)``. It computes ``(num_classes,)``: of
            the images with a label, the share that has the highest output there. A class without images has 0.
        """
        assert self.num_classes is not None
        return MulticlassAccuracy(self.num_classes, average=None)
