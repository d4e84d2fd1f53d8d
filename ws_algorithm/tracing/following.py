"""What can be read from the operations of one forward: where convolutions run, and what follows them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ws_algorithm.layers import (
    CONVOLVING_FUNCTIONS,
    FIRST_ARGUMENT_FUNCTIONS,
    NORMALIZING_FUNCTIONS,
    TRANSPARENT_FUNCTIONS,
    is_convolution,
    is_normalization,
    is_transparent,
)
from ws_algorithm.tracing.recorder import INPUT, OUTPUT, WEIGHT, Operation, Run


@dataclass(frozen=True)
class Follower:
    """What the output of a convolution meets first: a norm, or the end of what was seen, or neither."""

    norm: nn.Module | str | None = None  # a layer, or the name of a function
    leaves: bool = False  # the output is still to be used when the run ends
    hidden: bool = False  # it enters a layer that cannot be looked into


class Reading:
    """One run, read for its convolutions.

    Attributes:
        calls: Where each convolution is used, in the order of last use.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._users: list[list[int]] = [[] for _ in run]
        for position, operation in enumerate(run):
            for source in operation.inputs:
                self._users[source].append(position)
        self._weight_of: list[nn.Module | None] = []
        self.calls: dict[nn.Module, list[int]] = {}
        self.weights_read = {operation.layer for operation in run if operation.name == WEIGHT}
        for position in range(len(run)):
            conv = self._convolution(position)
            self._weight_of.append(self._owner_of_weight(position) if conv is None else None)
            if conv is not None:
                self.calls[conv] = [*self.calls.pop(conv, []), position]
        self._followers = self._find_followers()
        self.weights_used_otherwise = self._find_other_uses()

    def followers_of(self, conv: nn.Module) -> list[Follower]:
        """What follows each use of a convolution."""
        return [self._followers[position] for position in self.calls[conv]]

    def begins_with_norm(self) -> bool:
        """Whether an input reaches a norm before anything else happens to it."""
        inputs = [position for position, operation in enumerate(self._run) if operation.name == INPUT]
        return any(self._followers[position].norm is not None for position in inputs)

    def called_layers(self) -> set[nn.Module]:
        """The layers that are called, and their parts."""
        called = {operation.layer for operation in self._run if operation.name != WEIGHT}
        return {part for layer in called if layer is not None for part in layer.modules()}

    def _convolution(self, position: int) -> nn.Module | None:
        """The convolution that an operation computes, as a layer or as a function of its weight."""
        operation = self._run[position]
        if operation.layer is not None:
            is_call = operation.name != WEIGHT and is_convolution(operation.layer)
            return operation.layer if is_call else None
        if operation.name not in CONVOLVING_FUNCTIONS:
            return None
        others = [source for source in operation.inputs if source != operation.first]
        return next(filter(None, (self._weight_of[source] for source in others)), None)

    def _owner_of_weight(self, position: int) -> nn.Module | None:
        """The convolution from whose weight, and perhaps from other values, an operation computes another weight."""
        operation = self._run[position]
        if operation.name == WEIGHT:
            return operation.layer
        owners = [self._weight_of[source] for source in operation.inputs]
        if operation.layer is not None and None in owners:
            return None
        return next(filter(None, owners), None)

    def _find_other_uses(self) -> set[nn.Module]:
        """Convolutions from whose weights something else is computed than the weight of a convolution."""
        ends = (position for position, owner in enumerate(self._weight_of) if owner and not self._users[position])
        reaching_output = (source for operation in self._run if operation.name == OUTPUT for source in operation.inputs)
        return {owner for position in (*ends, *reaching_output) if (owner := self._weight_of[position]) is not None}

    def _find_followers(self) -> list[Follower]:
        """For each operation, the first norm that its result reaches through others that only move or add it."""
        followers = [Follower()] * len(self._run)
        for position in reversed(range(len(self._run))):
            users = self._users[position]
            found = [self._follower_through(user, position, followers) for user in users]
            direct = [_norm(self._run[user]) for user, follower in zip(users, found, strict=True) if follower.norm]
            norms = [norm for norm in direct if norm is not None] or [f.norm for f in found if f.norm is not None]
            leaves = not users or any(follower.leaves for follower in found)  # unused: kept somewhere, for all we know
            followers[position] = Follower(norms[0] if norms else None, leaves, any(f.hidden for f in found))
        return followers

    def _follower_through(self, user: int, source: int, followers: list[Follower]) -> Follower:
        """What follows the result of `source` where `user` takes it."""
        operation = self._run[user]
        norm = _norm(operation)
        if norm is not None:  # unless it is the scale or shift of the norm
            return Follower(norm if operation.first == source else None)
        if operation.name == OUTPUT:
            return Follower(leaves=True)
        if isinstance(operation.layer, torch.jit.ScriptModule):
            return Follower(hidden=True)
        return followers[user] if _lets_through(operation, source) else Follower()


def _norm(operation: Operation) -> nn.Module | str | None:
    if operation.layer is not None:
        return operation.layer if is_normalization(operation.layer) else None
    return operation.name if operation.name in NORMALIZING_FUNCTIONS else None


def _lets_through(operation: Operation, source: int) -> bool:
    if operation.layer is not None:
        return operation.name != WEIGHT and is_transparent(operation.layer)
    plain = operation.name
    if plain.endswith("_") and not plain.endswith("__"):  # the same in place
        plain = plain.removesuffix("_")
    if operation.name == "copy_":  # over what was there
        return operation.first != source
    if plain in FIRST_ARGUMENT_FUNCTIONS:
        return operation.first == source
    return plain in TRANSPARENT_FUNCTIONS
