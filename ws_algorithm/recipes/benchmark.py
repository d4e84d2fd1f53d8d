"""Benchmark: options in; the cost of Weight Standardization, beside that of others, out as a table, JSON and a PNG."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from ws_algorithm.recipes.contest import Case, check_choices
from ws_algorithm.recipes.overhead import FEWEST_REPEATS, Record, keep_freed_memory, measure
from ws_algorithm.recipes.overhead_report import (
    describe_machine,
    draw_ratios,
    machine_line,
    to_json,
    to_markdown,
)
from ws_algorithm.recipes.rivals import RIVALS, reason_against

# Options that are lists, each with the field of a case that takes one of its values, and what it is by default
LISTS: dict[str, tuple[str, str]] = {
    "models": ("model", "resnet50"),
    "norm": ("norm", "group"),
    "image_sizes": ("image_size", "64,224"),
    "micro_batch_sizes": ("micro_batch_size", "1"),
    "micro_batches": ("micro_batches", "8"),
    "precisions": ("precision", "fp32,amp_bf16"),
    "modes": ("mode", "train,eval"),
    "threads": ("threads", "1"),
    "regions": ("regions", "512"),
}

_WHOLE_NUMBERS = ("image_sizes", "micro_batch_sizes", "micro_batches", "threads", "regions")

PRESETS: dict[str, dict[str, list[dict[str, object]]]] = {
    "targets": {
        "cpu": [
            {"image_size": 64, "micro_batches": 8},
            {"image_size": 224, "micro_batches": 4},
            {"image_size": 64, "micro_batches": 8, "precision": "amp_bf16", "threads": 2},
            {"image_size": 64, "micro_batches": 1, "mode": "eval"},
            {"image_size": 224, "micro_batches": 1, "mode": "eval"},
        ],
        "cuda": [
            {"image_size": 224, "micro_batches": 16, "precision": "amp_bf16"},
            {"image_size": 224, "micro_batches": 16, "precision": "amp_bf16", "micro_batch_size": 2},
            {"image_size": 224, "micro_batches": 1, "precision": "amp_bf16", "mode": "eval"},
        ],
    },
}


def plan(
    lists: Mapping[str, str | None], device: str = "cpu", preset: str | None = None, channels_last: bool = False
) -> list[Case]:
    """The cases that options ask for: each combination of the values of all lists, or those of a preset.

    An evaluation runs one batch, whatever `micro_batches` says.

    Args:
        lists: Values with commas between them, by the names in :data:`LISTS`; ``None`` for the default.
        device: ``"cpu"`` or ``"cuda"``.
        preset: A key of :data:`PRESETS`; takes the place of all lists.
        channels_last: Whether images and weights have that memory format.

    Raises:
        ValueError: If a value is none that can be, or there are lists beside a preset.
    """
    check_choices("device", [device], ("cpu", "cuda"))
    if preset is not None:
        check_choices("preset", [preset], PRESETS)
        given = [name for name, text in lists.items() if text is not None]
        if given:
            raise ValueError(f"`preset` (={preset!r}) says what is measured; leave {', '.join(given)} out.")
        return [_case(values, device, channels_last) for values in PRESETS[preset][device]]
    axes = [_values(name, lists.get(name) or default) for name, (_, default) in LISTS.items()]
    fields = [field for field, _ in LISTS.values()]
    combinations = [dict(zip(fields, values, strict=True)) for values in product(*axes)]
    for values in combinations:
        if values["mode"] == "eval":
            values["micro_batches"] = 1
    return list(dict.fromkeys(_case(values, device, channels_last) for values in combinations))


def contestants_of(text: str | None) -> list[str]:
    """Those that an option names, ``none`` first; all if there is no option.

    Raises:
        ValueError: If one of them is unknown.
    """
    names = list(RIVALS) if text is None else text.split(",")
    check_choices("contestants", names, RIVALS)
    return list(dict.fromkeys(["none", *names]))


def prepare_output(output: str) -> None:
    """Make the folder for the files before anything is measured.

    Raises:
        ValueError: If it cannot be made or written to.
    """
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`output` (={output!r}) cannot be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"`output` (={output!r}) is not a folder that can be written to.")


def benchmark(
    cases: Sequence[Case],
    contestants: Sequence[str],
    *,
    repeats: int = FEWEST_REPEATS,
    allocator: str = "default",
    output: str | None = None,
) -> list[Record]:
    """Measure, print a Markdown table, and write ``overhead.json``, ``overhead.md`` and ``overhead.png``.

    Contestants that cannot take part are left out with a line that says why; progress goes to standard error.

    Args:
        cases: What to measure, all on one device; the files are written anew after each.
        contestants: Keys of ``RIVALS``.
        repeats: Steps of each contestant that count; at least 9.
        allocator: ``"default"`` for the C library as it is, which users have; ``"keep"`` for
            :func:`~ws_algorithm.recipes.overhead.keep_freed_memory`.
        output: The folder for the files; ``None`` writes none.

    Raises:
        ValueError: If `repeats` or `allocator` is not of the kind described, or `output` cannot be written to.
    """
    check_choices("allocator", [allocator], ("default", "keep"))
    if output is not None:
        prepare_output(output)
    kept = allocator == "keep" and keep_freed_memory()
    threads = sorted({case.threads for case in cases})
    machine = describe_machine(cases[0].device, threads, "glibc that keeps freed memory" if kept else "default")
    print(machine_line(machine), flush=True)
    records: list[Record] = []
    told: set[str] = set()
    for case in cases:
        names = _able(contestants, case, told)
        new = measure(case, names, repeats, progress=lambda line: print(line, file=sys.stderr, flush=True))
        records += new
        print(to_markdown(machine, new).partition("\n")[2], end="", flush=True)
        if output is not None:
            _write(Path(output), machine, records)
    return records


def _able(contestants: Sequence[str], case: Case, told: set[str]) -> list[str]:
    """Those that can take part; why others cannot is said once."""
    reasons = {name: reason_against(name, case.mode) for name in contestants}
    for name, reason in reasons.items():
        line = f"{case.mode} without {name}: {reason}"
        if reason is not None and line not in told:
            print(line)
            told.add(line)
    return [name for name, reason in reasons.items() if reason is None]


def _write(folder: Path, machine: dict[str, object], records: Sequence[Record]) -> None:
    (folder / "overhead.json").write_text(to_json(machine, records), encoding="utf-8")
    (folder / "overhead.md").write_text(to_markdown(machine, records), encoding="utf-8")
    draw_ratios(records, folder / "overhead.png", f"{machine['device']}, torch {machine['torch']}")


def _values(name: str, text: str) -> list[str] | list[int]:
    values = text.split(",")
    if name not in _WHOLE_NUMBERS:
        return values
    if not all(value.isdecimal() for value in values):
        raise ValueError(f"`{name}` (={text!r}) must be whole numbers with commas between them, such as 1,8.")
    return [int(value) for value in values]


def _case(values: Mapping[str, object], device: str, channels_last: bool) -> Case:
    arguments: dict[str, object] = {**values, "device": device, "channels_last": channels_last}
    return Case(**arguments)  # type: ignore[arg-type]
