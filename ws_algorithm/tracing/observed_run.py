"""The operations of a forward, seen in a run with a real input."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ws_algorithm.layers import is_elementary, weights_of
from ws_algorithm.tracing.dataflow import INPUT, OUTPUT, WEIGHT, Operation, Recorder, name_of
from ws_algorithm.tracing.meta_copy import copied_modules, forward_of
from ws_algorithm.tracing.random_states import seed_generators


def observed_runs(module: nn.Module, example_input: Any) -> list[list[Operation]]:
    """Return what a copy of a model does with an input in evaluation and, if forward accepts it there too, in training.

    Args:
        module: The model; it is not changed. The copy is on the device of its parameters.
        example_input: A tuple of positional arguments, or the only argument. It is kept while the copy runs, and so are
            all activations.

    Raises:
        ValueError: If forward does not accept the input in evaluation.
    """
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    try:
        evaluation = _ObservedRun(module, training=False).operations(args)
    except Exception as error:
        raise ValueError(
            f"`example_input` does not fit {type(module).__name__}: forward raised {type(error).__name__}: {error}. "
            "Give the only argument of forward, or a tuple of all positional ones."
        ) from error
    try:
        return [evaluation, _ObservedRun(module, training=True).operations(args)]
    except Exception:  # a forward that needs targets in training, or more than one image
        return [evaluation]


class _ObservedRun(TorchFunctionMode, Recorder):
    """Lets a copy of a model run, and writes down the functions of torch and the elementary layers that it calls."""

    def __init__(self, module: nn.Module, *, training: bool) -> None:
        TorchFunctionMode.__init__(self)
        Recorder.__init__(self)
        copies = copied_modules(module, data=True, training=training)
        self._model, self._inside_layer, self._training = copies[module], False, training
        weights = [(weight, part) for part, new in copies.items() for weight in weights_of(new) if not is_lazy(weight)]
        self._weights = {_memory(weight): part for weight, part in weights}
        self._kept: list[Any] = []  # or another tensor could take the memory of one that is gone
        self._copies = [new for part, new in copies.items() if part is not new]
        for part, new in copies.items():
            if part is not new:  # the second attribute is asked first, and passes hooks by
                call = functools.partial(self._called, part, forward_of(new))
                vars(new)["forward"] = vars(new)["_compiled_call_impl"] = call

    def operations(self, args: tuple[Any, ...]) -> list[Operation]:
        """Run the copy with these arguments."""
        args = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), args)
        self.add(INPUT, None, (), {}, args)
        try:
            with self, torch.set_grad_enabled(self._training):
                seed_generators()
                output = self._model(*args)
            self.add(OUTPUT, None, (output,), {}, None)
            return self.run
        finally:
            for holder in (*self._copies, self):  # and all activations are not to wait for the garbage collector
                vars(holder).clear()

    def memory_of(self, value: Any) -> Hashable | None:
        """Return the memory of a tensor. The weight of a convolution is written down where it is first read."""
        if not isinstance(value, Tensor):
            return None
        memory = _memory(value)
        if memory in self._weights and memory not in self.positions:
            self.run.append(Operation(WEIGHT, self._weights[memory]))
            self.positions[memory] = len(self.run) - 1
        self._kept.append(value)
        return memory

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside_layer:
            self.add(name_of(func), None, args, kwargs or {}, result)
        return result

    def _called(self, part: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._inside_layer or not is_elementary(part):
            return forward(*args, **kwargs)
        self._inside_layer = True
        try:
            result = forward(*args, **kwargs)
            self.add(type(part).__name__, part, args, kwargs, result)
            return result
        finally:
            self._inside_layer = False


def _memory(tensor: Tensor) -> Hashable:
    return id(tensor) if tensor.layout is not torch.strided else tensor.untyped_storage()._cdata
