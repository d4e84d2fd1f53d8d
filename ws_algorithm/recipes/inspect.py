"""Inspect: a recipe or a model of torchvision or timm in; which convolutions are standardized, and why, out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import nn

from ws_algorithm.algorithm import WeightStandardization
from ws_algorithm.cautions import cautions_about
from ws_algorithm.formula import Formula, resolve_formula
from ws_algorithm.inspection import ConvolutionRecord, records_of
from ws_algorithm.recipes import build, registry
from ws_algorithm.recipes.named_models import build_named_model, names_a_model
from ws_algorithm.recipes.report import format_table
from ws_algorithm.recipes.resolve import resolve_recipe
from ws_algorithm.recipes.schema import RecipeError
from ws_algorithm.selection import Rules, Selection, select_convolutions

# Those that a command line or a recipe can give
RULES = tuple(field.name for field in fields(Rules) if field.name != "predicate")

_MOST_NAMES = 12

_HEADER = ("", "convolution", "type", "weight", "fan-in", "normalized by", "WS", "why")


def inspect(source: str, overrides: Sequence[str] = (), *, as_json: bool = False, **rules: Any) -> None:
    """Print the convolutions of a model in the order of execution, with the decision on each.

    Args:
        source: A recipe, by path or name; ``torchvision:NAME``; or ``timm:NAME``.
        overrides: ``key=value`` lines for a recipe.
        as_json: Whether to print one JSON object instead of a table.
        rules: Of :class:`~ws_algorithm.selection.Rules`; those that are given take the place of the recipe's.

    Raises:
        RecipeError: If the recipe has mistakes, there is no such model, or the rules do not fit it.
    """
    try:
        model, settings, formula, notes = _model_and_rules(source, overrides)
        selection = select_convolutions(model, Rules(**settings | rules))
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(source, [str(error)]) from error
    records = records_of(selection)
    notes = [*notes, *_orders(selection), *cautions_about(selection, formula)]
    print(_json(source, selection, records, notes) if as_json else _table(source, selection, records, notes))


def _model_and_rules(source: str, overrides: Sequence[str]) -> tuple[nn.Module, dict[str, Any], Formula, list[str]]:
    if names_a_model(source):
        if overrides:
            raise ValueError(f"{' '.join(overrides)!r} would change a recipe, and {source} is none.")
        return build_named_model(source), {}, resolve_formula("composer"), []
    recipe = resolve_recipe(source, overrides)
    with torch.device("meta"):
        model = build.build_model(recipe)
    algorithms = build.build_algorithms(recipe)
    own = [algorithm for algorithm in algorithms if isinstance(algorithm, WeightStandardization)]
    notes = [] if own else ["The recipe has no WeightStandardization; this is what its defaults would do."]
    others = [name for name in recipe.algorithms or {} if name in registry.SURGERY]
    if others:
        notes.append(f"This is the model as it is built, before {', '.join(others)} of the recipe.")
    settings = own[0].rules if own else Rules()
    formula = resolve_formula(own[0].formula if own else "composer")
    return model, {name: getattr(settings, name) for name in RULES}, formula, notes


def _orders(selection: Selection) -> list[str]:
    execution = selection.execution
    if execution.failure is not None:
        return [f"Order: {execution.failure}, so its parts stand in the order in which they are defined."]
    return [] if execution.doubt is None else [f"Order: {execution.doubt}."]


def _table(source: str, selection: Selection, records: list[ConvolutionRecord], notes: Iterable[str]) -> str:
    rows = [
        (
            str(record.index),
            record.name or "(the model itself)",
            record.type,
            "x".join(map(str, record.weight_shape)) or "lazy",
            str(record.fan_in),
            record.normalized_by or "-",
            "yes" if record.standardized else "no",
            record.reason,
        )
        for record in records
    ]
    lines = [format_table(_HEADER, rows, right=(0, 3, 4)), "", f"{source}: {_summary_line(selection, records)}"]
    return "\n".join([*lines, *notes])


def _summary_line(selection: Selection, records: list[ConvolutionRecord]) -> str:
    standardized = sum(record.standardized for record in records)
    left: dict[str, list[str]] = {}
    for record in records:
        if not record.standardized:
            left.setdefault(record.reason, []).append(record.name or "(the model itself)")
    reasons = "; ".join(f"{_some_of(names)} ({reason})" for reason, names in left.items()) or "none"
    of_all = f"{standardized} of {len(records)} convolutions standardized"
    return f"{of_all} with {_rules_text(selection)}; left alone: {reasons}."


def _some_of(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= _MOST_NAMES else f"{len(names)} convolutions"


def _rules_text(selection: Selection) -> str:
    given = {name: value for name in RULES if (value := getattr(selection.rules, name)) not in (None, 0)}
    return ", ".join(f"{name}={list(value) if isinstance(value, tuple) else value!r}" for name, value in given.items())


def _json(source: str, selection: Selection, records: list[ConvolutionRecord], notes: Iterable[str]) -> str:
    content = {
        "source": source,
        "rules": {name: getattr(selection.rules, name) for name in RULES},
        "convolutions": [asdict(record) for record in records],
        "summary": {
            "convolutions": len(records),
            "standardized": sum(record.standardized for record in records),
            "normalized": sum(record.normalized_by is not None for record in records),
        },
        "notes": list(notes),
    }
    return json.dumps(content, indent=2)
