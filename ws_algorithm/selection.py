"""Which convolutions of a model are standardized, in the order in which they run, and why the others are not.

A model is looked at, never changed. Candidates are found by walking the modules, so that they do not depend on train or
eval mode, on random states or on whether forward can be traced.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ws_algorithm.formula import check_weight
from ws_algorithm.layers import (
    is_convolution,
    own_standardization,
    parametrizations_of,
    raw_weight,
    standardizers_of,
    weight_shape,
)
from ws_algorithm.patterns import Patterns, check_patterns, check_that_all_match, names_of, reason_by_patterns
from ws_algorithm.tracing.execution import Execution, Place, execution_of

Layers = Literal["all", "normalized"]
Predicate = Callable[[str, nn.Module], bool]

# By class: the function of torch.nn.utils.parametrizations that puts it on a weight
_CONFLICTING_PARAMETRIZATIONS = {
    "_WeightNorm": "weight_norm",
    "_SpectralNorm": "spectral_norm",
    "_Orthogonal": "orthogonal",
}


@dataclass(frozen=True)
class Rules:
    """What a user says about which convolutions to standardize. One is taken if every rule admits it.

    Args:
        n_last_layers_ignore: How many of the convolutions that are executed last are left alone. More than there
            are leaves all of them alone.
        layers: ``"all"``, or ``"normalized"``: only those that a normalization layer follows.
        include: Names or ``fnmatch`` patterns; only convolutions that one of them matches are taken.
        exclude: The same; those that one of them matches are left alone.
        predicate: Takes a convolution if ``predicate(qualified name, convolution)`` is true.

    Raises:
        ValueError: If one of them is not of that kind.
    """

    n_last_layers_ignore: int = 0
    layers: Layers = "all"
    include: Patterns | None = None
    exclude: Patterns | None = None
    predicate: Predicate | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        count = check_n_last_layers_ignore(self.n_last_layers_ignore)
        object.__setattr__(self, "n_last_layers_ignore", count)
        if self.layers not in get_args(Layers):
            raise ValueError(f"`layers` (={self.layers!r}) must be one of {', '.join(map(repr, get_args(Layers)))}.")
        for name in ("include", "exclude"):
            object.__setattr__(self, name, check_patterns(name, getattr(self, name)))
        if self.predicate is not None and not callable(self.predicate):
            raise ValueError(f"`predicate` (={self.predicate!r}) must be a function of a name and a module, or None.")


@dataclass(frozen=True)
class ConvolutionChoice:
    """One convolution of a model and what is to happen to it.

    Args:
        name: Its first qualified name (``""`` for the model itself).
        module: The convolution.
        place: Where it stands in forward, and which norm follows.
        skipped_because: Why it is left alone; ``None`` if it is to be standardized.
        refused_because: Why it cannot be standardized, although it is to be; ``None`` if it can.
    """

    name: str
    module: nn.Module
    place: Place
    skipped_because: str | None = None
    refused_because: str | None = None

    def __str__(self) -> str:
        return self.name or "(the model itself)"


@dataclass(frozen=True)
class Selection:
    """The convolutions of a model, each once, in the order of last use in forward, with the decision on each.

    Args:
        choices: Those that forward never uses come first.
        execution: What was found out about forward, and what was not.
    """

    module: nn.Module
    rules: Rules
    choices: tuple[ConvolutionChoice, ...]
    execution: Execution

    @property
    def chosen(self) -> list[ConvolutionChoice]:
        """Those that are to be standardized."""
        return [choice for choice in self.choices if choice.skipped_because is None]

    @property
    def accepted(self) -> list[ConvolutionChoice]:
        """Those of them that can be."""
        return [choice for choice in self.chosen if choice.refused_because is None]


def select_convolutions(module: nn.Module, rules: Rules, example_input: Any = None) -> Selection:
    """Decide on every ``Conv1d``, ``Conv2d`` and ``Conv3d`` of a model, subclasses and `module` itself included.

    Args:
        module: Any model; it is not changed.
        rules: What the user says.
        example_input: What forward is observed with: a tuple of positional arguments, or the only argument. ``None``
            lets it be traced.

    Raises:
        ValueError: If `module` is not a module, a pattern matches no convolution, or forward does not accept the
            example input.
    """
    names = _names_of_convolutions(module)
    for argument in ("include", "exclude"):
        patterns = getattr(rules, argument)
        check_that_all_match(argument, patterns, module, names, "convolutions", "inspect_convolutions")
    execution = execution_of(module, example_input)
    count = len(execution.places)
    last = set(list(execution.places)[max(count - rules.n_last_layers_ignore, 0) :])
    choices = []
    for conv, place in execution.places.items():
        counted = f"n_last_layers_ignore={rules.n_last_layers_ignore}" if conv in last else None
        skipped = _reason_to_skip(conv) or (counted if place.undecided else None)
        skipped = skipped or _reason_to_leave_out(names[conv], conv, place, rules) or counted
        if skipped is None and rules.predicate is not None and not rules.predicate(names[conv][0], conv):
            skipped = "predicate is false"
        refused = _reason_to_refuse(conv) if skipped is None else None
        choices.append(ConvolutionChoice(names[conv][0], conv, place, skipped, refused))
    return Selection(module, rules, tuple(choices), execution)


def check_n_last_layers_ignore(value: Any) -> int:
    """Return `value` as an ``int``.

    Raises:
        ValueError: If it is not a whole number (``bool`` is none) or is negative.
    """
    try:
        number = None if isinstance(value, torch.Tensor) or "bool" in type(value).__name__ else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < 0:
        raise ValueError(
            f"`n_last_layers_ignore` (={value!r}) must be a whole number of layers, 0 or more. Use 0 to ignore none."
        )
    return number


def check_module(module: Any) -> None:
    """Raise ``ValueError`` unless `module` is a module whose layers can be told apart (a TorchScript module is not)."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"`module` must be a torch.nn.Module, got {type(module).__name__}: {module!r:.80}.")
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError("`module` is a torch.jit.ScriptModule; standardize the model before scripting or tracing it.")


def _names_of_convolutions(module: nn.Module) -> dict[nn.Module, list[str]]:
    """All qualified names of each convolution."""
    check_module(module)
    return names_of(module, filter(is_convolution, module.modules()))


def _reason_to_skip(conv: nn.Module) -> str | None:
    """Why nothing is to be done, whatever the rules say."""
    if standardizers_of(conv):
        return "already standardized"
    own_layer = own_standardization(conv)
    if own_layer is not None:
        return f"already standardized by its class {own_layer}"
    shape = weight_shape(conv)
    if len(shape) > 1 and shape[1:].numel() == 1:
        return "fan-in 1: the standardized weight would be 0"
    return None


def _reason_to_leave_out(names: list[str], conv: nn.Module, place: Place, rules: Rules) -> str | None:
    by_name = reason_by_patterns(names, rules.include, rules.exclude)
    if by_name is not None:
        return by_name
    if rules.layers == "normalized" and place.norm is None:
        if place.undecided:
            return "layers='normalized': not known to be followed by a norm"
        return f"layers='normalized': {'no norm follows it' if place.executed else 'forward does not use it'}"
    return None


def _reason_to_refuse(conv: nn.Module) -> str | None:
    """What is in the way of standardizing a convolution, and how to remove it."""
    if hasattr(conv, "weight_fake_quant"):
        return (
            "it is prepared for quantization-aware training, whose conversion would quantize the raw weight. "
            "Standardize and fold (fold_weight_standardization) before preparing"
        )
    for parametrization in parametrizations_of(conv):
        function = _CONFLICTING_PARAMETRIZATIONS.get(type(parametrization).__name__)
        if function is not None:
            return (
                f"its weight is under torch.nn.utils.parametrizations.{function}, whose effect standardization would "
                "undo. Remove it first (torch.nn.utils.parametrize.remove_parametrizations)"
            )
    if parametrize.is_parametrized(conv, "weight"):
        return _complaint_about(raw_weight(conv))
    weight = conv._parameters.get("weight")
    if weight is None:
        return (
            "its weight is not a parameter but computed by a hook, as pruning and the old-style weight_norm and "
            "spectral_norm of torch.nn.utils do. Remove that first (prune.remove, remove_weight_norm, "
            "remove_spectral_norm)"
        )
    if is_lazy(weight):
        return "it is lazy and has no weight yet. Run one batch through the model first"
    return _complaint_about(weight)


def _complaint_about(weight: Any) -> str | None:
    try:
        check_weight(weight)
    except ValueError as error:
        return str(error).rstrip(".")
    return None
