"""A copy of a model on which a forward can be tried, and the surroundings in which trying it leaves no trace."""

from __future__ import annotations

import builtins
import copy
import io
import os
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

# One trial at a time: what `undisturbed` replaces for a moment is shared by all threads
_TRIAL = threading.RLock()


def shadow_of(module: nn.Module, *, data: bool = False) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """A copy of a model without hooks and gradients, and the original of each of its modules.

    Args:
        module: Any model; it is not changed.
        data: Whether the copy has the values of parameters and buffers; if not, they are on the meta device.
    """
    memo = _tensors(module, data)
    try:
        shadow = copy.deepcopy(module, memo)
    except Exception:  # an attribute that cannot be copied: a lock, an open file, an activation with a graph
        memo = _tensors(module, data)
        memo.update(_stand_ins(module, memo))
        shadow = copy.deepcopy(module, memo)
    originals = dict(zip(shadow.modules(), module.modules(), strict=True))
    shadows = {id(original): part for part, original in originals.items()}
    for part in originals:
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        part._compiled_call_impl = None
        _rebind_closures(part, shadows)
    return shadow, originals


def _tensors(module: nn.Module, data: bool) -> dict[int, Any]:
    """For ``copy.deepcopy``: what stands for each parameter and buffer, and each tensor that a layer keeps."""

    def stand_in(tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if data else torch.empty_like(tensor, device="meta").detach()

    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        if not is_lazy(parameter):
            memo[id(parameter)] = nn.Parameter(stand_in(parameter), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        if not is_lazy(buffer):
            memo[id(buffer)] = stand_in(buffer)
    for value in (value for part in module.modules() for value in vars(part).values()):
        if isinstance(value, Tensor) and not value.is_leaf:  # an activation that forward kept; deepcopy refuses it
            memo[id(value)] = stand_in(value)
    return memo


def _stand_ins(module: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """Something that accepts any use, for each attribute that cannot be copied."""
    found: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if name in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                found[id(value)] = mock.MagicMock(name=name)
    return found


def _rebind_closures(part: nn.Module, shadows: dict[int, nn.Module]) -> None:
    """Let functions that a layer keeps, and that refer to modules of the original, refer to those of the copy."""
    for name, value in list(vars(part).items()):
        if isinstance(value, types.FunctionType) and value.__closure__:
            cells = [_shadowed(cell, shadows) for cell in value.__closure__]
            if any(new is not old for new, old in zip(cells, value.__closure__, strict=True)):
                rebound = types.FunctionType(
                    value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells)
                )
                rebound.__kwdefaults__ = value.__kwdefaults__
                vars(part)[name] = rebound


def _shadowed(cell: types.CellType, shadows: dict[int, nn.Module]) -> types.CellType:
    try:
        shadow = shadows.get(id(cell.cell_contents))
    except ValueError:  # an empty cell
        return cell
    return cell if shadow is None else types.CellType(shadow)


class SideEffect(RuntimeError):
    """A forward on trial was about to change something outside of itself."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Where a forward can be tried: it draws the same random numbers in every process and writes no file.

    The random states of torch, Python and NumPy are afterwards as they were. In this thread, what would open a file for
    writing raises :class:`SideEffect`; other threads are not affected.
    """
    with _TRIAL, _random_states_restored(), _no_files_written(), torch.no_grad():
        yield


@contextmanager
def _random_states_restored() -> Iterator[None]:
    """A forward that draws at random (stochastic depth) would otherwise be seen differently by every rank."""
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    python_state = random.getstate()
    cuda_devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=cuda_devices):
            torch.default_generator.manual_seed(0)
            random.seed(0)
            if numpy_random is not None:
                numpy_random.seed(0)
            yield
    finally:
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)


@contextmanager
def _no_files_written() -> Iterator[None]:
    thread = threading.get_ident()

    def guarded(function: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def guard(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread and writes(*args, **kwargs):
                raise SideEffect(f"forward calls {function.__name__}{args!r:.80} while it is only being looked at")
            return function(*args, **kwargs)

        return guard

    def opens_to_write(file: Any, mode: Any = "r", *args: Any, **kwargs: Any) -> bool:
        return any(letter in str(mode) for letter in "wax+")

    def opens_descriptor_to_write(path: Any, flags: int, *args: Any, **kwargs: Any) -> bool:
        return bool(flags & (os.O_WRONLY | os.O_RDWR))

    def always(*args: Any, **kwargs: Any) -> bool:
        return True

    targets = [(builtins, "open", opens_to_write), (io, "open", opens_to_write), (torch, "save", always)]
    targets += [(os, "open", opens_descriptor_to_write), (os, "mkdir", always), (os, "remove", always)]
    with ExitStack() as stack:
        for owner, name, writes in targets:
            stack.enter_context(mock.patch.object(owner, name, guarded(getattr(owner, name), writes)))
        yield
