"""In which order the convolutions of a model run, and which norm follows each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ws_algorithm.layers import is_convolution, is_normalization
from ws_algorithm.tracing.following import Follower, Reading
from ws_algorithm.tracing.observation import observed_runs
from ws_algorithm.tracing.shadow import undisturbed
from ws_algorithm.tracing.symbolic import symbolic_runs

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
    """

    places: dict[nn.Module, Place]
    failure: str | None


def execution_of(module: nn.Module, example_input: Any = None) -> Execution:
    """Find out how a model uses its convolutions, without changing it.

    Its forward is run with symbols. If that fails, it is run with the example input, if one is given; otherwise its
    children are tried, and their children.

    Raises:
        ValueError: If forward does not accept the example input, and it is needed.
    """
    with undisturbed():
        parts, failure = _traced_parts(module)
        if failure is not None and example_input is not None:
            return _of_whole(_part(module, [Reading(run) for run in observed_runs(module, example_input)]), "observed")
    if failure is None:
        return _of_whole(parts[0], "traced")
    return _of_parts(module, parts, failure)


@dataclass(frozen=True)
class _Part:
    """A module whose forward was seen in all its ways, and its convolutions in the order of last use."""

    module: nn.Module
    ways: list[Reading]
    order: list[nn.Module]

    def followers_of(self, conv: nn.Module) -> list[Follower]:
        return [follower for way in self.ways if conv in way.calls for follower in way.followers_of(conv)]


def _part(module: nn.Module, ways: list[Reading]) -> _Part:
    return _Part(module, ways, _common_order(ways))


def _common_order(ways: list[Reading]) -> list[nn.Module]:
    """The order that holds in all ways through a forward.

    Raises:
        RuntimeError: If there is none.
    """
    order = list(max(ways, key=lambda way: len(way.calls)).calls)
    for way in ways:
        if [conv for conv in order if conv in way.calls] != [conv for conv in way.calls if conv in order]:
            raise RuntimeError("the order of its convolutions depends on the values of its input")
        index = 0
        for conv in way.calls:
            if conv not in order:
                order.insert(index, conv)
            index = order.index(conv) + 1
    return order


def _traced_parts(module: nn.Module) -> tuple[list[_Part], str | None]:
    """The module itself if its forward can be traced, else those of its parts that can be; and what went wrong."""
    try:
        part = _part(module, [Reading(run) for run in symbolic_runs(module)])
        if part.order:
            return [part], None
        failure = f"the forward of {type(module).__name__} uses no convolution when run with symbols"
    except Exception as error:  # whatever the user's forward raises when given symbols
        failure = f"{type(error).__name__}: {error}".split("\n")[0]
    children = [child for child in module.children() if any(map(is_convolution, child.modules()))]
    return [part for child in children for part in _traced_parts(child)[0]], failure


def _of_whole(part: _Part, found: Found) -> Execution:
    """Nothing follows the output of the whole."""
    places = {conv: Place(found, norm=_norm_after(part.followers_of(conv))) for conv in part.order}
    return _with_unused(part.module, places, Place(found, executed=False), None)


def _of_parts(module: nn.Module, parts: list[_Part], failure: str) -> Execution:
    """What follows the output of a part is not known, unless no norm is left that could."""
    norm_is_left = _norm_is_left(module, parts)
    places: dict[nn.Module, Place] = {}
    for part in parts:
        found: Found = "traced" if len(parts) == 1 else "defined" if is_convolution(part.module) else "traced in parts"
        for conv in part.order:
            followers = part.followers_of(conv)
            norm = _norm_after(followers)
            lost = norm is None and all(follower.norm or follower.leaves for follower in followers)
            places.pop(conv, None)
            places[conv] = Place(found, norm, undecided=lost and norm_is_left)
    in_doubt = failure if len(parts) != 1 else None
    return _with_unused(module, places, Place("defined", undecided=True, executed=False), in_doubt)


def _with_unused(module: nn.Module, places: dict[nn.Module, Place], unused: Place, failure: str | None) -> Execution:
    convolutions = [layer for layer in module.modules() if is_convolution(layer)]
    return Execution({conv: unused for conv in convolutions if conv not in places} | places, failure)


def _norm_after(followers: list[Follower]) -> nn.Module | str | None:
    """The norm after a convolution, if there is one after each of its uses."""
    return followers[0].norm if all(follower.norm is not None for follower in followers) else None


def _norm_is_left(module: nn.Module, parts: list[_Part]) -> bool:
    """Whether a model has a norm that an output of one of its parts may reach."""
    ways = [way for part in parts for way in part.ways]
    called = {layer for way in ways for layer in way.called_layers()}
    uncalled = (layer for layer in module.modules() if is_normalization(layer) and layer not in called)
    return any(way.begins_with_norm() for way in ways) or next(uncalled, None) is not None
