"""Predict: a finished run and images in; what the model finds in them, drawn or in a table, out."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import DataSpec, get_precision_context
from composer.models import ComposerModel
from composer.utils import dist, model_eval_mode
from PIL import Image
from torch import Tensor

from ws_algorithm.recipes import build
from ws_algorithm.recipes.closing import close_trainer
from ws_algorithm.recipes.given_images import find_images, read_upright
from ws_algorithm.recipes.loaded_run import (
    TrainedRecipe,
    begin_processes,
    checkpoint_of,
    evaluation_scope,
    evaluation_weights,
    find_trained,
    load_trained,
)
from ws_algorithm.recipes.predictions import Classes, Shown, show
from ws_algorithm.recipes.schema import RecipeError

log = logging.getLogger(__name__)

DEFAULT_OUTPUT = "predictions"

Prediction = dict[str, Tensor]


def predict(
    source: str,
    images: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    output: str | None = None,
    score_threshold: float | None = None,
) -> dict[Path, Prediction]:
    """Show what a model finds in images: objects drawn on them in new PNG files, or a table of the probable classes.

    The checkpoint is that which ``evaluate`` takes. Images become inputs as in the evaluation data of the recipe, which
    also name the classes, after they were turned upright as their EXIF orientation says.

    Args:
        source: The folder of a run; or a recipe, with the checkpoint as ``load_path``.
        images: Files, folders of images, or patterns.
        overrides: ``key=value`` lines.
        output: The folder of the pictures; made if it is not there. No file in it is replaced. Default:
            ``"predictions"``.
        score_threshold: The least score of what is shown. Default: that of the model, ``0.5``.

    Returns:
        What the model predicts, by image.

    Raises:
        RecipeError: If the recipe has mistakes or no checkpoint, an image is missing or cannot be read, or the model or
            the data do not offer what is needed; before the model runs.
    """
    trained = find_trained(source, overrides)
    begin_processes(trained.recipe)
    options = {} if score_threshold is None else {"score_threshold": score_threshold}
    paths, errors = find_images(images)
    if dist.get_world_size() > 1:
        errors.append("images are not shared among processes: start one.")
    if score_threshold is not None and not 0 <= score_threshold <= 1:
        errors.append(f"`--score-threshold` (={score_threshold}) must be from 0 to 1.")
    folder = Path(output or DEFAULT_OUTPUT).expanduser()
    if folder.exists() and not folder.is_dir():
        errors.append(f"`--output` (={str(folder)!r}) is a file. Name a folder.")
    checkpoint = checkpoint_of(trained, "predict with", errors)
    data = _data_of(trained)
    to_input = _input_of(trained, data)
    with build.cpu_threads(trained.recipe):
        trainer, model = load_trained(trained, checkpoint)
        run = _predicting(trained, model, options)
        found, pictures = {}, 0
        with _evaluating(trainer, data):
            for path in paths:
                image = read_upright(path)
                inputs = trainer.state.device.batch_to_device([to_input(image)])
                (prediction,) = run(inputs, **options)
                found[path] = {key: value.cpu() for key, value in prediction.items()}
                shown = show(found[path], image, Classes.of(data))
                pictures += shown.picture is not None
                _print(path, shown, trained, folder)
        close_trainer(trainer)
    if output is not None and not pictures:
        log.warning("`--output` (=%r): nothing was written; this model gives tables, not pictures.", output)
    print(f"\ncheckpoint  {checkpoint}")
    return found


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The images and the overrides among the arguments of a command line.

    An override is ``key=value``, unless there is a file of that name.
    """
    overrides = [
        argument for argument in arguments if re.match(r"[A-Za-z_][\w.]*=", argument) and not Path(argument).exists()
    ]
    return [argument for argument in arguments if argument not in overrides], overrides


def _data_of(trained: TrainedRecipe) -> DataSpec:
    key = "eval_dataloader" if trained.recipe.eval_dataloader else "train_dataloader"
    data = build.build_data(trained.source, trained.recipe, key, training=False)
    assert data is not None, "a recipe has training data"
    return data


def _input_of(trained: TrainedRecipe, data: DataSpec) -> Callable[[Image.Image], Tensor]:
    """What the data do with a picture; of a data set, or of what makes its samples to batches."""
    for place in ("dataset", "collate_fn"):
        offered: Any = getattr(getattr(data.dataloader, place, None), "image_input", None)
        if offered is not None:
            return offered
    key = "eval_dataloader" if trained.recipe.eval_dataloader else "train_dataloader"
    raise RecipeError(
        trained.source,
        [
            f"`{key}`: these data do not say how a picture becomes an input: their data set has no method "
            "`image_input`. Random images have none; name the data that the model was trained for, as by root=FOLDER."
        ],
    )


def _predicting(trained: TrainedRecipe, model: ComposerModel, options: dict[str, Any]) -> Callable[..., Any]:
    predicting: Any = getattr(model, "predict", None)
    if predicting is None:
        raise RecipeError(trained.source, ["`model`: it does not say what it predicts: it has no method `predict`."])
    for option in set(options) - set(inspect.signature(predicting).parameters):
        raise RecipeError(trained.source, [f"--{option.replace('_', '-')}: this model has none. Leave it out."])
    return predicting


@contextmanager
def _evaluating(trainer: Trainer, data: DataSpec) -> Iterator[None]:
    """The surroundings of an evaluation: with the weights that algorithms such as EMA keep for it."""
    state = trainer.state
    precision = get_precision_context(state.precision, state.precision_config)
    averages = evaluation_weights(trainer, data, "predict")
    with averages, evaluation_scope(state.model), torch.no_grad(), model_eval_mode(state.model), precision:
        yield


def _print(path: Path, shown: Shown, trained: TrainedRecipe, folder: Path) -> None:
    place = ""
    if shown.picture is not None:
        try:
            place = f", {_save(shown.picture, folder, path.stem)}"
        except OSError as error:
            raise RecipeError(trained.source, [f"`--output` (={str(folder)!r}): {error}."]) from error
    print(f"{path}: {shown.summary}{place}")
    if shown.table:
        print(shown.table + "\n")


def _save(picture: Image.Image, folder: Path, stem: str) -> Path:
    """A new PNG: with a number after its name if there is one of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        try:
            with path.open("xb") as file:
                picture.save(file, "png")
            return path
        except FileExistsError:
            number += 1
