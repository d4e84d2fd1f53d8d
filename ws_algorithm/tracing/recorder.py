"""The operations of one forward, and the recording of calls of layers on a copy of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ws_algorithm.layers import is_convolution, is_elementary
from ws_algorithm.tracing.shadow import shadow_of

INPUT, WEIGHT, OUTPUT = "(input)", "(weight)", "(output)"


@dataclass(frozen=True)
class Operation:
    """One step of a forward.

    Args:
        name: The name of the function; ``INPUT``, ``OUTPUT``, or ``WEIGHT`` for the weight of a convolution that is
            read outside of it.
        layer: The layer that was called, or whose weight was read; ``None`` for a function.
        inputs: The positions of the operations whose results it takes.
    """

    name: str
    layer: nn.Module | None
    inputs: tuple[int, ...]


Run = Sequence[Operation]


class Recorder(TorchFunctionMode):
    """Lets a copy of a model run and writes down its operations.

    While this mode is on, and only in its thread, functions of torch pass through ``__torch_function__`` of a subclass,
    and layers of the copy through its ``call_layer``.

    Args:
        module: The model; a copy of it runs, with ``data`` or without.
        training: Whether the copy runs as in training.
    """

    def __init__(self, module: nn.Module, *, training: bool, data: bool) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.shadow, self._originals = shadow_of(module, data=data)
        self.shadow.train(training)
        convolutions = [part for part in self.shadow.modules() if is_convolution(part)]
        self._owners = {id(weight): conv for conv in convolutions for weight in conv.parameters()}
        self._weights: dict[int, int] = {}
        for part in self._originals:
            # A compiled module runs the one it was made of
            forward = getattr(part, "_orig_mod", None) or part.forward
            vars(part)["forward"] = functools.partial(self._called, part, forward)

    def _called(self, part: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not is_elementary(part):
            return forward(*args, **kwargs)
        return self.call_layer(part, forward, args, kwargs)

    def call_layer(self, part: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        raise NotImplementedError

    def position_of(self, value: Any) -> int | None:
        """The operation that made a value, if it is one of those that are followed."""
        raise NotImplementedError

    def add(self, name: str, values: Any, part: nn.Module | None = None) -> int:
        """Write an operation down, with all that it was given, and return its position."""
        layer = None if part is None else self._originals[part]
        positions = [self._position_or_weight(value) for value in tree_leaves(values)]
        inputs = dict.fromkeys(position for position in positions if position is not None)
        self.operations.append(Operation(name, layer, tuple(inputs)))
        return len(self.operations) - 1

    def _position_or_weight(self, value: Any) -> int | None:
        position = self.position_of(value)
        if position is not None or not self.is_weight(value):
            return position
        if id(value) not in self._weights:
            self.operations.append(Operation(WEIGHT, self._originals[self._owners[id(value)]], ()))
            self._weights[id(value)] = len(self.operations) - 1
        return self._weights[id(value)]

    def is_weight(self, value: Any) -> bool:
        """Whether a value is a parameter of a convolution of the copy."""
        return isinstance(value, torch.Tensor) and id(value) in self._owners


def name_of(function: Any) -> str:
    """The name of a function, method or property of torch."""
    name = getattr(function, "__name__", type(function).__name__)
    if name == "__get__":  # of a property
        return getattr(getattr(function, "__self__", None), "__name__", name)
    return name
