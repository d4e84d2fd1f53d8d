"""The metrics that a recipe names, against those that its model has."""

from __future__ import annotations

import math
from typing import Any

from composer.models import ComposerModel

from ws_algorithm.recipes.best_checkpoint import monitorable
from ws_algorithm.recipes.schema import Recipe, did_you_mean

SOURCE = "source"  # the key of `published` that is no metric


def check_metrics(recipe: Recipe, model: ComposerModel | None) -> list[str]:
    """The mistakes in `monitor`, `published` and callbacks that watch a metric, each a line that begins with its key.

    Args:
        recipe: The recipe.
        model: Its model; ``None`` if it cannot be built, and nothing more can be said of names.
    """
    errors = []
    if recipe.monitor is not None and recipe.eval_dataloader is None:
        errors.append(f"`monitor` (={recipe.monitor!r}): nothing is evaluated, since `eval_dataloader` is null.")
    if model is None:
        return errors
    metrics = model.get_metrics(is_train=False)
    if recipe.monitor is not None and recipe.eval_dataloader is not None:
        errors += _check_monitor(recipe.monitor, metrics)
    return errors + _check_stoppers(recipe, model) + _check_published(recipe.published, list(metrics))


def published_figures(recipe: Recipe) -> dict[str, float]:
    """The figures that were published for a recipe, by metric."""
    return {name: value for name, value in (recipe.published or {}).items() if name != SOURCE}


def _check_stoppers(recipe: Recipe, model: ComposerModel) -> list[str]:
    """Callbacks that watch a metric look for it only after the first epoch."""
    errors = []
    for name in ("EarlyStopper", "ThresholdStopper"):
        stopper = (recipe.callbacks or {}).get(name)
        if isinstance(stopper, dict) and {"monitor", "dataloader_label"} <= set(stopper):
            metrics = list(model.get_metrics(is_train=stopper["dataloader_label"] == "train"))
            if stopper["monitor"] not in metrics:
                problem = f"unknown metric {stopper['monitor']!r}.{did_you_mean(str(stopper['monitor']), metrics)}"
                errors.append(f"`callbacks.{name}.monitor`: {problem}")
    return errors


def _check_monitor(monitor: str, metrics: dict[str, Any]) -> list[str]:
    known = monitorable(metrics)
    if monitor in known:
        return []
    problem = "does not say whether higher or lower is better" if monitor in metrics else "is no metric of the model"
    return [f"`monitor` (={monitor!r}) {problem}.{did_you_mean(monitor, known)}"]


def _check_published(published: dict[str, Any] | None, metrics: list[str]) -> list[str]:
    if published is None:
        return []
    errors = [] if set(published) - {SOURCE} else ["`published` has no figure. Name a metric, or leave it out."]
    for name, value in published.items():
        if name == SOURCE:
            if not isinstance(value, str):
                errors.append(f"`published.{SOURCE}` (={value!r}) must be a text.")
        elif name not in metrics:
            hint = did_you_mean(str(name), metrics)
            errors.append(f"`published.{name}`: no metric of the model.{hint} published=null leaves all out.")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            errors.append(f"`published.{name}` (={value!r}) must be a number.")
    return errors
