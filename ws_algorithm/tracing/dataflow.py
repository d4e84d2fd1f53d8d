"""The operations of one forward, and what can be read from them: where convolutions run, and what follows them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ws_algorithm.layers import (
    CONVOLVING_FUNCTIONS,
    DESCRIBING_FUNCTIONS,
    FIRST_ARGUMENT_FUNCTIONS,
    changed_in_place,
    is_convolution,
    is_norm_operation,
    lets_through,
)

INPUT, WEIGHT, OUTPUT = "(input)", "(weight)", "(output)"


def name_of(function: Any) -> str:
    """Return the name of a function, operator, method or property of torch; that of a method may be given itself."""
    if isinstance(function, str):
        return function
    if getattr(function, "__name__", "") == "__get__":  # of a property
        function = getattr(function, "__self__", function)
    return getattr(function, "__name__", "").partition(".")[0]  # of ``aten.conv2d.default`` too


@dataclass(frozen=True)
class Operation:
    """One step of a forward."""

    name: str  # of the function; ``WEIGHT`` if the weight of a convolution is read outside of it
    layer: nn.Module | None  # that was called, or whose weight was read
    inputs: tuple[int, ...] = ()  # the positions of the operations whose results it takes
    first: int | None = None  # that of its first argument, if an operation made it
    hidden: bool = False  # whether it is not known what happens inside

    @property
    def norm(self) -> nn.Module | str | None:
        """The norm that it is: a layer, or the name of a function."""
        return (self.layer or self.name) if not self.hidden and is_norm_operation(self.name, self.layer) else None


class Recorder(ABC):
    """Writes down the operations of a forward. What shares memory is the result of the last that wrote or viewed it."""

    def __init__(self) -> None:
        self.run: list[Operation] = []
        self.positions: dict[Hashable, int] = {}  # by memory

    @abstractmethod
    def memory_of(self, value: Any) -> Hashable | None:
        """Return what identifies the memory of a value; ``None`` of one that no operation may have made."""

    def add(
        self, name: str, layer: nn.Module | None, args: Any, kwargs: Any, result: Any, hidden: bool = False
    ) -> None:
        """Write an operation down, with what it is given and what it returns."""
        hidden = hidden or isinstance(layer, torch.jit.ScriptModule)
        given = {key: value for key, value in kwargs.items() if key != "out"}  # what was there is written over
        memories = [self.memory_of(value) for value in tree_leaves((args, given))]
        if name == "__setitem__" and any(self.memory_of(value) is not None for value in tree_leaves(args[1])):
            name = "__setitem__ where"  # a mask chooses: no mere change of place
        sources = [self.positions.get(memory) for memory in memories]
        used = sources if name not in DESCRIBING_FUNCTIONS else []
        inputs = tuple(dict.fromkeys(source for source in used if source is not None))
        self.run.append(Operation(name, layer, inputs, sources[0] if sources else None, hidden))
        changed = (args, kwargs) if hidden else changed_in_place(name, layer, args, kwargs)
        for value in tree_leaves((changed, result)):
            self.positions[self.memory_of(value)] = len(self.run) - 1
        self.positions.pop(None, None)


@dataclass(frozen=True)
class Follower:
    """What the output of a convolution meets first: a norm, or the end of what was seen, or neither."""

    norm: nn.Module | str | None = None  # a layer, or the name of a function
    leaves: bool = False  # the output is still to be used when the run ends
    hidden: bool = False  # it enters something that cannot be looked into


class Dataflow:
    """The operations of one forward, read for its convolutions.

    Attributes:
        hidden: The layers of whose inside nothing is known.
        calls: The positions at which each convolution is used, in the order of last use.
        weights_used_otherwise: The convolutions from whose weight something else is computed than a weight.
    """

    def __init__(self, run: Sequence[Operation]) -> None:
        self.run = run
        self.hidden = {operation.layer: None for operation in run if operation.hidden and operation.layer is not None}
        self._users: list[list[int]] = [[] for _ in run]
        self._weight_of: list[nn.Module | None] = []
        self.calls: dict[nn.Module, list[int]] = {}
        self.weights_used_otherwise: set[nn.Module | None] = set()
        for position, operation in enumerate(run):
            for source in operation.inputs:
                self._users[source].append(position)
            conv = self._convolution(operation)
            self._weight_of.append(self._owner_of_weight(operation) if conv is None else None)
            if conv is not None:
                self.calls[conv] = calls = self.calls.pop(conv, [])
                calls.append(position)
        for operation, owner, users in zip(run, self._weight_of, self._users, strict=True):
            if any(run[user].name == OUTPUT for user in users) or (not users and operation.name != WEIGHT):
                self.weights_used_otherwise.add(owner)
        self._followers = self._find_followers()

    def followers_of(self, conv: nn.Module) -> list[Follower]:
        """Return what follows each use of a convolution."""
        return [self._followers[position] for position in self.calls[conv]]

    def _convolution(self, operation: Operation) -> nn.Module | None:
        """The convolution that an operation computes, as a layer or as a function of its weight."""
        if operation.layer is not None:
            return operation.layer if operation.name != WEIGHT and is_convolution(operation.layer) else None
        if operation.name not in CONVOLVING_FUNCTIONS:
            return None
        return next(filter(None, (self._weight_of[source] for source in operation.inputs)), None)

    def _owner_of_weight(self, operation: Operation) -> nn.Module | None:
        """The convolution from whose weight, and perhaps from other values, an operation computes another weight."""
        if operation.name == WEIGHT:
            return operation.layer
        is_lent = operation.name in FIRST_ARGUMENT_FUNCTIONS  # the type or shape of the others
        owners = [self._weight_of[source] for source in operation.inputs if not is_lent or source == operation.first]
        return None if operation.layer is not None and None in owners else next(filter(None, owners), None)

    def _find_followers(self) -> list[Follower]:
        """For each operation, the first norm that its result reaches through others that only move or add it."""
        followers = [Follower(hidden=operation.hidden) for operation in self.run]
        for position in (position for position in reversed(range(len(self.run))) if not self.run[position].hidden):
            users = self._users[position]
            found = [self._follower_through(user, position, followers) for user in users]
            direct = [self.run[user].norm for user, follower in zip(users, found, strict=True) if follower.norm]
            norms = [norm for norm in direct if norm is not None] or [f.norm for f in found if f.norm is not None]
            leaves = not users or any(follower.leaves for follower in found)  # unused: kept somewhere, for all we know
            followers[position] = Follower(norms[0] if norms else None, leaves, any(f.hidden for f in found))
        return followers

    def _follower_through(self, user: int, source: int, followers: list[Follower]) -> Follower:
        """What follows the result of `source` where `user` takes it."""
        operation, is_first = self.run[user], self.run[user].first == source
        if operation.norm is not None:  # unless it is the scale or shift of the norm
            return Follower(operation.norm if is_first else None)
        if operation.name == OUTPUT or operation.hidden:
            return Follower(leaves=operation.name == OUTPUT, hidden=operation.hidden)
        return followers[user] if lets_through(operation.name, operation.layer, is_first) else Follower()
