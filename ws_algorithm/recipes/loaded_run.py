"""A run, or a recipe and a checkpoint, to a model with its weights in a Trainer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import DataSpec, Event
from composer.models import ComposerModel
from composer.utils import dist, get_device, reproducibility
from torch import nn

from ws_algorithm.functional import is_weight_standardized
from ws_algorithm.once import standardize_once
from ws_algorithm.recipes import build, run_folder
from ws_algorithm.recipes.catalogue import find_recipe
from ws_algorithm.recipes.reading import read_recipe
from ws_algorithm.recipes.resolve import resolve_recipe
from ws_algorithm.recipes.schema import Recipe, RecipeError, in_one_line


@dataclass
class TrainedRecipe:
    """A resolved recipe whose ``load_path`` is the checkpoint, if any was found or named.

    Args:
        source: What mistakes are said to be in.
        recipe: Resolved.
        folder: Of the run, if it is one.
    """

    source: str
    recipe: Recipe
    folder: Path | None


def find_trained(source: str, overrides: Sequence[str]) -> TrainedRecipe:
    """The recipe of a run with its best checkpoint (the last if there is no best one), or a recipe as it is.

    Args:
        source: The folder of a run; or a recipe, with the checkpoint as ``load_path``.
        overrides: ``key=value`` lines.

    Raises:
        RecipeError: If the recipe has mistakes or the run has no checkpoint.
    """
    folder = Path(source).expanduser()
    in_folder = (folder / run_folder.RECIPE).is_file()
    if in_folder:
        source = str(folder / run_folder.RECIPE)
        own = [override for override in overrides if override.startswith("load_path=")]
        overrides = [*overrides, *(own or [f"load_path={json.dumps(str(_checkpoint_of(source, folder)))}"])]
        overrides += _without_pretrained(Path(source))
    else:
        _check_is_there(source)
    recipe = resolve_recipe(source, overrides)
    return TrainedRecipe(source, recipe, folder if in_folder else None)


def checkpoint_of(trained: TrainedRecipe, verb: str, errors: Sequence[str] = ()) -> str:
    """The checkpoint.

    Args:
        trained: What :func:`find_trained` returns.
        verb: What is to be done with it.
        errors: Mistakes found already.

    Raises:
        RecipeError: If there is none, or for `errors`.
    """
    checkpoint, errors = trained.recipe.load_path, list(errors)
    if checkpoint is None:
        errors.append(
            f"`load_path`: missing. Name the checkpoint to {verb}, or the folder of a run instead of a recipe."
        )
    if errors or checkpoint is None:
        raise RecipeError(trained.source, errors)
    return checkpoint


def begin_processes(recipe: Recipe) -> None:
    """Let the processes of a distributed run find one another."""
    dist.initialize_dist(get_device(recipe.device), timeout=recipe.dist_timeout)


def load_trained(
    trained: TrainedRecipe, checkpoint: str, data: DataSpec | None = None
) -> tuple[Trainer, ComposerModel]:
    """A Trainer with the model of a recipe, its algorithms and the weights of a checkpoint, and the model.

    Args:
        trained: What :func:`find_trained` returns.
        checkpoint: A file.
        data: What to evaluate on, if anything.

    Raises:
        RecipeError: With whatever Composer says of the arguments or of the checkpoint.
    """
    try:
        return _build_trainer(trained.recipe, data, checkpoint)
    except Exception as error:
        raise RecipeError(trained.source, [f"`load_path` (={checkpoint!r}): {in_one_line(error)}"]) from error


@contextmanager
def evaluation_weights(trainer: Trainer, data: DataSpec, name: str) -> Iterator[None]:
    """The model with the weights that algorithms such as EMA keep for evaluations.

    Args:
        trainer: Of :func:`load_trained`.
        data: Which the event of an evaluation asks for.
        name: What they are for.
    """
    trainer.state.set_dataloader(data.dataloader, name)
    trainer.engine.run_event(Event.EVAL_START)
    try:
        yield
    finally:
        trainer.engine.run_event(Event.EVAL_END)


def evaluation_scope(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which a standardized model computes each of its weights once, for any number of batches."""
    return standardize_once(model) if is_weight_standardized(model) else nullcontext()


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


def _check_is_there(source: str) -> None:
    try:
        find_recipe(source)
    except ValueError as error:
        no_run = f"Nor is it the folder of a run: there is no {Path(source) / run_folder.RECIPE}."
        raise RecipeError(source, [f"{error} {no_run}"]) from error


def _without_pretrained(recipe_of_run: Path) -> list[str]:
    """The override that keeps a run from looking for the weights it began with, which its checkpoint replaces."""
    recipe, _ = read_recipe(recipe_of_run)
    return ["model.pretrained=null"] if (recipe.model or {}).get("pretrained") else []


def _checkpoint_of(source: str, folder: Path) -> Path:
    try:
        return run_folder.best_or_latest_checkpoint(folder)
    except ValueError as error:
        raise RecipeError(source, [str(error)]) from error
