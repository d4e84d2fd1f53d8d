"""Curves of one run, or of several over each other, as a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ws_algorithm.recipes.report import EVAL, LEARNING_RATE, TRAIN_LOSS, Row, is_accuracy, label_of, names_of

_MOST_BATCHES = 50  # that are drawn one by one; more are smoothed
_MOST_COLUMNS = 4  # of panels side by side
_OF_ONE, _OF_SEVERAL = 0.02, 0.05  # the share of a run over which its training loss is smoothed


@dataclass(frozen=True)
class _Curve:
    """Values over epochs.

    Args:
        points: Epoch and value.
        colour: Of matplotlib.
        name: For the legend; ``""`` for none.
        smoothed: The share of the points over which many of them are smoothed; 0 for none.
        faint: Whether the values themselves are drawn beneath the smoothed ones.
    """

    points: list[tuple[float, float]]
    colour: Any
    name: str = ""
    smoothed: float = 0.0
    faint: bool = False


_Panels = dict[str, list[_Curve]]


def draw_curves(rows: list[Row], path: Path, title: str) -> None:
    """Draw training loss, evaluation metrics and learning rate over epochs into a PNG.

    Args:
        rows: What :func:`~ws_algorithm.recipes.report.read_metrics` returns.
        path: The PNG.
        title: Stands above the curves.
    """
    panels: _Panels = {}
    for prefix in (TRAIN_LOSS, EVAL):
        for name in names_of(rows, prefix):
            smoothed = _OF_ONE if name == TRAIN_LOSS else 0.0
            panels[label_of(name)] = [_Curve(_series(rows, name), "C0", smoothed=smoothed, faint=True)]
    rates = names_of(rows, LEARNING_RATE)
    if rates:
        panels["learning rate"] = [
            _Curve(_series(rows, name), f"C{position}", name if len(rates) > 1 else "")
            for position, name in enumerate(rates)
        ]
    figure = _figure(panels)
    figure.suptitle(title)
    for axes in figure.axes:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def draw_runs(runs: Mapping[str, list[Row]], path: Path) -> None:
    """Draw several runs over each other into a PNG, each in a colour of its own.

    Panels are the training loss, smoothed, each evaluation metric, of accuracies the error, and the learning rate.

    Args:
        runs: What :func:`~ws_algorithm.recipes.report.read_metrics` returns, by the name for the legend.
        path: The PNG.
    """
    from matplotlib.lines import Line2D

    colours = dict(zip(runs, _colours(len(runs)), strict=True))
    panels: _Panels = {}
    names = dict.fromkeys(n for prefix in (TRAIN_LOSS, EVAL) for rows in runs.values() for n in names_of(rows, prefix))
    for name in names:
        error = name.startswith(EVAL) and is_accuracy(name)
        panels[f"error (1 - {label_of(name)})" if error else label_of(name)] = [
            _Curve(points, colours[run], smoothed=_OF_SEVERAL if name == TRAIN_LOSS else 0.0)
            for run, rows in runs.items()
            if (points := _series(rows, name, error))
        ]
    rates = [(run, rows, name) for run, rows in runs.items() for name in names_of(rows, LEARNING_RATE)]
    if rates:
        panels["learning rate"] = [_Curve(_series(rows, name), colours[run]) for run, rows, name in rates]
    figure = _figure(panels, height=3.8, same_epochs=True)
    handles = [Line2D([], [], color=colour, label=run) for run, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(runs), 4))
    figure.savefig(path, dpi=120, format="png")


def _figure(panels: _Panels, height: float = 3.4, *, same_epochs: bool = False) -> Any:
    """A figure of rows of panels, over the `same_epochs` or each over those that it has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(1, min(len(panels), _MOST_COLUMNS))
    lines = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(4.2 * columns, height * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for position, (label, curves) in enumerate(panels.items()):
        first = figure.axes[0] if same_epochs and figure.axes else None
        axes = figure.add_subplot(lines, columns, position + 1, sharex=first)
        for curve in curves:
            _draw(axes, curve)
        axes.set(xlabel="epoch", title=label)
        axes.grid(alpha=0.3)
    return figure


def _draw(axes: Any, curve: _Curve) -> None:
    epochs, values = [point[0] for point in curve.points], [point[1] for point in curve.points]
    if curve.smoothed and len(values) > _MOST_BATCHES:
        if curve.faint:
            axes.plot(epochs, values, color=curve.colour, alpha=0.25, linewidth=0.8)
        axes.plot(epochs, _running_mean(values, int(len(values) * curve.smoothed)), color=curve.colour)
    else:
        marker = "o" if len(values) < 40 else None
        axes.plot(epochs, values, color=curve.colour, marker=marker, markersize=3, label=curve.name or None)


def _series(rows: list[Row], name: str, error: bool = False) -> list[tuple[float, float]]:
    return [(row["epoch"], 1 - row[name] if error else row[name]) for row in rows if name in row]


def _running_mean(values: list[float], window: int) -> list[float]:
    """Mean over the last `window` values at each place."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


def _colours(count: int) -> Sequence[Any]:
    """As many colours that can be told apart."""
    if count <= 10:
        return [f"C{position}" for position in range(count)]
    from matplotlib import colormaps

    return [colormaps["turbo"](position / (count - 1)) for position in range(count)]
