"""What a run writes down while it trains: a line of JSON per batch and evaluation, a line of text per epoch."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import IO, Any

from composer.core import State, TimeUnit
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

log = logging.getLogger(__name__)


class RunLog(LoggerDestination):
    """Appends metrics to a file of JSON lines and says one line per epoch through ``logging``.

    Each JSON line has ``epoch`` (fractional), ``batch``, ``sample`` and ``seconds`` (training time without evaluation)
    beside the metrics of that batch. When a run resumes, lines from after its checkpoint are removed first: those
    batches come again.

    Args:
        path: The file; written by the first process only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None
        self._batches_per_epoch = 0
        self._pending: dict[str, float] = {}
        self._latest: dict[str, float] = {}
        self._losses: list[float] = []
        self._has_trained = False  # until then, as after resuming at the end of an epoch, training metrics are empty

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        left_out = ("time/",) if self._has_trained else ("time/", "metrics/train/")
        self._pending |= {name: float(value) for name, value in metrics.items() if not name.startswith(left_out)}

    def fit_start(self, state: State, logger: Logger) -> None:
        self._batches_per_epoch = int(state.dataloader_len or 0)  # later, during evaluation, it is that of other data
        if dist.get_global_rank() == 0:
            remove_lines_after(self.path, int(state.timestamp.batch))
            self._file = self.path.open("a", encoding="utf-8")

    def batch_start(self, state: State, logger: Logger) -> None:
        self._has_trained = True

    def batch_end(self, state: State, logger: Logger) -> None:
        if "loss/train/total" in self._pending:
            self._losses.append(self._pending["loss/train/total"])
        self._write(state)

    def eval_end(self, state: State, logger: Logger) -> None:
        self._write(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._write(state)
        self._say(state)

    def close(self, state: State, logger: Logger) -> None:
        if self._losses:  # training ended inside an epoch
            self._say(state)
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, state: State) -> None:
        self._latest |= self._pending
        if self._file is not None and self._pending:
            self._file.write(json.dumps(self._position(state) | self._pending) + "\n")
            self._file.flush()
        self._pending = {}

    def _say(self, state: State) -> None:
        position = self._position(state)
        duration = state.max_duration
        total = f"/{duration.value}" if duration is not None and duration.unit == TimeUnit.EPOCH else ""
        words = [f"train loss {sum(self._losses) / len(self._losses):.4f}"] if self._losses else []
        words += [f"{k.rpartition('/')[2]} {v:.4f}" for k, v in self._latest.items() if k.startswith("metrics/eval/")]
        if position["seconds"]:
            words.append(f"{position['sample'] / position['seconds']:.0f} images/s")
        log.info("epoch %g%s, batch %d: %s", round(position["epoch"], 2), total, position["batch"], ", ".join(words))
        self._losses, self._latest = [], {}  # an epoch without an evaluation has no figures of one

    def _position(self, state: State) -> dict[str, Any]:
        timestamp = state.timestamp
        fraction = int(timestamp.batch_in_epoch) / self._batches_per_epoch if self._batches_per_epoch else 0.0
        return {
            "epoch": round(int(timestamp.epoch) + fraction, 6),
            "batch": int(timestamp.batch),
            "sample": int(timestamp.sample),
            "seconds": round(timestamp.total_wct.total_seconds(), 3),
        }


def remove_lines_after(path: Path, batch: int) -> None:
    """Remove the lines of later batches than `batch`, and a last line that a kill cut off."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if _is_until(line, batch)]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def _is_until(line: str, batch: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["batch"] <= batch
    except json.JSONDecodeError:
        return False
