"""The operations of one forward, and the recording of calls of layers on a copy of a model."""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ws_algorithm.layers import is_convolution, is_elementary
from ws_algorithm.tracing.shadow import shadow_of

INPUT, WEIGHT, OUTPUT = "(input)", "(weight)", "(output)"

_IN_PLACE_OPERATOR = re.compile(r"__i(add|sub|mul|matmul|truediv|floordiv|div|mod|pow|and|or|xor|lshift|rshift)__")


@dataclass(frozen=True)
class Operation:
    """One step of a forward.

    Args:
        name: The name of the function; ``INPUT``, ``OUTPUT``, or ``WEIGHT`` for the weight of a convolution that is
            read outside of it.
        layer: The layer that was called, or whose weight was read; ``None`` for a function.
        inputs: The positions of the operations whose results it takes.
        first: That of the first tensor that it is given, if an operation made it.
    """

    name: str
    layer: nn.Module | None
    inputs: tuple[int, ...]
    first: int | None = None


Run = Sequence[Operation]


class Recorder(TorchFunctionMode, ABC):
    """Lets a copy of a model run and writes down its operations.

    While this mode is on, and only in its thread, functions of torch pass through ``called_function`` of a subclass,
    and layers of the copy through its ``call_layer``. Hooks, those for all modules included, are passed by.

    Args:
        module: The model; a copy of it runs, with ``data`` or without.
        training: Whether the copy runs as in training.
    """

    def __init__(self, module: nn.Module, *, training: bool, data: bool) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.shadow, self._originals = shadow_of(module, data=data)
        self.shadow.train(training)
        self.forward: Callable[..., Any] = lambda *args, **kwargs: None
        self._owners = {id(weight): conv for conv in self._originals for weight in _weights_of(conv)}
        self._strangers = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._weights: dict[int, int] = {}
        self._elementary = {part for part in self._originals if "forward" not in vars(part) and is_elementary(part)}
        for part in self._originals:
            # A compiled module runs the one it was made of
            forward = getattr(part, "_orig_mod", None) or part.forward
            if part is self.shadow:
                self.forward = forward
            vars(part)["forward"] = vars(part)["_compiled_call_impl"] = functools.partial(self._called, part, forward)

    def release(self) -> None:
        """Let go of the copy, whose layers refer to this."""
        for part in self._originals:
            vars(part).pop("forward", None)
            vars(part).pop("_compiled_call_impl", None)
        self._originals, self._elementary = {}, set()
        self.forward = lambda *args, **kwargs: None
        self.shadow = nn.Module()

    @abstractmethod
    def called_function(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Answer a call of a function of torch, in forward or in a layer that is not elementary."""

    @abstractmethod
    def call_layer(self, part: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Answer a call of an elementary layer, whose own `forward` this is."""

    @abstractmethod
    def position_of(self, value: Any) -> int | None:
        """The operation that made a value, if it is one of those that are followed."""

    def add(self, name: str, args: Any, kwargs: Any = None, part: nn.Module | None = None) -> int:
        """Write an operation down, with all that it was given, and return its position."""
        leaves = tree_leaves((args, kwargs or {}))
        self._check_own(leaves)
        positions = [self._position_or_weight(value) for value in leaves]
        inputs = tuple(dict.fromkeys(position for position in positions if position is not None))
        if name == "__setitem__" and any(self.position_of(value) is not None for value in tree_leaves(args[1])):
            name = "__setitem__ where"  # a mask chooses: no mere change of place
        layer = None if part is None else self._originals[part]
        self.operations.append(Operation(name, layer, inputs, positions[0] if positions else None))
        return len(self.operations) - 1

    def is_weight(self, value: Any) -> bool:
        """Whether a value is the weight of a convolution of the copy."""
        return isinstance(value, Tensor) and id(value) in self._owners

    def _check_own(self, values: list[Any]) -> None:
        if any(isinstance(value, Tensor) and id(value) in self._strangers for value in values):
            raise RuntimeError("forward reaches the model itself from its copy, through a function that refers to it")

    def _called(self, part: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if part in self._elementary:
            return self.call_layer(part, forward, args, kwargs)
        before = len(self.operations)
        result = forward(*args, **kwargs)
        if is_convolution(part) and not self._weight_is_used(part, before):
            self.add(type(part).__name__, args, kwargs, part)  # it runs, in a way that is not seen
        return result

    def _weight_is_used(self, conv: nn.Module, since: int) -> bool:
        positions = {position for key, position in self._weights.items() if self._owners[key] is conv}
        return any(positions & set(operation.inputs) for operation in self.operations[since:])

    def _position_or_weight(self, value: Any) -> int | None:
        position = self.position_of(value)
        if position is not None or not self.is_weight(value):
            return position
        if id(value) not in self._weights:
            self.operations.append(Operation(WEIGHT, self._originals[self._owners[id(value)]], ()))
            self._weights[id(value)] = len(self.operations) - 1
        return self._weights[id(value)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.called_function(func, args, kwargs or {})


def changed_in_place(name: str, args: Any, kwargs: Any, part: nn.Module | None = None) -> Any:
    """The argument that an operation changes; ``None`` if none."""
    if kwargs.get("out") is not None:
        return kwargs["out"]
    named_so = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__")
    if named_so or _IN_PLACE_OPERATOR.fullmatch(name) or kwargs.get("inplace") in (True, 1) or _has_flag(part):
        return args[0] if args else None
    return None


def _has_flag(part: nn.Module | None) -> bool:
    return getattr(part, "inplace", False) in (True, 1)


def _weights_of(conv: nn.Module) -> Iterator[Tensor]:
    """All that makes up the weight of a convolution, whatever has split it in parts."""
    if is_convolution(conv):
        for name, parameter in conv.named_parameters():
            if name.partition(".")[0].startswith("weight") or name.startswith("parametrizations.weight."):
                yield parameter
