"""Evaluate: a finished run, or a recipe and a checkpoint, in; a table of metrics out."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from composer import Trainer
from composer.models import ComposerModel
from composer.utils import dist
from torchmetrics import Metric

from ws_algorithm.recipes import build, report
from ws_algorithm.recipes.closing import close_trainer
from ws_algorithm.recipes.evaluation_results import ResultFile, evaluation_of
from ws_algorithm.recipes.image_files import DataError
from ws_algorithm.recipes.loaded_run import begin_processes, checkpoint_of, find_trained, load_trained
from ws_algorithm.recipes.loading import unreadable_line
from ws_algorithm.recipes.metrics import SOURCE, published_figures
from ws_algorithm.recipes.per_class import (
    class_names,
    measure_per_class,
    per_class_metric,
    per_class_table,
    take_per_class,
)
from ws_algorithm.recipes.schema import Recipe, RecipeError

log = logging.getLogger(__name__)


def evaluate(
    source: str, overrides: Sequence[str] = (), *, per_class: bool = False, output: str | None = None
) -> dict[str, float]:
    """Evaluate a checkpoint on the evaluation data of its recipe, print the metrics and write the results.

    Beside them stand the figures that were published for the recipe, if it has some. Metrics may come with a table of
    their own, and with results of each image: of detectors, COCO's table, and ``detections.json`` in COCO's format.

    Args:
        source: The folder of a run, whose best checkpoint is taken (the last if there is no best one); or a recipe,
            with the checkpoint as ``load_path``.
        overrides: ``key=value`` lines.
        per_class: Whether to print the accuracy of each class too.
        output: The new file of results. Default: ``detections.json`` in the folder of the run, where it replaces that
            of an earlier evaluation; of a recipe and a checkpoint none is written.

    Returns:
        Metric values by name.

    Raises:
        RecipeError: If the recipe has mistakes, has no evaluation data or no checkpoint, its model does not say how to
            measure each class, there are no results for `output` or it cannot be written, or too many files of its data
            cannot be read.
    """
    trained = find_trained(source, overrides)
    recipe, source = trained.recipe, trained.source
    begin_processes(recipe)
    missing = [] if recipe.eval_dataloader else ["`eval_dataloader`: missing; there is nothing to evaluate on."]
    checkpoint = checkpoint_of(trained, "evaluate", missing)
    data = build.build_data(source, recipe, "eval_dataloader", training=False)
    with build.cpu_threads(recipe):
        trainer, model = load_trained(trained, checkpoint, data)
        results = ResultFile(source, evaluation_of(trainer), output, trained.folder)
        results.begin(data)
        if per_class:
            measure_per_class(trainer, _metric_of_each_class(source, model))
        _run(source, trainer, recipe)
        classes = take_per_class(trainer) if per_class else None
        results.write()
        close_trainer(trainer)
    unreadable = unreadable_line(data)
    values = {name: float(value) for name, value in trainer.state.eval_metric_values.items()}
    lines = _lines_of(recipe, trainer, values)
    if dist.get_global_rank() == 0:
        if unreadable is not None:
            log.warning("`eval_dataloader`: %s", unreadable)
        print("\n".join(lines))
        if classes is not None:
            header, rows = per_class_table(class_names(data, len(classes[0])), *classes)
            print(f"\n{report.format_table(header, rows)}")
        print(f"\ncheckpoint  {checkpoint}")
        if results.line:
            print(f"results     {results.line}")
    return values


def _run(source: str, trainer: Trainer, recipe: Recipe) -> None:
    try:
        trainer.eval(subset_num_batches=recipe.eval_subset_num_batches)
    except DataError as error:
        error.__traceback__ = None  # it holds the iterator over the data, and so its worker processes
        if dist.get_global_rank() != 0:
            log.error("%s", error.in_one_line())  # of the others the command shows no RecipeError
        close_trainer(trainer, alone=True)
        raise RecipeError(source, [error.in_one_line()]) from error


def _lines_of(recipe: Recipe, trainer: Trainer, values: dict[str, float]) -> list[str]:
    """The table of metrics, or that which they come with; to be called by all processes."""
    published = published_figures(recipe)
    evaluation = evaluation_of(trainer)
    if evaluation is None:
        rows: list[tuple[str, ...]] = [(name, f"{value:.4f}") for name, value in values.items()]
        table = report.add_published(("metric", "value"), rows, published)
    else:
        table = evaluation.table(published)
    lines = [report.format_table(*table)]
    if recipe.published and SOURCE in recipe.published:
        lines.append(f"\npublished   {recipe.published[SOURCE]}")
    return lines


def _metric_of_each_class(source: str, model: ComposerModel) -> Metric:
    try:
        return per_class_metric(model)
    except ValueError as error:
        raise RecipeError(source, [f"--per-class: {error}"]) from error
