"""Plot: the folders of runs in; their curves over each other, as one PNG, out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ws_algorithm.recipes import run_folder
from ws_algorithm.recipes.curves import draw_runs
from ws_algorithm.recipes.report import Row, read_metrics
from ws_algorithm.recipes.schema import RecipeError

DEFAULT_OUTPUT = "plot.png"  # not the name of a run's own picture, which it would replace inside of a run folder


def plot(folders: Sequence[str], output: str = DEFAULT_OUTPUT) -> Path:
    """Draw the curves of runs over each other: losses, evaluation errors and learning rate over epochs.

    Args:
        folders: Run folders.
        output: The PNG. Default: ``"plot.png"`` in the current folder.

    Returns:
        The path of the PNG.

    Raises:
        RecipeError: If a folder is not that of a run, is given twice or has metrics that cannot be read, or the PNG
            cannot be written; lists them all.
    """
    path = Path(output).expanduser()
    errors = _mistakes_in_output(path)
    runs: dict[Path, list[Row]] = {}
    for folder in folders:
        place = Path(folder).expanduser().resolve()
        try:
            rows = _rows_of(folder)
        except (ValueError, OSError) as error:
            errors.append(f"`run` (={folder!r}): {error}")
            continue
        if place in runs:
            errors.append(f"`run` (={folder!r}) is given twice.")
        runs[place] = rows
    if errors:
        raise RecipeError("ws-algorithm plot", errors)
    try:
        draw_runs(dict(zip(unique_names(list(runs)), runs.values(), strict=True)), path)
    except OSError as error:
        raise RecipeError("ws-algorithm plot", [f"`--output` (={output!r}): {error}"]) from error
    print(f"curves of {len(runs)} run{'' if len(runs) == 1 else 's'}: {path}")
    return path


def unique_names(folders: Sequence[Path]) -> list[str]:
    """The ends of different paths, as long as they must be so that no two are the same.

    Example:
        >>> unique_names([Path("/a/first/run"), Path("/a/second/run")])
        ['first/run', 'second/run']
    """
    length = 1
    while len({folder.parts[-length:] for folder in folders}) < len(folders):
        length += 1
    return ["/".join(folder.parts[-length:]) for folder in folders]


def _mistakes_in_output(path: Path) -> list[str]:
    if path.suffix.lower() != ".png":
        return [f"`--output` (={str(path)!r}) must be the name of a PNG, such as {path.with_suffix('.png')}."]
    if not path.parent.is_dir():
        return [f"`--output` (={str(path)!r}): there is no folder {path.parent}."]
    return []


def _rows_of(folder: str) -> list[Row]:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError("there is no such folder." if not path.exists() else "a file, not the folder of a run.")
    metrics = path / run_folder.METRICS
    if not metrics.is_file():
        raise ValueError(f"not the folder of a run: it has no {run_folder.METRICS}.")
    rows = read_metrics(metrics)
    if not rows:
        raise ValueError(f"its {run_folder.METRICS} has no metrics yet.")
    return rows
