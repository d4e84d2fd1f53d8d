"""Train: a recipe in, a Trainer run and a folder out."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import composer
import torch
from composer import Trainer
from composer.callbacks import LRMonitor
from composer.core import DataSpec
from composer.models import ComposerModel
from composer.utils import dist, get_device, reproducibility

import ws_algorithm
from ws_algorithm.recipes import build, report, run_folder
from ws_algorithm.recipes.best_checkpoint import BestCheckpoint, default_monitor
from ws_algorithm.recipes.catalogue import find_recipe
from ws_algorithm.recipes.closing import close_trainer
from ws_algorithm.recipes.curves import draw_curves
from ws_algorithm.recipes.epoch_table import EpochTable
from ws_algorithm.recipes.image_files import DataError
from ws_algorithm.recipes.loading import unreadable_line
from ws_algorithm.recipes.metrics import published_figures
from ws_algorithm.recipes.origins import function_that_changes
from ws_algorithm.recipes.reading import read_recipe
from ws_algorithm.recipes.resolve import resolve_recipe
from ws_algorithm.recipes.run_log import RunLog
from ws_algorithm.recipes.schema import BLOCKS, Recipe, RecipeError, in_one_line, to_yaml, with_data_root
from ws_algorithm.recipes.synthetic import SYNTHETIC

log = logging.getLogger(__name__)

# Fields of a recipe that the Trainer takes as they are; blocks are built into objects first
_PASSED = {field.name for field in dataclasses.fields(Recipe)} & set(inspect.signature(Trainer).parameters) - set(
    BLOCKS
)


def train(source: str, overrides: Sequence[str] = ()) -> Trainer:
    """Train what a recipe describes and write its run folder.

    The folder gets the resolved recipe, the last and the best checkpoint, metrics as JSON lines, a table of epochs, a
    log and a PNG of the curves. A run that was killed continues from its last checkpoint with ``autoresume=true``.

    Args:
        source: A path to a YAML file, or the name of a shipped recipe.
        overrides: ``key=value`` lines, such as ``["max_duration=1ep", "model.norm=batch"]``.

    Returns:
        The Trainer after training, closed.

    Raises:
        RecipeError: If the recipe has mistakes, its data are not there or its folder is taken, lists them all; while
            it trains, if too many files of its data cannot be read.
    """
    recipe = resolve_recipe(source, [*overrides, *_without_lost_weights(source, overrides)])
    dist.initialize_dist(get_device(recipe.device), timeout=recipe.dist_timeout)
    data = [
        build.build_data(source, recipe, "train_dataloader", training=True),
        build.build_data(source, recipe, "eval_dataloader", training=False),
    ]
    build.check_same_classes(source, *data)
    build.check_images(source, recipe, *data)
    recipe, folder = _open_run_folder(source, recipe)
    progress_bar = sys.stderr.isatty() if recipe.progress_bar is None else recipe.progress_bar
    with build.cpu_threads(recipe), _logging_to(folder / run_folder.LOG, epochs_on_screen=not progress_bar):
        trainer = _build_or_refuse(source, recipe, folder, data, progress_bar)
        _keep_recipe(recipe, folder)  # not before: a run that cannot go on keeps its own
        if _is_complete(trainer):
            log.info("%s is already trained for %s; nothing is left to do.", folder, recipe.max_duration)
        else:
            _fit_or_refuse(source, trainer)
        close_trainer(trainer)
        _tell_of_unreadable(data)
        if dist.get_global_rank() == 0:
            run_folder.remove_old_checkpoints(folder, recipe.save_num_checkpoints_to_keep)
            _report(trainer, recipe, folder)
    dist.barrier()
    return trainer


def _without_lost_weights(source: str, overrides: Sequence[str]) -> list[str]:
    """Overrides for a run that goes on from its own checkpoint while the weights that it began with are gone."""
    try:
        path = find_recipe(source)
        recipe, _ = read_recipe(path, overrides)
    except ValueError:
        return []  # resolve_recipe says what is wrong
    pretrained = (recipe.model or {}).get("pretrained")
    if not recipe.autoresume or not isinstance(pretrained, str) or Path(pretrained).is_file():
        return []
    folder, _ = run_folder.folder_to_use_again(recipe.save_folder, recipe.run_name, path.stem)
    if not run_folder.has_whole_checkpoint(folder) or not (folder / run_folder.RECIPE).is_file():
        return []
    before, _ = read_recipe(folder / run_folder.RECIPE)
    key = "WeightStandardization"
    ours, theirs = ((own.algorithms or {}).get(key) or {} for own in (recipe, before))
    taken = key in (recipe.algorithms or {}) and "formula" in theirs and "formula" not in ours
    return ["model.pretrained=null", *([f"algorithms.{key}.formula={json.dumps(theirs['formula'])}"] if taken else [])]


def _open_run_folder(source: str, recipe: Recipe) -> tuple[Recipe, Path]:
    """Let the first process choose and prepare the folder; all processes use that one."""
    chosen: list[Any] = [None]
    if dist.get_global_rank() == 0:
        chosen[0] = _choose_and_prepare(find_recipe(source).stem, recipe)
    dist.broadcast_object_list(chosen)
    if isinstance(chosen[0], ValueError):
        raise RecipeError(source, [str(chosen[0])])
    folder, run_name = chosen[0]
    return dataclasses.replace(recipe, run_name=run_name, save_folder=str(folder)), folder


def _choose_and_prepare(default_name: str, recipe: Recipe) -> tuple[Path, str] | ValueError:
    try:
        folder, run_name = run_folder.claim_run_folder(
            recipe.save_folder,
            recipe.run_name,
            default_name,
            autoresume=recipe.autoresume,
            overwrite=recipe.save_overwrite,
        )
    except ValueError as error:
        return error
    except OSError as error:
        return ValueError(f"`save_folder` (={recipe.save_folder!r}) cannot be made: {error}")
    if recipe.autoresume:
        run_folder.repair_checkpoints(folder)
    else:
        run_folder.clear_run(folder)
    return folder, run_name


def _keep_recipe(recipe: Recipe, folder: Path) -> None:
    """Write the resolved recipe; when a run continues, say what has changed since it began."""
    if dist.get_global_rank() != 0:
        return
    path = folder / run_folder.RECIPE
    recipe = _for_any_working_folder(recipe)
    if path.exists():
        before, _ = read_recipe(path)
        changed = [
            f"{field.name} {getattr(before, field.name)!r} -> {getattr(recipe, field.name)!r}"
            for field in dataclasses.fields(Recipe)
            if field.name not in ("autoresume", "progress_bar")
            and getattr(before, field.name) != getattr(recipe, field.name)
        ]
        if changed:
            log.warning("%s continues with a changed recipe: %s.", folder, "; ".join(changed))
    versions = f"ws-algorithm {ws_algorithm.__version__}, Composer {composer.__version__}, torch {torch.__version__}"
    run_folder.write_atomically(path, f"# {recipe.run_name}: resolved recipe; {versions}\n{to_yaml(recipe)}")


def _for_any_working_folder(recipe: Recipe) -> Recipe:
    """The recipe with the absolute path of its ``root``, if that is a folder that is there."""
    if not recipe.root or recipe.root == SYNTHETIC:
        return recipe
    root = os.path.join(os.getcwd(), os.path.expanduser(recipe.root))
    return dataclasses.replace(recipe, root=root, **with_data_root(recipe, root)) if os.path.exists(root) else recipe


def _build_or_refuse(
    source: str, recipe: Recipe, folder: Path, data: list[DataSpec | None], progress_bar: bool
) -> Trainer:
    try:
        return _build_trainer(recipe, folder, data, progress_bar)
    except Exception as error:  # whatever Composer says of the arguments or of the checkpoint
        log.error("The Trainer could not be built", exc_info=True)
        problem = f"the Trainer refuses it: {in_one_line(error)}"
        raise RecipeError(source, [f"{problem} (traceback in {folder / run_folder.LOG})"]) from error


def _build_trainer(recipe: Recipe, folder: Path, data: list[DataSpec | None], progress_bar: bool) -> Trainer:
    reproducibility.seed_all(recipe.seed)
    model = build.build_model(recipe)
    if recipe.load_path is None and run_folder.latest_checkpoint(folder) is None:
        for line in (build.random_but_frozen(recipe, model), function_that_changes(recipe)):
            if line is not None:
                log.warning("%s", line)
    arguments: dict[str, Any] = {name: getattr(recipe, name) for name in _PASSED} | {"progress_bar": progress_bar}
    return Trainer(
        model=model,
        train_dataloader=data[0],
        eval_dataloader=data[1],
        optimizers=build.build_optimizer(recipe, model),
        schedulers=build.build_scheduler(recipe),
        algorithms=build.build_algorithms(recipe),
        callbacks=[*build.build_callbacks(recipe), *_own_callbacks(recipe, model, folder)],
        loggers=[
            RunLog(folder / run_folder.METRICS),
            EpochTable(folder / run_folder.EPOCHS, folder / run_folder.METRICS),
            *build.build_loggers(recipe),
        ],
        save_filename=run_folder.CHECKPOINT_FORMAT,
        save_latest_filename=run_folder.LATEST_FORMAT,
        **arguments,
    )


def _own_callbacks(recipe: Recipe, model: ComposerModel, folder: Path) -> list[Any]:
    callbacks: list[Any] = [] if "LRMonitor" in (recipe.callbacks or {}) else [LRMonitor()]
    monitor = recipe.monitor or default_monitor(model)
    if recipe.eval_dataloader is not None and monitor is not None:
        callbacks.append(BestCheckpoint(folder / run_folder.BEST, monitor))
    return callbacks


def _fit_or_refuse(source: str, trainer: Trainer) -> None:
    try:
        trainer.fit()
    except DataError as error:
        error.__traceback__ = None  # it holds the iterator over the data, and so its worker processes
        log.error("%s", error.in_one_line(), extra={"for_the_file": True})  # the screen has it from the RecipeError
        close_trainer(trainer, alone=True)
        raise RecipeError(source, [error.in_one_line()]) from error


def _tell_of_unreadable(data: list[DataSpec | None]) -> None:
    for key, spec in zip(("train_dataloader", "eval_dataloader"), data, strict=True):
        line = unreadable_line(spec)
        if line is not None and dist.get_global_rank() == 0:
            log.warning("`%s`: %s", key, line)


def _is_complete(trainer: Trainer) -> bool:
    duration = trainer.state.max_duration
    assert duration is not None
    return trainer.state.timestamp.get(duration.unit) >= duration


def _report(trainer: Trainer, recipe: Recipe, folder: Path) -> None:
    """Draw the curves and print the table that ends a run."""
    rows = report.read_metrics(folder / run_folder.METRICS)
    draw_curves(rows, folder / run_folder.CURVES, folder.name)
    evaluated = [metric for metrics in trainer.state.eval_metrics.values() for metric in metrics.items()]
    table = report.summary_table(rows, {name: metric.higher_is_better for name, metric in evaluated})
    header = ("metric", "last", "best", "best epoch")
    print(report.format_table(*report.add_published(header, [*table], published_figures(recipe))))
    throughput = report.images_per_second(rows)
    latest = run_folder.latest_checkpoint(folder)
    best = folder / run_folder.BEST
    print(f"\nimages/s     {f'{throughput:.0f}' if throughput else '-'}")
    print(f"run folder   {folder}")
    print(f"checkpoints  last {latest.name if latest else '-'}, best {best.name if best.exists() else '-'}")
    others = (run_folder.RECIPE, run_folder.METRICS, run_folder.EPOCHS, run_folder.CURVES, run_folder.LOG)
    print(f"also there   {', '.join(name for name in others if (folder / name).exists())}")


@contextmanager
def _logging_to(path: Path, *, epochs_on_screen: bool) -> Iterator[None]:
    """Send our log lines, and warnings of everything else, to a file and to the screen while a run lasts."""
    root, ours = logging.getLogger(), logging.getLogger("ws_algorithm")
    level = ours.level
    handlers: list[logging.Handler] = []
    if dist.get_global_rank() == 0:
        handlers = [logging.FileHandler(path, encoding="utf-8"), logging.StreamHandler()]
        handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers[1].addFilter(lambda record: epochs_on_screen or record.name != RunLog.__module__)
        handlers[1].addFilter(lambda record: not (record.exc_info or hasattr(record, "for_the_file")))
    for handler in handlers:
        handler.addFilter(lambda record: record.name.startswith("ws_algorithm") or record.levelno >= logging.WARNING)
        root.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
