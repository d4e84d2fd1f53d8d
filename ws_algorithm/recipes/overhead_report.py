"""What was measured, as JSON, as Markdown and as bars."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import version

from ws_algorithm import __version__
from ws_algorithm.recipes.contest import Case
from ws_algorithm.recipes.overhead import Record
from ws_algorithm.recipes.rivals import RIVALS

_DISTRIBUTIONS = {"torchvision": "torchvision", "composer": "mosaicml", "timm": "timm", "mmcv": "mmcv"}

_COLUMNS = (
    *("contestant", "what it is", "ms per step (quartiles)", "ratio to none (quartiles)"),
    *("saved for backward", "held in a step", "peak on the device"),
)

_MIB = 2**20


def describe_machine(device: str, threads: Sequence[int], allocator: str) -> dict[str, Any]:
    """Device, versions, threads and date, for the head of a report; ``None`` for what is not installed."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "ws_algorithm": __version__,
        "torch": torch.__version__,
        **{library: _version(distribution) for library, distribution in _DISTRIBUTIONS.items()},
        "cuda": version.cuda if device == "cuda" else None,
        "threads": " and ".join(map(str, threads)),
        "allocator": allocator,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def machine_line(machine: dict[str, Any]) -> str:
    """What :func:`describe_machine` returns, in one line."""
    return ", ".join(f"{name}: {value}" for name, value in machine.items() if value is not None)


def to_json(machine: dict[str, Any], records: Sequence[Record]) -> str:
    """An object with ``machine`` and ``records``; seconds and bytes as they were measured."""
    return json.dumps({"machine": machine, "records": [asdict(record) for record in records]}, indent=2) + "\n"


def to_markdown(machine: dict[str, Any], records: Sequence[Record]) -> str:
    """A section per case with a row per contestant."""
    lines = [machine_line(machine)]
    for case, group in by_case(records).items():
        lines += ["", f"## {case.title}", "", f"Median and quartiles of {len(group[0].times)} steps.", ""]
        lines += [_row(_COLUMNS), _row(["---", "---", *["---:"] * (len(_COLUMNS) - 2)])]
        lines += [_row(_cells(record)) for record in group]
    return "\n".join(lines) + "\n"


def by_case(records: Sequence[Record]) -> dict[Case, list[Record]]:
    """The records of each case, in their order."""
    groups: dict[Case, list[Record]] = {}
    for record in records:
        groups.setdefault(record.case, []).append(record)
    return groups


def draw_ratios(records: Sequence[Record], path: Path, title: str) -> None:
    """Draw the ratio to no standardization, with quartiles as whiskers, into a PNG; one panel per case.

    Args:
        records: At least one.
        path: The PNG.
        title: Stands above the panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = by_case(records)
    columns = min(len(groups), 3)
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="small", wrap=True)
    for position, (case, group) in enumerate(groups.items()):
        _draw_case(figure.add_subplot(rows, columns, position + 1), case, group)
    figure.savefig(path, dpi=120)


def _draw_case(axes: Any, case: Case, group: list[Record]) -> None:
    names = [record.contestant for record in group]
    medians = [record.ratio.median for record in group]
    whiskers = [
        [record.ratio.median - record.ratio.lower for record in group],
        [record.ratio.upper - record.ratio.median for record in group],
    ]
    ours = ("exact", "once", "folded")
    axes.bar(names, medians, yerr=whiskers, capsize=3, color=["C0" if name in ours else "0.6" for name in names])
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    for place, record in enumerate(group):
        axes.text(place, record.ratio.upper, f"{record.ratio.median:.2f}", ha="center", va="bottom", fontsize="small")
    axes.margins(y=0.12)
    axes.set_title(case.title, fontsize="small", wrap=True)
    axes.set_ylabel("time / time without WS")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(record: Record) -> list[str]:
    seconds, ratio = record.seconds, record.ratio
    return [
        record.contestant,
        RIVALS[record.contestant].about,
        f"{seconds.median * 1e3:.2f} ({seconds.lower * 1e3:.2f}-{seconds.upper * 1e3:.2f})",
        f"{ratio.median:.3f} ({ratio.lower:.3f}-{ratio.upper:.3f})",
        *map(_mebibytes, (record.bytes_saved, record.bytes_held, record.peak_bytes)),
    ]


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / _MIB:.1f} MiB"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
