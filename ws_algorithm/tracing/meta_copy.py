"""A copy of a model on which its forward can be tried, so that the model itself stays as it is."""

from __future__ import annotations

import copy
import types
from collections import ChainMap, deque
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from ws_algorithm.torch_internals import is_optimized_module
from ws_algorithm.tracing.random_states import global_generators

_HOOKS = frozenset(name for name in vars(nn.Module()) if "_hooks" in name)


def copied_modules(module: nn.Module, *, data: bool, training: bool) -> dict[nn.Module, nn.Module]:
    """Return a copy of each module of a model, by its original. The copies have no hooks and no gradients.

    What cannot be copied, such as a lock or an open file, is shared, and so are functions and scripted modules.

    Args:
        module: The model; it is not changed.
        data: Whether the copies have the values of parameters and buffers; if not, these are on the meta device.
        training: Their mode. The method ``train`` of a user's own may do anything, and is not called.
    """
    parts = list(module.modules())
    copies: dict[nn.Module, nn.Module] = {
        part: part if isinstance(part, torch.jit.ScriptModule) else _new(type(part)) for part in parts
    }
    memo: dict[int, Any] = {id(generator): generator for generator in global_generators()}
    memo |= {id(part): new for part, new in copies.items()}
    for tensor in (*module.parameters(), *module.buffers()):
        memo[id(tensor)] = tensor if is_lazy(tensor) else _copied_tensor(tensor, data)
    for part, new in copies.items():
        if new is not part:
            for name, value in list(vars(part).items()):
                vars(new)[name] = type(value)() if name in _HOOKS else _copied(value, memo, data)
            vars(new)["training"] = training
    return copies


def forward_of(part: Any) -> Callable[..., Any]:
    """Return the forward of a module; of what compiles or replicates another module, that module."""
    if is_optimized_module(part):
        return part._orig_mod
    return part.module if isinstance(part, (DataParallel, DistributedDataParallel)) else part.forward


def closes_over(value: Any, identities: Container[int]) -> bool:
    """Return whether a function closes over one of these objects, itself or through functions that it closes over."""
    functions: dict[int, Any] = {}
    waiting = [value]
    for value in waiting:  # grows meanwhile
        function = getattr(value, "__func__", value)
        if isinstance(function, types.FunctionType) and id(function) not in functions:
            functions[id(function)] = function
            waiting += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
            waiting += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return any(id(value) in identities for value in waiting[1:])


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _copied_tensor(tensor: Tensor, data: bool) -> Tensor:
    new = tensor.detach().clone() if data else torch.empty_like(tensor, device="meta").detach()
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _new(cls: Any) -> Any:
    """A module without attributes. The ``__new__`` of a ``GraphModule`` would make another class for it."""
    try:
        return object.__new__(cls)
    except TypeError:  # one that is a dictionary or list too
        return cls.__new__(cls)


def _copied(value: Any, memo: dict[int, Any], data: bool) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    attempt: Any = ChainMap({}, memo)  # what is half copied when it fails is forgotten
    try:
        result = copy.deepcopy(value, attempt)
    except Exception:
        parts = _parts_of(value, memo)
        memo |= {
            id(part): _copied_tensor(part, data) for part in parts if isinstance(part, Tensor) and not part.is_leaf
        }
        for part in reversed(parts):  # what still cannot be copied is shared, and nothing around it
            try:
                copy.deepcopy(part, ChainMap({}, memo))  # pyright: ignore[reportArgumentType]
            except Exception:
                memo[id(part)] = part
        try:
            result = copy.deepcopy(value, attempt := ChainMap({}, memo))  # pyright: ignore[reportArgumentType]
        except Exception:  # another thread has put more into it
            return copy.copy(value) if isinstance(value, (list, dict, set, deque)) else value
    memo.update(attempt.maps[0])
    return result


def _parts_of(value: Any, memo: Container[int]) -> list[Any]:
    """What a value is made of, itself first."""
    parts: dict[int, Any] = {}
    waiting = [value]
    for value in waiting:  # grows meanwhile
        if id(value) not in parts and id(value) not in memo and not isinstance(value, (type, types.FunctionType)):
            parts[id(value)] = value
            if isinstance(value, dict):
                waiting += value.values()
            elif isinstance(value, (list, tuple, set, deque)):
                waiting += value
            elif not isinstance(value, (Tensor, types.ModuleType)):
                waiting += getattr(value, "__dict__", {}).values()
    return list(parts.values())
