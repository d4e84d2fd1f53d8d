"""Evaluate: a finished run, or a recipe and a checkpoint, in; a table of metrics out."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import DataSpec
from composer.models import ComposerModel
from composer.utils import dist, get_device, reproducibility
from torchmetrics import Metric

from ws_algorithm.recipes import build, report, run_folder
from ws_algorithm.recipes.image_files import DataError
from ws_algorithm.recipes.loading import unreadable_line
from ws_algorithm.recipes.metrics import SOURCE, published_figures
from ws_algorithm.recipes.per_class import (
    class_names,
    measure_per_class,
    per_class_metric,
    per_class_table,
    take_per_class,
)
from ws_algorithm.recipes.reading import read_recipe
from ws_algorithm.recipes.resolve import resolve_recipe
from ws_algorithm.recipes.schema import Recipe, RecipeError, in_one_line

log = logging.getLogger(__name__)


def evaluate(source: str, overrides: Sequence[str] = (), *, per_class: bool = False) -> dict[str, float]:
    """Evaluate a checkpoint on the evaluation data of its recipe and print the metrics.

    Beside them stand the figures that were published for the recipe, if it has some.

    Args:
        source: The folder of a run, whose best checkpoint is taken (the last if there is no best one); or a recipe,
            with the checkpoint as ``load_path``.
        overrides: ``key=value`` lines.
        per_class: Whether to print the accuracy of each class too.

    Returns:
        Metric values by name.

    Raises:
        RecipeError: If the recipe has mistakes, has no evaluation data or no checkpoint, its model does not say how to
            measure each class, or too many files of its data cannot be read.
    """
    folder = Path(source).expanduser()
    in_folder = (folder / run_folder.RECIPE).is_file()
    if in_folder:
        source = str(folder / run_folder.RECIPE)
        own = [override for override in overrides if override.startswith("load_path=")]
        overrides = [*overrides, *(own or [f"load_path={json.dumps(str(_checkpoint_of(source, folder)))}"])]
        overrides += _without_pretrained(Path(source))
    recipe = resolve_recipe(source, overrides)
    dist.initialize_dist(get_device(recipe.device), timeout=recipe.dist_timeout)
    checkpoint = recipe.load_path
    errors = [] if recipe.eval_dataloader else ["`eval_dataloader`: missing; there is nothing to evaluate on."]
    if checkpoint is None:
        errors.append(
            "`load_path`: missing. Name the checkpoint to evaluate, or the folder of a run instead of a recipe."
        )
    if errors or checkpoint is None:
        raise RecipeError(source, errors)
    data = build.build_data(source, recipe, "eval_dataloader", training=False)
    with build.cpu_threads(recipe):
        try:
            trainer, model = _build_trainer(recipe, data, checkpoint)
        except Exception as error:  # whatever Composer says of the arguments or of the checkpoint
            raise RecipeError(source, [f"`load_path` (={checkpoint!r}): {in_one_line(error)}"]) from error
        if per_class:
            measure_per_class(trainer, _metric_of_each_class(source, model))
        try:
            trainer.eval(subset_num_batches=recipe.eval_subset_num_batches)
        except DataError as error:
            error.__traceback__ = None  # it holds the iterator over the data, and so its worker processes
            if dist.get_global_rank() != 0:
                log.error("%s", error.in_one_line())  # of the others the command shows no RecipeError
            trainer.engine.close()  # close() of the Trainer would wait for the other processes
            raise RecipeError(source, [error.in_one_line()]) from error
        classes = take_per_class(trainer) if per_class else None
        trainer.close()
    unreadable = unreadable_line(data)
    values = {name: float(value) for name, value in trainer.state.eval_metric_values.items()}
    if dist.get_global_rank() == 0:
        if unreadable is not None:
            log.warning("`eval_dataloader`: %s", unreadable)
        _print_values(recipe, values)
        if classes is not None:
            header, rows = per_class_table(class_names(data, len(classes[0])), *classes)
            print(f"\n{report.format_table(header, rows)}")
        print(f"\ncheckpoint  {checkpoint}")
    return values


def _print_values(recipe: Recipe, values: dict[str, float]) -> None:
    rows: list[tuple[str, ...]] = [(name, f"{value:.4f}") for name, value in values.items()]
    print(report.format_table(*report.add_published(("metric", "value"), rows, published_figures(recipe))))
    if recipe.published and SOURCE in recipe.published:
        print(f"\npublished   {recipe.published[SOURCE]}")


def _metric_of_each_class(source: str, model: ComposerModel) -> Metric:
    try:
        return per_class_metric(model)
    except ValueError as error:
        raise RecipeError(source, [f"--per-class: {error}"]) from error


def _build_trainer(recipe: Recipe, data: DataSpec | None, checkpoint: str) -> tuple[Trainer, ComposerModel]:
    reproducibility.seed_all(recipe.seed)
    model = build.build_model(recipe)
    with_algorithms = _state_with_algorithms(Path(checkpoint))
    trainer = Trainer(
        model=model,
        optimizers=build.build_optimizer(recipe, model),  # not used; without one, Composer makes its own and warns
        eval_dataloader=data,
        algorithms=build.build_algorithms(recipe),
        load_path=checkpoint,
        load_weights_only=with_algorithms is None,
        load_strict_model_weights=recipe.load_strict_model_weights,
        precision=recipe.precision,
        device=recipe.device,
        seed=recipe.seed,
        progress_bar=False,
    )
    if with_algorithms is not None and recipe.load_strict_model_weights:  # Composer is strict with weights alone
        model.load_state_dict(with_algorithms["model"])
    return trainer, model


def _state_with_algorithms(checkpoint: Path) -> dict[str, Any] | None:
    """A run's checkpoint if algorithms have state in it: EMA and SWA evaluate weights that they keep there."""
    if not run_folder.is_of_a_run(checkpoint) or not checkpoint.is_file():
        return None
    state = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)["state"]
    return state if any(set(kept) - {"repr"} for _, kept in state.get("algorithms", [])) else None


def _without_pretrained(recipe_of_run: Path) -> list[str]:
    """The override that keeps a run from looking for the weights it began with, which its checkpoint replaces."""
    recipe, _ = read_recipe(recipe_of_run)
    return ["model.pretrained=null"] if (recipe.model or {}).get("pretrained") else []


def _checkpoint_of(source: str, folder: Path) -> Path:
    try:
        return run_folder.best_or_latest_checkpoint(folder)
    except ValueError as error:
        raise RecipeError(source, [str(error)]) from error
