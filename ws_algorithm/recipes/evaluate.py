"""Evaluate: a finished run, or a recipe and a checkpoint, in; a table of metrics out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import DataSpec
from composer.utils import dist, get_device, reproducibility

from ws_algorithm.recipes import build, report, run_folder
from ws_algorithm.recipes.resolve import resolve_recipe
from ws_algorithm.recipes.schema import Recipe, RecipeError, in_one_line


def evaluate(source: str, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Evaluate a checkpoint on the evaluation data of its recipe and print the metrics.

    Args:
        source: The folder of a run, whose best checkpoint is taken (the last if there is no best one); or a recipe,
            with the checkpoint as ``load_path``.
        overrides: ``key=value`` lines.

    Returns:
        Metric values by name.

    Raises:
        RecipeError: If the recipe has mistakes, or has no evaluation data or no checkpoint.
    """
    folder = Path(source).expanduser()
    in_folder = (folder / run_folder.RECIPE).is_file()
    if in_folder:
        source = str(folder / run_folder.RECIPE)
        own = [override for override in overrides if override.startswith("load_path=")]
        overrides = [*overrides, *(own or [f"load_path={json.dumps(str(_checkpoint_of(source, folder)))}"])]
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
            trainer = _build_trainer(recipe, data, checkpoint)
        except Exception as error:  # whatever Composer says of the arguments or of the checkpoint
            raise RecipeError(source, [f"`load_path` (={checkpoint!r}): {in_one_line(error)}"]) from error
        trainer.eval(subset_num_batches=recipe.eval_subset_num_batches)
        trainer.close()
    values = {name: float(value) for name, value in trainer.state.eval_metric_values.items()}
    if dist.get_global_rank() == 0:
        rows: list[tuple[str, ...]] = [(name, f"{value:.4f}") for name, value in values.items()]
        print(report.format_table(("metric", "value"), rows))
        print(f"\ncheckpoint  {checkpoint}")
    return values


def _build_trainer(recipe: Recipe, data: DataSpec | None, checkpoint: str) -> Trainer:
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
    return trainer


def _state_with_algorithms(checkpoint: Path) -> dict[str, Any] | None:
    """A run's checkpoint if algorithms have state in it: EMA and SWA evaluate weights that they keep there."""
    if not run_folder.is_of_a_run(checkpoint) or not checkpoint.is_file():
        return None
    state = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)["state"]
    return state if any(set(kept) - {"repr"} for _, kept in state.get("algorithms", [])) else None


def _checkpoint_of(source: str, folder: Path) -> Path:
    try:
        return run_folder.best_or_latest_checkpoint(folder)
    except ValueError as error:
        raise RecipeError(source, [str(error)]) from error
