"""A recipe by name or path, with overrides, to a :class:`Recipe` that can run, or to every mistake in it.

No data is read. The model is built without memory (on the meta device), and so are the objects that only a constructor
can judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from composer.core import Time, Timestamp, TimeUnit
from composer.models import ComposerModel
from composer.utils import dist
from torch import nn

from ws_algorithm.algorithm import WeightStandardization
from ws_algorithm.functional import check_selection
from ws_algorithm.group_norm import replace_batch_norms
from ws_algorithm.recipes import build, freezing, registry
from ws_algorithm.recipes.catalogue import find_recipe
from ws_algorithm.recipes.linear_rule import apply_linear_rule, check_linear_rule
from ws_algorithm.recipes.metrics import check_metrics
from ws_algorithm.recipes.origins import check_standardized, misfitting_options, take_formula
from ws_algorithm.recipes.reading import read_recipe
from ws_algorithm.recipes.schema import Recipe, RecipeError, check_batch_sizes, did_you_mean, first_line
from ws_algorithm.recipes.signatures import MISSING_VALUE, check_arguments
from ws_algorithm.recipes.values import check_values
from ws_algorithm.selection import select_convolutions

# block -> the names it may have, the arguments that are filled in by the run
_NAMED_BLOCKS: dict[str, tuple[registry.Registry, tuple[str, ...]]] = {
    "model": (registry.MODELS, ()),
    "train_dataloader": (registry.DATA, ("batch_size", "training", "seed")),
    "eval_dataloader": (registry.DATA, ("batch_size", "training", "seed")),
    "optimizers": (registry.OPTIMIZERS, ("params",)),
    "schedulers": (registry.SCHEDULERS, ()),
}
_MAPPING_BLOCKS: dict[str, registry.Registry] = {
    "algorithms": registry.ALGORITHMS,
    "callbacks": registry.CALLBACKS,
    "loggers": registry.LOGGERS,
}

_OTHER_SURGERY = registry.SURGERY - {"GroupNormalization"}  # by Composer's algorithms


def resolve_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        source: A path to a YAML file, or the name of a shipped recipe.
        overrides: ``key=value`` lines, see :func:`~ws_algorithm.recipes.reading.read_recipe`.

    Raises:
        RecipeError: Lists every mistake: unknown keys and names, wrong types, missing values, sizes that do not divide,
            arguments that a constructor refuses.
    """
    try:
        path = find_recipe(source)
    except ValueError as error:
        raise RecipeError(source, [str(error)]) from error
    recipe, errors = read_recipe(path, overrides)
    for key, (names, supplied) in _NAMED_BLOCKS.items():
        if getattr(recipe, key) is not None:
            errors += _check_named_block(key, getattr(recipe, key), names, supplied)
    for key, names in _MAPPING_BLOCKS.items():
        for name, arguments in (getattr(recipe, key) or {}).items():
            errors += _check_entry(key, name, arguments, names)
    errors += check_values(recipe) + check_batch_sizes(recipe, dist.get_world_size())
    recipe, misfits = take_formula(recipe)
    errors += misfits + _check_options(recipe) + check_linear_rule(recipe)
    if not any(error.startswith("`lr_base_batch_size`") for error in errors):
        recipe = apply_linear_rule(recipe)
    errors += _check_by_building(recipe, errors)
    if errors:
        raise RecipeError(source, errors)
    return recipe


def _check_named_block(
    key: str, block: dict[str, Any], names: registry.Registry, supplied: tuple[str, ...]
) -> list[str]:
    name = block.get("name")
    if not isinstance(name, str) or name == MISSING_VALUE:
        return [f"`{key}.name`: missing.{did_you_mean('', names)}"]
    arguments = {argument: value for argument, value in block.items() if argument != "name"}
    errors = []
    if key == "optimizers":
        errors = _check_param_groups(block, arguments.pop("param_groups", None))
    return errors + _check_arguments(key, f"{key}.name", name, arguments, names, supplied)


def _check_entry(key: str, name: str, arguments: Any, names: registry.Registry) -> list[str]:
    if not isinstance(arguments, dict):
        return [
            f"`{key}.{name}` (={arguments!r}) must hold arguments. Write {{}} for the defaults; "
            f"to leave it out, delete the line or use {key}=null."
        ]
    if name == "CheckpointSaver":
        return [f"`{key}.{name}`: a run saves its own checkpoints; set save_interval and save_num_checkpoints_to_keep."]
    missing = registry.missing_extra(name)
    if missing is not None:
        return [f"`{key}.{name}`: {missing}."]
    return _check_arguments(f"{key}.{name}", f"{key}.{name}", name, arguments, names)


def _check_arguments(
    path: str,
    name_path: str,
    name: str,
    arguments: dict[str, Any],
    names: registry.Registry,
    supplied: tuple[str, ...] = (),
) -> list[str]:
    """Check the `arguments`, which stand at `path`, of the builder whose `name` stands at `name_path`."""
    if name not in names:
        return [f"`{name_path}`: unknown name {name!r}.{did_you_mean(name, names)}"]
    _, mistakes = check_arguments(names[name], arguments, supplied)
    return [
        f"`{path}.{mistake.name}`: {mistake.problem}"
        + (f" of {name}.{did_you_mean(mistake.name, mistake.valid)}" if mistake.valid else ".")
        for mistake in mistakes
    ]


def _check_param_groups(optimizer: dict[str, Any], groups: Any) -> list[str]:
    """Options of a parameter group are arguments of the optimizer; what is selected needs the model."""
    name = optimizer["name"]
    if groups is None or name not in registry.OPTIMIZERS:
        return []
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return [f"`optimizers.param_groups` (={groups!r}) must be a list of {{params: ..., <option>: <value>}}."]
    errors = []
    for position, group in enumerate(groups):
        path = f"optimizers.param_groups[{position}]"
        options = {option: value for option, value in group.items() if option not in build.NO_OPTIONS}
        _, mistakes = check_arguments(registry.OPTIMIZERS[name], options, ("params",))
        errors += [
            f"`{path}.{mistake.name}`: {mistake.problem}."
            + (did_you_mean(mistake.name, [*mistake.valid, "lr_factor"]) if mistake.valid else "")
            for mistake in mistakes
            if mistake.name in options
        ]
        if "lr_factor" in group:
            errors += _check_lr_factor(f"{path}.lr_factor", optimizer, group)
    return errors


def _check_lr_factor(path: str, optimizer: dict[str, Any], group: dict[str, Any]) -> list[str]:
    factor, lr = group["lr_factor"], build.learning_rate(optimizer)
    errors = []
    if "lr" in group:
        errors.append(f"`{path}` and `lr` cannot both be given: one multiplies the optimizer's `lr`, one replaces it.")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        errors.append(f"`{path}` (={factor!r}) must be a positive number, by which the optimizer's `lr` is multiplied.")
    if lr is None and "lr" not in optimizer:
        errors.append(f"`{path}` needs a number as `optimizers.lr`; {optimizer['name']} has none by default.")
    return errors


def _check_by_building(recipe: Recipe, found: Sequence[str]) -> list[str]:
    """What only a constructor knows, for the blocks in which nothing wrong was found yet."""
    errors: list[str] = []

    def attempt(key: str, make: Callable[[], Any]) -> Any:
        if any(error.startswith((f"`{key}`", f"`{key}.", f"`{key.partition('.')[0]}`")) for error in found):
            return None
        try:
            return make()
        except Exception as error:  # a constructor may refuse its arguments with any error
            problem = first_line(error)
            errors.append(f"`{key}`: {problem}{'' if problem.endswith('?') else '.'}")
            return None

    built: dict[str, Any] = {}
    for key, make in (("algorithms", build.build_algorithms), ("callbacks", build.build_callbacks)):
        for name, arguments in (getattr(recipe, key) or {}).items():
            built[name] = attempt(f"{key}.{name}", partial(make, replace(recipe, **{key: {name: arguments}})))
    timed = not any(error.startswith(("`max_duration`", "`scale_schedule_ratio`")) for error in found)
    attempt("schedulers", lambda: _try_scheduler(recipe) if timed else build.build_scheduler(recipe))
    with torch.device("meta"):
        model = attempt("model", lambda: build.build_model(replace(recipe, freeze=None))) if recipe.model else None
        if model is not None and recipe.freeze:
            unfit = freezing.mistakes_in(model, recipe.freeze)
            errors += unfit
            if not unfit:
                freezing.freeze(model, recipe.freeze)
        if recipe.optimizers and model is not None:
            attempt("optimizers", lambda: build.build_optimizer(recipe, model))
        elif recipe.optimizers:
            attempt("optimizers", lambda: _try_optimizer(recipe))
        groups = (recipe.optimizers or {}).get("param_groups")
        groups_alone = all(e.startswith("`optimizers.param_groups[") for e in found if e.startswith("`optimizers"))
        for position, group in enumerate(groups if isinstance(groups, list) else []):
            if isinstance(group, dict) and groups_alone:
                attempt(f"optimizers.param_groups[{position}]", partial(_try_group, recipe, group))
        if model is not None and built.get("GroupNormalization") and not _OTHER_SURGERY & built.keys():
            (algorithm,) = built["GroupNormalization"]
            attempt("algorithms.GroupNormalization", partial(replace_batch_norms, model, algorithm.rules))
        if model is not None and built.get("WeightStandardization") and not _OTHER_SURGERY & built.keys():
            (algorithm,) = built["WeightStandardization"]
            attempt("algorithms.WeightStandardization", partial(_try_selection, recipe, algorithm, model))
    return errors + check_metrics(recipe, model)


def _try_optimizer(recipe: Recipe, **options: Any) -> None:
    """Build the optimizer without the model and its groups, with `options` in the place of its own."""
    block = recipe.optimizers | options | {"param_groups": None}
    build.build_optimizer(replace(recipe, optimizers=block), nn.Linear(1, 1))


def _try_group(recipe: Recipe, group: dict[str, Any]) -> None:
    """Build the optimizer with the options of a group as its own: torch judges only these."""
    _try_optimizer(recipe, **build.group_options(recipe.optimizers, group))


def _check_options(recipe: Recipe) -> list[str]:
    name = (recipe.model or {}).get("name")
    if not isinstance(name, str) or name not in registry.MODELS:
        return []
    return misfitting_options(recipe, registry.MODELS[name])


def _try_selection(recipe: Recipe, algorithm: WeightStandardization, model: ComposerModel) -> None:
    """Look for the layers that Weight Standardization is to find, where no other surgery will have changed them."""
    selection = select_convolutions(model, algorithm.rules)
    check_selection(selection)
    check_standardized(recipe, model, selection)


def _try_scheduler(recipe: Recipe) -> None:
    """Build the scheduler and ask for a first learning rate: units of time may not go together."""
    scheduler = build.build_scheduler(recipe)
    if scheduler is not None and recipe.max_duration is not None:
        duration = Time.from_input(recipe.max_duration, TimeUnit.EPOCH)
        epoch = Time(1_000_000, TimeUnit.BATCH)  # long, so that no warm-up is too long for it
        start: Any = SimpleNamespace(max_duration=duration, timestamp=Timestamp(), dataloader_len=epoch)
        scheduler(start, recipe.scale_schedule_ratio)
