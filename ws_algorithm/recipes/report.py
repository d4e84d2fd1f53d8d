"""Tables and curves from the metrics that a run wrote down."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

Row = dict[str, float]

_EVAL = "metrics/eval/"
_LOSS = "loss/train/total"
_ROUNDING = 1e-6  # of epochs, which are written with six digits


def read_metrics(path: Path) -> list[Row]:
    """The rows of a file of JSON lines, one per batch; a batch that was written twice has its later values.

    Without a file, as for a run that never began, there are none.
    """
    if not path.exists():
        return []
    rows: dict[int, Row] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["batch"]] = rows.get(row["batch"], {}) | row
    return [rows[batch] for batch in sorted(rows)]


def summary_table(rows: list[Row], higher_is_better: dict[str, bool | None]) -> list[tuple[str, str, str, str]]:
    """Training loss over the last epoch, and evaluation metrics: name, last value, best value, epoch of the best.

    Args:
        rows: What :func:`read_metrics` returns.
        higher_is_better: By metric; for ``None`` or a metric that is not there lower is better, as for a loss.
    """
    table = []
    losses = [row[_LOSS] for row in rows if _LOSS in row and row["epoch"] > rows[-1]["epoch"] - 1 + _ROUNDING]
    if losses:
        table.append(("train loss", f"{sum(losses) / len(losses):.4f}", "", ""))
    for name in _names(rows, _EVAL):
        series = [(row["epoch"], row[name]) for row in rows if name in row]
        pick = max if higher_is_better.get(_label(name)) else min
        best_epoch, best = pick(series, key=lambda point: point[1])
        table.append((_label(name), f"{series[-1][1]:.4f}", f"{best:.4f}", f"{best_epoch:.4g}"))
    return table


def images_per_second(rows: list[Row]) -> float | None:
    """Training throughput over the whole run, evaluation not counted."""
    return rows[-1]["sample"] / rows[-1]["seconds"] if rows and rows[-1]["seconds"] else None


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


def draw_curves(rows: list[Row], path: Path, title: str) -> None:
    """Draw training loss, evaluation metrics and learning rate over epochs into a PNG.

    Args:
        rows: What :func:`read_metrics` returns.
        path: The PNG.
        title: Stands above the curves.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(_label(name), [name]) for prefix in (_LOSS, _EVAL) for name in _names(rows, prefix)]
    panels += [("learning rate", names) for names in [_names(rows, "lr-")] if names]
    figure = Figure(figsize=(4.2 * max(len(panels), 1), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for position, (label, names) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), position + 1)
        for name in names:
            _draw_series(axes, [(row["epoch"], row[name]) for row in rows if name in row], name)
        axes.set(xlabel="epoch", title=label)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _draw_series(axes: Any, series: list[tuple[float, float]], name: str) -> None:
    epochs, values = [point[0] for point in series], [point[1] for point in series]
    if name == _LOSS and len(values) > 50:
        axes.plot(epochs, values, color="C0", alpha=0.25, linewidth=0.8)
        axes.plot(epochs, _running_mean(values, len(values) // 50), color="C0")
    else:
        axes.plot(epochs, values, marker="o" if len(values) < 40 else None, markersize=3, label=name)


def _running_mean(values: list[float], window: int) -> list[float]:
    """Mean over the last `window` values at each place."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def _label(name: str) -> str:
    return "train loss" if name == _LOSS else name.removeprefix(_EVAL)


def _names(rows: list[Row], prefix: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith(prefix)))
