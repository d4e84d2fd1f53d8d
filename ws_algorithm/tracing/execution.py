"""In which order the convolutions of a model run, and which norm follows each."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn

from ws_algorithm.layers import has_forward_of_torch, is_convolution
from ws_algorithm.tracing.dataflow import Dataflow, Follower, Operation
from ws_algorithm.tracing.graph import traced_forward
from ws_algorithm.tracing.observed_run import observed_runs
from ws_algorithm.tracing.random_states import random_states_restored

# From the forward that calls it; from a run with an example input; within a part of the model, the parts being in the
# order of their definition; by the order of definition alone
Found = Literal["traced", "observed", "traced in parts", "defined"]


@dataclass(frozen=True)
class Place:
    """Where a convolution stands in the forward of its model."""

    found: Found  # how that was found
    norm: nn.Module | str | None = None  # that follows wherever it is used: a layer, or the name of a function
    undecided: bool = False  # whether a norm may follow that was not seen
    executed: bool = True  # whether forward uses it at all
    assumed: bool = False  # whether that is only assumed, since it is inside of something that cannot be traced


@dataclass(frozen=True)
class Execution:
    """The convolutions of a model in the order of last use; those that forward never uses come first."""

    places: dict[nn.Module, Place]
    untraced: tuple[str, ...] = ()  # in words, the modules whose forward cannot be traced, and why
    in_one_mode: tuple[str, ...] = ()  # the same of those that can be traced in one mode, but not in the other
    failure: str | None = None  # what of ``untraced`` puts the order in doubt
    doubt: str | None = None  # what else puts it in doubt


def execution_of(module: nn.Module, example_input: Any = None) -> Execution:
    """Find out how a model uses its convolutions, without changing it.

    Its forward is run with the example input, if one is given, and otherwise traced, in evaluation and in training.
    What cannot be traced is traced by its children, and by theirs.

    Raises:
        ValueError: If forward does not accept the example input.
    """
    survey = _Survey(module)
    with random_states_restored(module), torch.no_grad():
        if example_input is None:
            return survey.execution(survey.places_in(module))
        flows = [Dataflow(run) for run in observed_runs(module, example_input)]
        return survey.execution(survey.places_from(module, flows, "observed"))


class _Survey:
    """What is found out about a model and, where its forward cannot be traced, about parts of it."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {part: name for name, part in model.named_modules()}
        self._untraced: dict[nn.Module, dict[str, str]] = {}  # why, by mode
        self._by_children: set[nn.Module] = set()  # those of them that are known by their children only
        self._failures: list[nn.Module] = []  # and among these, the ones with several, in the order of their definition
        self._doubt: str | None = None

    def execution(self, places: dict[nn.Module, Place]) -> Execution:
        """Return these places and what is not known."""
        places = dict(sorted(places.items(), key=lambda item: item[1].executed))
        one_mode = [part for part, why in self._untraced.items() if len(why) == 1]
        untraced = {part: self._sentence(part) for part in self._untraced if part not in one_mode}
        failure = next((untraced[part] for part in self._failures), None)
        return Execution(places, (*untraced.values(),), (*map(self._sentence, one_mode),), failure, self._doubt)

    def _sentence(self, part: nn.Module) -> str:
        name, (mode, *others) = self._names.get(part), self._untraced[part]
        subject = f"the forward of {type(part).__name__}{f' {name!r}' if name else ''}"
        return f"{subject} cannot be traced{'' if others else f' in {mode}'} ({self._untraced[part][mode]})"

    def places_in(self, module: nn.Module, more_may_follow: bool = False) -> dict[nn.Module, Place]:
        """Return the places of the convolutions of a module. More may follow its outputs if its caller is opaque."""
        modes = {mode: traced_forward(module, training=mode == "training") for mode in ("evaluation", "training")}
        flows = {mode: Dataflow(traced.run) for mode, traced in modes.items() if module not in traced.opaque}
        for mode, traced in modes.items():
            for part in flows[mode].hidden if mode in flows else [module]:
                if part in traced.opaque:
                    self._untraced.setdefault(part, {})[mode] = traced.opaque[part]
        if places := self.places_from(module, [*flows.values()], "traced", more_may_follow):
            return places
        if flows:
            self._untraced[module] = dict.fromkeys(modes, "it uses no convolution when it is traced")
        children = [*_children(module), *([module] if is_convolution(module) else [])]
        if len(children) > 1:
            self._failures.append(module)
        self._by_children.add(module)
        in_order_of_definition = Dataflow([Operation("", child, hidden=True) for child in children])
        return self.places_from(module, [in_order_of_definition], "defined" if len(children) > 1 else "traced", True)

    def places_from(
        self, module: nn.Module, flows: list[Dataflow], found: Found, more_may_follow: bool = False
    ) -> dict[nn.Module, Place]:
        """Return them as they are read from runs of its forward."""
        used = {conv for flow in flows for conv in flow.calls} & self._names.keys()
        hidden = {part for flow in flows for part in flow.hidden if part is not module}
        certain = not (more_may_follow or hidden) and (found == "observed" or len(flows) == 2)
        always = {part for part in hidden if all(part in flow.hidden for flow in flows)}
        seen = {part: {part} if part in always else {part, *used} for part in module.modules() if part in hidden}
        places, inside = self._places_in_hidden(module, found, seen, always)
        order, doubt = _common_order([_sequence(flow, inside, used) for flow in flows])
        for conv in _convolutions(module) if order or certain else []:
            if conv in used:
                place = _verdict(flows, conv, found, more_may_follow)
                places[conv] = _both(place, places.get(conv, place))
            elif conv not in places:
                place = _verdict(flows, conv, found)
                places[conv] = place if certain else replace(place, found="defined", undecided=True)
                doubt = doubt if certain else "not all of forward was seen, and what is not seen to be used comes first"
        self._doubt = self._doubt or doubt
        return {conv: places[conv] for conv in (*(conv for conv in places if conv not in order), *order)}

    def _places_in_hidden(
        self, module: nn.Module, found: Found, seen: dict[nn.Module, set[nn.Module]], always: set[nn.Module]
    ) -> tuple[dict[nn.Module, Place], dict[nn.Module | None, list[nn.Module]]]:
        """The convolutions in hidden modules that are not seen to be used; and by module, those that run, in order."""
        places: dict[nn.Module, Place] = {}
        inside: dict[nn.Module | None, list[nn.Module]] = {}
        for part in (part for part in seen if not seen[part].issuperset(_convolutions(part))):
            for conv, place in self.places_in(part, more_may_follow=True).items():
                if conv in seen[part]:
                    continue
                if found == "defined" and place.found == "traced":
                    place = replace(place, found="traced in parts")
                if module not in self._by_children and part in self._by_children:
                    place = replace(place, assumed=part in always)
                elif module not in self._by_children and part in always:  # alone it does something else than here
                    place = replace(place, norm=None, undecided=True)
                places[conv] = _both(places.get(conv, place), place)
                inside.setdefault(part, []).extend([conv] if place.executed else [])
        return places, inside


def _convolutions(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if is_convolution(layer)]


def _both(one: Place, other: Place) -> Place:
    """What is known of a convolution that is used in two ways."""
    return min(one, other, key=lambda place: (place.norm is not None, place.undecided))


def _children(module: nn.Module) -> list[nn.Module]:
    """The children that have convolutions; those of a mere container in its place."""
    found: list[nn.Module] = []
    for child in module.children():
        is_container = isinstance(child, (nn.ModuleList, nn.ModuleDict)) and has_forward_of_torch(child)
        found += _children(child) if is_container else [child] if _convolutions(child) else []
    return found


def _sequence(
    flow: Dataflow, inside: Mapping[nn.Module | None, list[nn.Module]], used: Container[nn.Module]
) -> list[nn.Module]:
    """The convolutions of one run by last use, with those inside of a hidden module where that module runs."""
    called = {position: [conv] for conv in flow.calls if conv in used for position in flow.calls[conv]}
    steps = ([*inside.get(step.layer, []), *called.get(position, [])] for position, step in enumerate(flow.run))
    backwards = dict.fromkeys(conv for convs in reversed(list(steps)) for conv in reversed(convs))
    return list(backwards)[::-1]


def _common_order(sequences: list[list[nn.Module]]) -> tuple[list[nn.Module], str | None]:
    """The order that holds in all runs of a forward, and what is in doubt about it."""
    sorter = TopologicalSorter[nn.Module]()
    for sequence in sequences:
        for earlier, conv in zip([None, *sequence], sequence, strict=False):
            sorter.add(conv, *([] if earlier is None else [earlier]))
    try:
        order = list(sorter.static_order())
    except CycleError:
        together = list(dict.fromkeys(conv for sequence in sequences for conv in sequence))
        return together, "the order of its convolutions depends on its mode"
    if any(not any(set(pair) <= used for used in map(set, sequences)) for pair in pairwise(order)):
        return order, "in one mode, some convolutions run in the place of others"
    return order, None


def _verdict(flows: list[Dataflow], conv: nn.Module, found: Found, more_may_follow: bool = False) -> Place:
    """Whether a norm follows a convolution, wherever a run uses it."""
    followers = [follower for flow in flows if conv in flow.calls for follower in flow.followers_of(conv)]
    if any(conv in flow.weights_used_otherwise for flow in flows):
        return Place(found, undecided=True)
    if not followers:
        return Place(found, executed=False)
    if all(follower.norm is not None for follower in followers):
        return Place(found, norm=followers[0].norm)

    def is_none(follower: Follower) -> bool:
        return follower.norm is None and not follower.hidden and not (follower.leaves and more_may_follow)

    return Place(found, undecided=not any(map(is_none, followers)))
