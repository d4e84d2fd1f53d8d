"""A recipe's blocks to the objects they name."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from composer.core import Algorithm, Callback, DataSpec
from composer.loggers import LoggerDestination
from composer.models import ComposerModel
from composer.optim import ComposerScheduler
from composer.utils import dist
from torch import nn

from ws_algorithm.recipes import registry
from ws_algorithm.recipes.freezing import freeze
from ws_algorithm.recipes.origins import Origin, image_difference, mean_and_std, unchecked_origin
from ws_algorithm.recipes.parameter_groups import parameter_groups
from ws_algorithm.recipes.schema import Recipe, RecipeError
from ws_algorithm.recipes.signatures import check_arguments

log = logging.getLogger(__name__)

NO_OPTIONS = ("params", "lr_factor")  # keys of a parameter group that are no arguments of the optimizer


def build_model(recipe: Recipe) -> ComposerModel:
    """The model, with those of its parameters frozen that the recipe says."""
    model = _build(registry.MODELS, recipe.model)
    if recipe.freeze:
        freeze(model, recipe.freeze)
    return model


def random_but_frozen(recipe: Recipe, model: nn.Module) -> str | None:
    """A line about parameters that do not train although no file gives them values; ``None`` if there are none.

    `model` is as :func:`build_model` made it: what a checkpoint will give it, the caller knows.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if not frozen or recipe.model.get("pretrained") is not None:
        return None
    named = [f"model.{key}" for key, value in recipe.model.items() if key.startswith("frozen") and value]
    causes = " and ".join(f"`{cause}`" for cause in [*named, *(["freeze"] if recipe.freeze else [])])
    return (
        f"{len(frozen)} parameters, {frozen[0]} the first of them, do not train ({causes}) and keep the random values "
        "that they start from: neither `model.pretrained` nor `load_path` names a file of weights."
    )


def _build_dataspec(recipe: Recipe, block: dict[str, Any], *, training: bool) -> DataSpec:
    """The data of one dataloader block, in batches for this device."""
    batch_size = recipe.global_train_batch_size
    if not training and recipe.global_eval_batch_size is not None:
        batch_size = recipe.global_eval_batch_size
    device_batch_size = batch_size // dist.get_world_size()
    spec: DataSpec = _build(registry.DATA, block, batch_size=device_batch_size, training=training, seed=recipe.seed)
    if len(spec.dataloader) == 0:  # pyright: ignore[reportArgumentType]
        raise ValueError(f"`global_train_batch_size` (={batch_size}) is larger than the data set: no batch is full.")
    return spec


def build_data(source: str, recipe: Recipe, key: str, *, training: bool) -> DataSpec | None:
    """The data of one dataloader block; what is wrong with the data themselves is a mistake in the recipe too."""
    block = getattr(recipe, key)
    if block is None:
        return None
    try:
        spec = _build_dataspec(recipe, block, training=training)
    except ValueError as error:
        raise RecipeError(source, [f"`{key}`: {error}"]) from error
    _check_outputs(source, recipe, key, spec)
    return spec


def check_same_classes(source: str, train: DataSpec | None, evaluation: DataSpec | None) -> None:
    """Refuse to evaluate on classes other than those that are trained: a label would mean two things.

    Raises:
        RecipeError: If the names of the classes differ; names the first label for which they do.
    """
    first, second = (_classes_of(spec) if spec is not None else [] for spec in (train, evaluation))
    if not first or not second or first == second:
        return
    label = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    differ = f"{len(first)} and {len(second)}" if label is None else f"{first[label]!r} and {second[label]!r}"
    raise RecipeError(source, [f"`eval_dataloader` has other classes than `train_dataloader`: {differ}."])


def check_images(source: str, recipe: Recipe, train: DataSpec | None, evaluation: DataSpec | None) -> None:
    """Refuse images that are not what the pretrained weights of the recipe expect, where that is known.

    Weights say so if ``ws-algorithm convert`` has written their file, data if their data set or its collate function
    has ``image_input``, a picture in RGB as one of their images. One warning tells of data that do not.

    Raises:
        RecipeError: If they differ; names what the weights expect and what the network would see.
    """
    if recipe.model.get("pretrained") is None:
        return
    with torch.device("meta"):
        origin = unchecked_origin(_build(registry.MODELS, recipe.model))
    if origin is None:
        return
    unknown = []
    for key, spec in (("train_dataloader", train), ("eval_dataloader", evaluation)):
        if spec is None:
            continue
        places = [getattr(spec.dataloader, name, None) for name in ("dataset", "collate_fn")]
        offered: list[Any] = [getattr(place, "image_input", None) for place in places]
        as_data = next((way for way in offered if way is not None), None)
        difference = image_difference(origin, as_data) if as_data else unknown.append(key)
        if difference is not None:
            fix = _image_fix(origin, key, getattr(recipe, key))
            raise RecipeError(source, [f"`{key}`: the weights of `model.pretrained` {difference}.{fix}"])
    if unknown:
        keys = " and ".join(f"`{key}`" for key in unknown)
        log.warning("Whether the images of %s are what the weights of `model.pretrained` expect is not known.", keys)


def _image_fix(origin: Origin, key: str, block: dict[str, Any]) -> str:
    """What to set so that data give images as weights expect them, where the data's builder has arguments for it."""
    if not {"mean", "std"} <= inspect.signature(registry.DATA[block["name"]]).parameters.keys():
        return ""
    mean, std = (str(values).replace(" ", "") for values in mean_and_std(origin.image_input))
    return f" Set {key}.mean={mean} {key}.std={std}."


def _classes_of(spec: DataSpec) -> list[str]:
    return list(getattr(getattr(spec.dataloader, "dataset", None), "classes", ()))


def _check_outputs(source: str, recipe: Recipe, key: str, spec: DataSpec) -> None:
    """Refuse data with more classes than the model tells apart, where both are known; of fewer, a warning tells.

    A data set says so in ``num_outputs`` if it is not the number of its classes, as for a background; and in
    ``num_classes_argument`` which argument of its builder decides it, if one does.
    """
    dataset, classes = getattr(spec.dataloader, "dataset", None), len(_classes_of(spec))
    needed = getattr(dataset, "num_outputs", classes)
    outputs = recipe.model.get("num_classes", _default(registry.MODELS[recipe.model["name"]], "num_classes"))
    if not isinstance(outputs, int) or not needed or needed == outputs:
        return
    message = (
        f"`model.num_classes` (={outputs}) is {'less' if outputs < needed else 'more'} than the {needed} of `{key}`"
    )
    argument = getattr(dataset, "num_classes_argument", None)
    fix = f"Set model.num_classes={needed}."
    if argument is not None:
        keys = [name for name in ("train_dataloader", "eval_dataloader") if getattr(recipe, name)]
        fix = f"Set {' '.join(f'{name}.{argument}={outputs - (needed - classes)}' for name in keys)}, or {fix[4:]}"
    if outputs < needed:
        raise RecipeError(source, [f"{message}. {fix}"])
    log.warning("%s. %s", message, fix)


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    block = dict(recipe.optimizers)
    groups = [_typed_group(block, group) for group in block.pop("param_groups", None) or []]
    *chosen, rest = parameter_groups(model, groups)
    for position, group in enumerate(chosen):
        if not group["params"]:
            raise ValueError(
                f"`param_groups[{position}].params` (={groups[position]['params']!r}) selects only what groups "
                "before it have. Put it before them."
            )
    params = [*chosen, rest] if rest["params"] else chosen
    return _build(registry.OPTIMIZERS, block, params=params)


def build_scheduler(recipe: Recipe) -> ComposerScheduler | None:
    return _build(registry.SCHEDULERS, recipe.schedulers) if recipe.schedulers else None


def build_algorithms(recipe: Recipe) -> list[Algorithm]:
    return _build_each(registry.ALGORITHMS, recipe.algorithms)


def build_callbacks(recipe: Recipe) -> list[Callback]:
    return _build_each(registry.CALLBACKS, recipe.callbacks)


def build_loggers(recipe: Recipe) -> list[LoggerDestination]:
    """The loggers of a recipe; those that write files write them into the run folder unless told otherwise."""
    blocks = {name: dict(arguments) for name, arguments in (recipe.loggers or {}).items()}
    for name, (argument, place) in registry.LOGGER_FILES.items():
        if name in blocks:
            blocks[name].setdefault(argument, f"{recipe.save_folder}/{place}")
    return _build_each(registry.LOGGERS, blocks)


def group_options(optimizer: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """What a parameter group says of the optimizer, without which parameters are in it.

    ``lr_factor`` is not an option of optimizers: the ``lr`` that it stands for takes its place.
    """
    options = {option: value for option, value in group.items() if option not in NO_OPTIONS}
    if "lr_factor" in group:
        lr = learning_rate(optimizer)
        assert lr is not None, "a resolved recipe has no mistakes"
        options["lr"] = float(group["lr_factor"]) * lr
    return options


def learning_rate(optimizer: dict[str, Any]) -> float | None:
    """The learning rate of an optimizer block, or that of its class, or ``None`` if neither says a number."""
    value: Any = optimizer.get("lr", _default(registry.OPTIMIZERS[optimizer["name"]], "lr"))
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _default(builder: Callable[..., Any], argument: str) -> Any:
    parameter = inspect.signature(builder).parameters.get(argument)
    return parameter.default if parameter is not None else None


def _typed_group(optimizer: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group with its options as the optimizer takes them: ``"1e-3"`` is 0.001."""
    options = group_options(optimizer, group)
    converted, _ = check_arguments(registry.OPTIMIZERS[optimizer["name"]], options, ("params",))
    return {"params": group.get("params"), **converted}


def _build_each(names: registry.Registry, blocks: dict[str, Any] | None) -> list[Any]:
    return [_build(names, {"name": name, **arguments}) for name, arguments in (blocks or {}).items()]


def _build(names: registry.Registry, block: dict[str, Any], **supplied: Any) -> Any:
    arguments = {key: value for key, value in block.items() if key != "name"}
    builder = names[block["name"]]
    converted, errors = check_arguments(builder, arguments, supplied)
    assert not errors, f"a resolved recipe has no mistakes, found {errors}"
    return builder(**converted, **supplied)


@contextmanager
def cpu_threads(recipe: Recipe) -> Iterator[None]:
    """Let one operation use as many CPU threads as the recipe says."""
    before = torch.get_num_threads()
    torch.set_num_threads(recipe.num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
