"""In which order the convolutions of a model run, and which norm follows each."""

from __future__ import annotations

import types
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from ws_algorithm.layers import NORMALIZING_FUNCTIONS, is_convolution, is_normalization
from ws_algorithm.tracing.following import Follower, Reading
from ws_algorithm.tracing.observation import observed_runs
from ws_algorithm.tracing.recorder import Run
from ws_algorithm.tracing.symbolic import symbolic_ways
from ws_algorithm.tracing.undisturbed import undisturbed

Found = Literal["traced", "observed", "traced in parts", "defined"]


@dataclass(frozen=True)
class Place:
    """Where a convolution stands in the forward of its model.

    Args:
        found: How its place in the order was found. ``traced``: from forward itself, run with symbols; ``observed``:
            from a run with an example input; ``traced in parts``: within a part of the model, and the parts are in the
            order of their definition; ``defined``: by the order of definition alone.
        norm: The norm that follows it wherever it is used, a layer or the name of a function; ``None`` for no norm.
        undecided: Whether a norm may follow that was not seen.
        executed: Whether forward uses it at all.
    """

    found: Found
    norm: nn.Module | str | None = None
    undecided: bool = False
    executed: bool = True


@dataclass(frozen=True)
class Execution:
    """The convolutions of a model in the order of last use; those that forward never uses come first.

    Args:
        places: What is known of each.
        failure: What kept forward as a whole from being traced; ``None`` if nothing did.
        doubt: What is uncertain about the order although forward was traced; ``None`` if nothing is.
    """

    places: dict[nn.Module, Place]
    failure: str | None = None
    doubt: str | None = None


def execution_of(module: nn.Module, example_input: Any = None) -> Execution:
    """Find out how a model uses its convolutions, without changing it.

    Its forward is run with the example input, if one is given, and otherwise with symbols. If that fails, its children
    are tried, and their children.

    Raises:
        ValueError: If forward does not accept the example input.
    """
    if not any(map(is_convolution, module.modules())):
        return Execution({})
    with undisturbed(module):
        if example_input is not None:
            return _of_whole(_observed(module, example_input), "observed")
        survey = _Survey()
        survey.add(module)
        return survey.execution_of(module)


@dataclass(frozen=True)
class _Part:
    """A module whose forward was seen in all its ways, and its convolutions in the order of last use."""

    module: nn.Module
    ways: list[Reading]
    order: list[nn.Module]
    complete: bool = True

    def verdict_on(self, conv: nn.Module, *, more_may_follow: bool) -> Place:
        """Whether a norm follows a convolution, in all ways in which it is used."""
        if any(conv in way.weights_used_otherwise for way in self.ways):
            return Place("traced", undecided=True)
        followers = [way.followers_of(conv) for way in self.ways if conv in way.calls]
        if all(follower.norm is not None for uses in followers for follower in uses):
            return Place("traced", norm=followers[0][0].norm)

        def is_none(follower: Follower) -> bool:
            return follower.norm is None and not follower.hidden and not (follower.leaves and more_may_follow)

        none = [any(map(is_none, uses)) for uses in followers]
        return Place("traced", undecided=not all(none))

    def verdict_on_unused(self, conv: nn.Module, found: Found) -> Place:
        """One that no way calls may be computed in a manner of its own, or be on a way that was not found."""
        if any(conv in way.weights_read for way in self.ways):
            return Place(found, undecided=True)
        return Place(found if self.complete else "defined", undecided=not self.complete, executed=False)

    def doubt_about_order(self, unused: Collection[nn.Module]) -> str | None:
        if unused and not self.complete:
            return "some ways through forward could not be followed to their end; what no other uses is counted first"
        for earlier, later in pairwise(self.order):
            if not any(earlier in way.calls and later in way.calls for way in self.ways):
                return "with some inputs, some convolutions run in the place of others"
        return None


def _part(module: nn.Module, runs: list[Run], complete: bool = True) -> _Part:
    ways = [Reading(run) for run in runs]
    return _Part(module, ways, _common_order(ways), complete)


def _observed(module: nn.Module, example_input: Any) -> _Part:
    runs = observed_runs(module, example_input)
    try:
        return _part(module, runs)
    except RuntimeError:  # training goes another way; what counts is what the input does in evaluation
        return _part(module, runs[:1])


def _common_order(ways: list[Reading]) -> list[nn.Module]:
    """The order that holds in all ways through a forward.

    Raises:
        RuntimeError: If there is none.
    """
    order = list(max(ways, key=lambda way: len(way.calls)).calls)
    for way in ways:
        if [conv for conv in order if conv in way.calls] != [conv for conv in way.calls if conv in order]:
            raise RuntimeError("the order of its convolutions depends on its input or mode")
        index = 0
        for conv in way.calls:
            if conv not in order:
                order.insert(index, conv)
            index = order.index(conv) + 1
    return order


class _Survey:
    """A model and, where its forward cannot be traced, those of its parts that can be."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.untraced: list[nn.Module] = []
        self.failure: str | None = None

    def add(self, module: nn.Module) -> None:
        try:
            ways = symbolic_ways(module)
            part = _part(module, ways.runs, ways.complete)
            if part.order:
                self.parts.append(part)
                return
            failure = f"the forward of {type(module).__name__} uses no convolution when run with symbols"
        except Exception as error:  # whatever the user's forward raises when given symbols
            failure = f"{type(error).__name__}: {error}".split("\n")[0]
        self.failure = self.failure or failure
        self.untraced.append(module)
        for child in module.children():
            if any(map(is_convolution, child.modules())):
                self.add(child)

    def execution_of(self, module: nn.Module) -> Execution:
        if self.failure is None:
            return _of_whole(self.parts[0], "traced")
        return _of_parts(module, self)

    def norm_is_left(self, module: nn.Module) -> bool:
        """Whether a model has a norm that an output of one of its parts may reach."""
        ways = [way for part in self.parts for way in part.ways]
        called = {layer for way in ways for layer in way.called_layers()}
        uncalled = (layer for layer in module.modules() if is_normalization(layer) and layer not in called)
        return (
            any(way.begins_with_norm() for way in ways)
            or next(uncalled, None) is not None
            or any(map(_names_a_norm, self.untraced))
        )


def _of_whole(part: _Part, found: Found) -> Execution:
    """Nothing follows the output of the whole."""
    places = {conv: replace(part.verdict_on(conv, more_may_follow=False), found=found) for conv in part.order}
    rest = {conv: part.verdict_on_unused(conv, found) for conv in _convolutions(part.module) if conv not in places}
    return Execution(rest | places, doubt=part.doubt_about_order(rest))


def _of_parts(module: nn.Module, survey: _Survey) -> Execution:
    """What follows the output of a part is not known, unless no norm is left that could."""
    more_may_follow = survey.norm_is_left(module)
    alone = len(survey.parts) == 1
    places: dict[nn.Module, Place] = {}
    for part in survey.parts:
        found: Found = "traced" if alone else "defined" if is_convolution(part.module) else "traced in parts"
        for conv in part.order:
            verdict = replace(part.verdict_on(conv, more_may_follow=more_may_follow), found=found)
            places[conv] = _both(places.pop(conv), verdict) if conv in places else verdict
    unused = Place("defined", undecided=True, executed=False)
    rest = {conv: unused for conv in _convolutions(module) if conv not in places}
    if alone and not rest:
        return Execution(places, doubt=survey.parts[0].doubt_about_order(rest))
    return Execution(rest | places, failure=survey.failure)


def _convolutions(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if is_convolution(layer)]


def _both(earlier: Place, later: Place) -> Place:
    """The verdict on a convolution that two parts use, at the place of the later one."""
    if earlier.norm is not None or (earlier.undecided and later.norm is None and not later.undecided):
        return later
    return replace(earlier, found=later.found)


def _names_a_norm(module: nn.Module) -> bool:
    """Whether the code of a module, or a function that it names, names one of torch's normalizing functions.

    Code that looks functions up by name may name any.
    """
    classes = [cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.nn")]
    functions = [f for holder in (module, *classes) for value in vars(holder).values() for f in _functions_of(value)]
    for function in functions:  # grows meanwhile
        names = _names_in(function.__code__)
        if names & (NORMALIZING_FUNCTIONS | {"getattr"}):
            return True
        named = (function.__globals__.get(name) for name in names)
        functions += dict.fromkeys(f for value in named for f in _functions_of(value) if f not in functions)
    return False


def _functions_of(value: Any) -> list[types.FunctionType]:
    """The function behind a value, unless it is torch's."""
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value)
    is_users = isinstance(value, types.FunctionType) and not (value.__module__ or "").startswith("torch.")
    return [value] if is_users else []


def _names_in(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))
