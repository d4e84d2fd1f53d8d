"""A run of a forward with a real input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ws_algorithm.layers import is_convolution
from ws_algorithm.tracing.following import Reading
from ws_algorithm.tracing.recorder import INPUT, OUTPUT, Recorder, Run, name_of


def observed_runs(module: nn.Module, example_input: Any) -> list[Run]:
    """What a copy of a model does with an input, in evaluation and, if that leaves convolutions out, in training.

    Args:
        module: The model; not changed. The copy is where the model is, on the device of its parameters.
        example_input: A tuple of positional arguments, or the only argument. It is kept while the copy runs, and so are
            all activations.

    Raises:
        ValueError: If forward does not accept the input in evaluation.
    """
    convolutions = {part for part in module.modules() if is_convolution(part)}
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    evaluation = _Observation(module, training=False)
    try:
        evaluation.go(args)
    except Exception as error:
        raise ValueError(
            f"`example_input` does not fit {type(module).__name__}: forward raised {type(error).__name__}: {error}. "
            "Give the only argument of forward, or a tuple of all positional ones."
        ) from error
    if convolutions <= Reading(evaluation.operations).calls.keys():
        return [evaluation.operations]
    training = _Observation(module, training=True)
    try:
        training.go(args)
    except Exception:  # a forward that needs targets in training, or more than one image
        return [evaluation.operations]
    return [evaluation.operations, training.operations]


class _Observation(Recorder):
    """One run with tensors, which are told apart by identity."""

    def __init__(self, module: nn.Module, training: bool) -> None:
        super().__init__(module, training=training, data=True)
        self._positions: dict[int, int] = {}
        self._kept: list[Any] = []  # or another tensor could take the identity of one that is gone
        self._inside_layer = False

    def go(self, args: tuple[Any, ...]) -> None:
        self._note(args, self.add(INPUT, ()))
        with self:
            output = self.shadow(*args)
        self.add(OUTPUT, output)

    def call_layer(self, part: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        if self._inside_layer:
            return forward(*args, **kwargs)
        self._inside_layer = True
        try:
            result = forward(*args, **kwargs)
        finally:
            self._inside_layer = False
        self._note(result, self.add(type(part).__name__, (args, kwargs), part))
        return result

    def position_of(self, value: Any) -> int | None:
        return self._positions.get(id(value)) if isinstance(value, Tensor) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._inside_layer and any(isinstance(value, Tensor) for value in tree_leaves(result)):
            self._note(result, self.add(name_of(func), (args, kwargs)))
        elif name_of(func) == "__setitem__" and not self._inside_layer:
            self._note(args[0], self.add("__setitem__", (args, kwargs)))
        return result

    def _note(self, result: Any, position: int) -> None:
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._positions[id(value)] = position
                self._kept.append(value)
