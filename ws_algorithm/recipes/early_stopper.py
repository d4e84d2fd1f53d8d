"""Early stopping that survives a resumption."""

from __future__ import annotations

from typing import Any

import torch
from composer.callbacks import EarlyStopper as ComposersEarlyStopper
from composer.core import State, Timestamp
from composer.loggers import Logger


class EarlyStopper(ComposersEarlyStopper):
    """Composer's ``EarlyStopper``, with what it has seen so far in the checkpoint.

    Composer's own begins anew when a run resumes, so that a killed run would train longer than one that was not, and a
    run that had stopped early would go on.

    Args:
        monitor: Name of the metric.
        dataloader_label: ``"eval"`` or ``"train"``.
        comp: ``"greater"`` or ``"less"``; ``None``: by the name of the metric. Default: ``None``.
        min_delta: The least change that counts. Default: ``0.0``.
        patience: How long to wait for a better value, such as ``"3ep"``. Default: ``1``.
    """

    def __init__(
        self,
        monitor: str,
        dataloader_label: str,
        comp: str | None = None,
        min_delta: float = 0.0,
        patience: int | str = 1,
    ) -> None:
        super().__init__(monitor, dataloader_label, comp, min_delta, patience)
        self._stopped = False

    def _update_stopper_state(self, state: State) -> None:
        before = state.max_duration
        super()._update_stopper_state(state)
        self._stopped = self._stopped or state.max_duration is not before

    def fit_start(self, state: State, logger: Logger) -> None:
        if self._stopped:
            state.stop_training()

    def state_dict(self) -> dict[str, Any]:
        occurred = self.best_occurred.state_dict() if self.best_occurred is not None else None
        best = float(self.best) if self.best is not None else None
        return {"best": best, "best_occurred": occurred, "stopped": self._stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stopped = state["stopped"]
        if state["best_occurred"] is not None:
            self.best = torch.tensor(state["best"])
            self.best_occurred = Timestamp()
            self.best_occurred.load_state_dict(state["best_occurred"])
