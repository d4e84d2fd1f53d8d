"""The table of epochs that a run keeps beside its metrics, for readers of the logs of pytorch-classification."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from ws_algorithm.recipes.report import EVAL, LEARNING_RATE, ROUNDING, TRAIN, TRAIN_LOSS, Row, is_accuracy, read_lines
from ws_algorithm.recipes.run_folder import write_atomically

COLUMNS = ("Learning Rate", "Train Loss", "Valid Loss", "Train Acc.", "Valid Acc.")
_LOSSES = ("CrossEntropy", "Loss")


class EpochTable(LoggerDestination):
    """Writes a line per evaluated epoch: learning rate, losses and accuracies, of training and of evaluation.

    Columns are separated by tabs and have six decimals; accuracies are in percent. Training figures are means over the
    batches of the epoch, evaluation figures those of its last evaluation, the learning rate that of its last batch (of
    the last parameter group, which has what no other selects). The file is made anew from the metrics after each
    evaluation, so that it is right after a kill. Runs without a loss and an accuracy among their metrics have none.

    Args:
        path: The file; written by the first process only.
        metrics: The file of JSON lines from which it is made, written by a logger before this one in the list.

    Source: the columns are those of ``log.txt`` in https://github.com/bearpaw/pytorch-classification.
    """

    def __init__(self, path: Path, metrics: Path) -> None:
        self.path = path
        self.metrics = metrics

    def fit_start(self, state: State, logger: Logger) -> None:
        self._write()

    def eval_end(self, state: State, logger: Logger) -> None:
        self._write()

    def _write(self) -> None:
        if dist.get_global_rank() != 0:
            return
        lines = ["\t".join(f"{value:.6f}" for value in figures) for figures in epoch_figures(read_lines(self.metrics))]
        if lines:
            write_atomically(self.path, "\n".join(["\t".join(COLUMNS), *lines]) + "\n")
        else:
            self.path.unlink(missing_ok=True)


@dataclass
class _Epoch:
    """What is known of an epoch after some of its batches."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    learning_rate: float | None = None
    evaluation: tuple[float, float] | None = None

    def add(self, row: Row) -> None:
        metrics = [name.removeprefix(EVAL) for name in row if name.startswith(EVAL)]
        loss = next((name for name in metrics if name.endswith(_LOSSES)), None)
        accuracy = next((name for name in metrics if is_accuracy(name)), None)
        if loss is not None and accuracy is not None:
            self.evaluation = row[EVAL + loss], row[EVAL + accuracy]
        trained = next((name for name in row if name.startswith(TRAIN) and is_accuracy(name)), None)
        if TRAIN_LOSS in row and trained is not None:
            self.losses.append(row[TRAIN_LOSS])
            self.accuracies.append(row[trained])
        rates = [value for name, value in row.items() if name.startswith(LEARNING_RATE)]
        self.learning_rate = rates[-1] if rates else self.learning_rate

    def figures(self) -> tuple[float, ...] | None:
        """The columns, or ``None`` if one of them is not known."""
        if self.evaluation is None or not self.losses or self.learning_rate is None:
            return None
        train_loss, train_accuracy = (sum(values) / len(values) for values in (self.losses, self.accuracies))
        loss, accuracy = self.evaluation
        return self.learning_rate, train_loss, loss, 100 * train_accuracy, 100 * accuracy


def epoch_figures(lines: Iterable[Row]) -> Iterator[tuple[float, ...]]:
    """The five figures of every epoch that was evaluated, from lines in the order of their batches."""
    for _, of_epoch in groupby(lines, key=lambda row: math.ceil(row["epoch"] - ROUNDING)):
        epoch = _Epoch()
        for _, of_batch in groupby(of_epoch, key=lambda row: row["batch"]):
            merged: Row = {}
            for row in of_batch:
                merged |= row
            epoch.add(merged)
        figures = epoch.figures()
        if figures is not None:
            yield figures
