"""The one folder of a run: which folder it is, what is in it, and its checkpoints after a kill.

A process may be killed while it writes. A checkpoint file is whole when its zip directory, written last, is there; the
link to the latest one may be missing for a moment. :func:`repair_checkpoints` makes the newest whole checkpoint the
latest and removes what was cut off, so that the next run resumes from there.
"""

from __future__ import annotations

import glob
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
EPOCHS = "epochs.tsv"
LOG = "log.txt"
CURVES = "curves.png"
BEST = "best.pt"
EXPORTED = "exported"  # with the suffixes of export
RESULTS = ("detections.json",)  # of evaluations
CHECKPOINT_FORMAT = "ep{epoch}-ba{batch}-rank{rank}.pt"
LATEST_FORMAT = "latest-rank{rank}.pt"

_LATEST = "latest-rank0.pt"
_CHECKPOINT = re.compile(r"ep\d+-ba(?P<batch>\d+)-rank0\.pt")


def claim_run_folder(
    save_folder: str, run_name: str | None, default_name: str, *, autoresume: bool, overwrite: bool
) -> tuple[Path, str]:
    """Choose the folder and the name of a run, and make the folder.

    A folder that holds a run is used again only to continue it (`autoresume`) or to replace it (`overwrite`). When the
    name was not chosen by the user, a number is appended to `default_name` until the folder is new, also to runs that
    start at the same moment; `autoresume` then continues the run with the highest number.

    Args:
        save_folder: May contain ``{run_name}``.
        run_name: The name that the user chose, if any.
        default_name: The name otherwise.

    Raises:
        ValueError: If the folder holds a run and may not be used again.
        OSError: If it cannot be made.
    """
    again = autoresume or overwrite
    if run_name is None and "{run_name}" in save_folder and not again:
        return _claim_new_folder(save_folder, default_name)
    folder, run_name = folder_to_use_again(save_folder, run_name, default_name)
    if _holds_run(folder) and not (autoresume or overwrite):
        raise ValueError(
            f"`save_folder` (={str(folder)!r}) already holds a run. Use autoresume=true to continue it, "
            "save_overwrite=true to replace it, or another save_folder or run_name."
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder, run_name


def folder_to_use_again(save_folder: str, run_name: str | None, default_name: str) -> tuple[Path, str]:
    """The folder and the name of the run that is continued or replaced; of a new one if there is none.

    Arguments are those of :func:`claim_run_folder`. Nothing is made.
    """
    if run_name is None and "{run_name}" in save_folder:
        run_name = _numbered(default_name, max(_taken_numbers(save_folder, default_name, _holds_run), default=1))
    run_name = run_name or default_name
    return _folder(save_folder, run_name), run_name


def has_whole_checkpoint(folder: Path) -> bool:
    """Whether a run can go on from what it has saved in a folder."""
    return any(zipfile.is_zipfile(path) for path in _checkpoints(folder))


def clear_run(folder: Path) -> None:
    """Remove the files of an earlier run, and nothing else, from a folder."""
    named = [folder / name for name in (_LATEST, RECIPE, METRICS, EPOCHS, LOG, CURVES, BEST, *RESULTS)]
    patterns = (f"{EXPORTED}.*", "*.partial", "*.partial.pt")
    for path in [*_checkpoints(folder), *named, *(path for pattern in patterns for path in folder.glob(pattern))]:
        path.unlink(missing_ok=True)


def repair_checkpoints(folder: Path) -> Path | None:
    """Make the newest whole checkpoint of a folder the latest; remove those that were cut off while being written.

    Returns:
        The latest checkpoint, or ``None`` if there is none.
    """
    whole = []
    for path in _checkpoints(folder):
        if zipfile.is_zipfile(path):
            whole.append(path)
        else:
            path.unlink()
    link = folder / _LATEST
    if not whole:
        link.unlink(missing_ok=True)
        return None
    if not link.exists() or link.resolve() != whole[-1].resolve():
        partial = folder / f"{_LATEST}.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(whole[-1].name)
        os.replace(partial, link)
    return whole[-1]


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Keep the newest `keep` checkpoints (all if negative); after a resumption Composer forgets the earlier ones."""
    if keep >= 0:
        for path in _checkpoints(folder)[: -keep or None]:
            path.unlink()


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that training would resume from, if there is one."""
    link = folder / _LATEST
    return link.resolve() if link.exists() else None


def best_or_latest_checkpoint(folder: Path) -> Path:
    """The checkpoint to evaluate.

    Raises:
        ValueError: If the folder has no checkpoint.
    """
    best = folder / BEST
    checkpoint = best if best.exists() else latest_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f"`run` (={str(folder)!r}) has no checkpoint: neither {BEST} nor {_LATEST}.")
    return checkpoint


def is_of_a_run(checkpoint: Path) -> bool:
    """Whether a checkpoint is one that a run folder keeps, with the state of its algorithms."""
    return (checkpoint.parent / RECIPE).exists()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a kill leaves either the old or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def _claim_new_folder(save_folder: str, name: str) -> tuple[Path, str]:
    number = max(_taken_numbers(save_folder, name, Path.exists), default=0) + 1
    while True:
        folder = _folder(save_folder, _numbered(name, number))
        try:
            folder.mkdir(parents=True)
            return folder, _numbered(name, number)
        except FileExistsError:  # another process was faster
            number += 1


def _taken_numbers(save_folder: str, name: str, is_taken: Callable[[Path], bool]) -> list[int]:
    """The numbers under which runs of a name are there already."""
    numbers = [1]
    for path in glob.glob(str(_folder(glob.escape(save_folder), f"{glob.escape(name)}-*"))):
        numbers += [int(number) for number in re.findall(rf"{re.escape(name)}-([0-9]+)", path)]
    return [number for number in numbers if is_taken(_folder(save_folder, _numbered(name, number)))]


def _folder(save_folder: str, run_name: str) -> Path:
    return Path(save_folder.replace("{run_name}", run_name)).expanduser()


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (METRICS, BEST)) or bool(_checkpoints(folder))


def _checkpoints(folder: Path) -> list[Path]:
    """Numbered checkpoints of the first rank, the newest last."""
    found = {path: _CHECKPOINT.fullmatch(path.name) for path in folder.glob("ep*.pt")}
    numbered = [(int(match["batch"]), path) for path, match in found.items() if match and path.is_file()]
    return [path for _, path in sorted(numbered)]
