"""A run of a forward with a real input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ws_algorithm.tracing.recorder import INPUT, OUTPUT, Recorder, Run, changed_in_place
from ws_algorithm.tracing.symbol import name_of


def observed_runs(module: nn.Module, example_input: Any) -> list[Run]:
    """What a copy of a model does with an input in evaluation and, if forward accepts it there too, in training.

    Args:
        module: The model; not changed. The copy is where the model is, on the device of its parameters.
        example_input: A tuple of positional arguments, or the only argument. It is kept while the copy runs, and so are
            all activations.

    Raises:
        ValueError: If forward does not accept the input in evaluation.
    """
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    evaluation = _Observation(module, training=False)
    try:
        evaluation.go(args)
    except Exception as error:
        raise ValueError(
            f"`example_input` does not fit {type(module).__name__}: forward raised {type(error).__name__}: {error}. "
            "Give the only argument of forward, or a tuple of all positional ones."
        ) from error
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
        self._sharing: dict[Any, list[Any]] = {}  # kept, or another tensor could take the identity of one that is gone
        self._inside_layer = False

    def go(self, args: tuple[Any, ...]) -> None:
        args = tree_map(_cloned, args)
        self._note(args, self.add(INPUT, ()))
        try:
            with self, _repeatable_draws():
                output = self.shadow.forward(*args)
            self.add(OUTPUT, output)
        finally:
            self._sharing.clear()
            self.release()

    def call_layer(self, part: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        if self._inside_layer:
            return forward(*args, **kwargs)
        self._inside_layer = True
        try:
            result = forward(*args, **kwargs)
        finally:
            self._inside_layer = False
        self._write_down(type(part).__name__, args, kwargs, result, part)
        return result

    def position_of(self, value: Any) -> int | None:
        return self._positions.get(id(value)) if isinstance(value, Tensor) else None

    def called_function(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        if not self._inside_layer:
            self._write_down(name_of(func), args, kwargs, result)
        return result

    def _write_down(self, name: str, args: Any, kwargs: Any, result: Any, part: nn.Module | None = None) -> None:
        changed = changed_in_place(name, args, kwargs, part)
        if changed is None and not any(isinstance(value, Tensor) for value in tree_leaves(result)):
            return
        position = self.add(name, args, kwargs, part)
        self._note(result, position)
        if isinstance(changed, Tensor):
            for tensor in self._sharing.get(_memory_of(changed), [changed]):
                self._positions[id(tensor)] = position

    def _note(self, result: Any, position: int) -> None:
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and not self.is_weight(value):
                self._positions[id(value)] = position
                self._sharing.setdefault(_memory_of(value), []).append(value)


def _memory_of(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # sparse
        return id(tensor)


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


@contextmanager
def _repeatable_draws() -> Iterator[None]:
    """Let torch draw the same numbers in every process, and go on afterwards from where it was."""
    generators = [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())]
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(0)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
