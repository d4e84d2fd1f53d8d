"""The metrics that a run wrote down, and tables of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

Row = dict[str, float]

EVAL = "metrics/eval/"
TRAIN = "metrics/train/"
TRAIN_LOSS = "loss/train/total"
LEARNING_RATE = "lr-"
ROUNDING = 1e-6  # of epochs, which are written with six digits


def read_metrics(path: Path) -> list[Row]:
    """The rows of a file of JSON lines, one per batch; a batch that was written twice has its later values.

    Without a file, as for a run that never began, there are none. A last line without an end is one that a run is
    writing, or was writing when it was killed; it does not count.

    Raises:
        ValueError: If a line is not one that a run writes.
    """
    rows: dict[int, Row] = {}
    for row in read_lines(path):
        batch = int(row["batch"])
        rows[batch] = rows.get(batch, {}) | row
    return [rows[batch] for batch in sorted(rows)]


def read_lines(path: Path) -> Iterator[Row]:
    """The lines of such a file as they stand, one after the other. Raises as :func:`read_metrics` does."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is no JSON: {line.strip()[:60]!r}.") from error
            if not isinstance(row, dict) or not {"epoch", "batch"} <= row.keys():
                raise ValueError(f"{path}: line {number} is none of a run, it has no epoch and batch.")
            yield row


def summary_table(rows: list[Row], higher_is_better: dict[str, bool | None]) -> list[tuple[str, str, str, str]]:
    """Training loss over the last epoch, and evaluation metrics: name, last value, best value, epoch of the best.

    Args:
        rows: What :func:`read_metrics` returns.
        higher_is_better: By metric; for ``None`` or a metric that is not there lower is better, as for a loss.
    """
    table = []
    losses = [row[TRAIN_LOSS] for row in rows if TRAIN_LOSS in row and row["epoch"] > rows[-1]["epoch"] - 1 + ROUNDING]
    if losses:
        table.append(("train loss", f"{sum(losses) / len(losses):.4f}", "", ""))
    for name in names_of(rows, EVAL):
        series = [(row["epoch"], row[name]) for row in rows if name in row]
        pick = max if higher_is_better.get(label_of(name)) else min
        best_epoch, best = pick(series, key=lambda point: point[1])
        table.append((label_of(name), f"{series[-1][1]:.4f}", f"{best:.4f}", f"{best_epoch:.4g}"))
    return table


def names_of(rows: list[Row], prefix: str) -> list[str]:
    """The names in rows that begin with `prefix`, in the order in which they appear."""
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith(prefix)))


def label_of(name: str) -> str:
    """What a reader calls a name in a row."""
    return "train loss" if name == TRAIN_LOSS else name.removeprefix(EVAL)


def is_accuracy(metric: str) -> bool:
    """Whether a metric is a share of what is right, to judge by its name; one minus it is an error."""
    return metric.endswith("Accuracy")


def images_per_second(rows: list[Row]) -> float | None:
    """Training throughput over the whole run, evaluation not counted."""
    return rows[-1]["sample"] / rows[-1]["seconds"] if rows and rows[-1]["seconds"] else None


def add_published(
    header: tuple[str, ...], table: list[tuple[str, ...]], published: Mapping[str, float]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A table with a last column for the figures that were published, if there are any; rows begin with a metric."""
    if not published:
        return header, table
    rows = [(*row, f"{published[row[0]]:.4f}" if row[0] in published else "") for row in table]
    return (*header, "published"), rows


def format_table(header: tuple[str, ...], rows: list[tuple[str, ...]], right: Collection[int] | None = None) -> str:
    """Columns aligned to the left, or to the right if named in `right`; by default all but the first are."""
    right = range(1, len(header)) if right is None else right
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
