"""Keep the weights of the best evaluation so far."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import dist
from composer.utils.checkpoint import save_checkpoint


class BestCheckpoint(Callback):
    """After each evaluation during training, save the weights if the monitored metric is better than ever before.

    Whether higher or lower is better is what the metric itself says (``torchmetrics.Metric.higher_is_better``).

    Args:
        path: The checkpoint, without optimizer state; replaced atomically.
        monitor: Name of an evaluation metric of the model.
    """

    def __init__(self, path: Path, monitor: str) -> None:
        self.path = path
        self.monitor = monitor
        self.best: float | None = None

    def eval_end(self, state: State, logger: Logger) -> None:
        if state.max_duration is None or not self._is_better(state):
            return
        self.best = float(state.eval_metric_values[self.monitor])
        partial = self.path.with_name(f"{self.path.stem}.partial{self.path.suffix}")
        # With the state of algorithms: EMA and SWA evaluate weights that they keep there
        save_checkpoint(state, str(partial), ignore_keys=["state/optimizers*"])
        if dist.get_global_rank() == 0:
            os.replace(partial, self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The best value so far, if its weights are in this run's folder: a run may start from another's checkpoint."""
        self.best = state["best"] if self.path.exists() else None

    def _is_better(self, state: State) -> bool:
        value = float(state.eval_metric_values[self.monitor])
        if self.best is None or math.isnan(self.best):
            return True
        metric = next(metrics[self.monitor] for metrics in state.eval_metrics.values() if self.monitor in metrics)
        return value > self.best if metric.higher_is_better else value < self.best


def default_monitor(model: ComposerModel) -> str | None:
    """The evaluation metric that a model names as ``default_monitor``, or the last one that can be monitored."""
    named: str | None = getattr(model, "default_monitor", None)
    known = monitorable(model.get_metrics(is_train=False))
    return named or (known[-1] if known else None)


def monitorable(metrics: dict[str, Any]) -> list[str]:
    """The metrics that say whether higher or lower is better."""
    return [name for name, metric in metrics.items() if metric.higher_is_better is not None]
