"""The accuracy of each class, for models that say how it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from composer import Trainer
from composer.core import DataSpec
from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric

_NAME = "per class"  # among the metrics of an evaluation; no metric of a model has it


def per_class_metric(model: ComposerModel) -> Metric:
    """What ``model.per_class_metric()`` returns: a new metric that computes accuracies ``(num_classes,)``.

    Raises:
        ValueError: If the model has no such method.
    """
    make: Any = getattr(model, "per_class_metric", None)
    if make is None:
        raise ValueError("this model does not say how to measure each class: it has no method `per_class_metric`.")
    return make()


def measure_per_class(trainer: Trainer, metric: Metric) -> None:
    """Let evaluations of a Trainer update `metric` too.

    It is one of the Trainer's own metrics then, which sees each image once: also where evaluation goes by
    micro-batches, and where a sampler repeats images so that all processes have as many.
    """
    for metrics in trainer.state.eval_metrics.values():
        metrics[_NAME] = metric


def take_per_class(trainer: Trainer) -> tuple[Tensor, Tensor | None]:
    """The result of an evaluation, taken out of the Trainer's other metric values; to be called by all processes.

    Returns:
        Accuracies ``(num_classes,)``, and how many images each class has, or ``None`` if the metric does not count true
        positives and false negatives as ``tp`` and ``fn``.
    """
    accuracies: Any = trainer.state.eval_metric_values.pop(_NAME)
    metric: Any = next(metrics.pop(_NAME) for metrics in trainer.state.eval_metrics.values() if _NAME in metrics)
    if not (hasattr(metric, "tp") and hasattr(metric, "fn")):
        return accuracies, None
    with metric.sync_context():
        return accuracies, metric.tp + metric.fn


def class_names(data: DataSpec | None, count: int) -> list[str]:
    """The names of `count` classes: ``dataset.classes`` where there are as many, else their indices."""
    names = getattr(getattr(getattr(data, "dataloader", None), "dataset", None), "classes", None)
    return [str(name) for name in names] if names and len(names) == count else [str(index) for index in range(count)]


def per_class_table(
    names: Sequence[str], accuracies: Tensor, images: Tensor | None
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: class, images, accuracy; without accuracy where a class has no image."""
    if images is None:
        return ("class", "accuracy"), [(n, f"{float(a):.4f}") for n, a in zip(names, accuracies, strict=True)]
    rows = [
        (name, str(int(count)), f"{float(accuracy):.4f}" if count else "-")
        for name, count, accuracy in zip(names, images, accuracies, strict=True)
    ]
    return ("class", "images", "accuracy"), rows
