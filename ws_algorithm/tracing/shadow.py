"""A copy of a model on which a forward can be tried."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ws_algorithm.tracing.rebinding import Rebinding
from ws_algorithm.tracing.undisturbed import global_generators, redirections

_NOT_ATTRIBUTES = ("_modules", "_parameters", "_buffers")
_HOOKS = frozenset(name for name in vars(nn.Module()) if "_hooks" in name)


def shadow_of(module: nn.Module, *, data: bool = False) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """A copy of a model without hooks and gradients, and the original of each of its modules.

    Args:
        module: Any model; it is not changed.
        data: Whether the copy has the values of parameters and buffers; if not, they are on the meta device.
    """
    rebinding = Rebinding(module, redirections())
    memo = _tensors(module, data) | rebinding.memo
    try:
        shadow = copy.deepcopy(module, memo)
    except Exception:  # an attribute that cannot be copied: a lock, an open file, an activation with a graph
        memo = _tensors(module, data) | rebinding.memo
        memo |= _stand_ins(module, memo)
        shadow = copy.deepcopy(module, memo)
    rebinding.complete(memo, _WithoutValue())
    originals = dict(zip(shadow.modules(), module.modules(), strict=True))
    return shadow, originals


def _tensors(module: nn.Module, data: bool) -> dict[int, Any]:
    """For ``copy.deepcopy``: what stands for each parameter and buffer, and each tensor that a layer keeps."""

    def stand_in(tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if data else torch.empty_like(tensor, device="meta").detach()

    memo: dict[int, Any] = {id(generator): generator for generator in global_generators()} | redirections()
    for part in module.modules():  # the copy has no hooks: what they hold may be large, or refuse to be copied
        memo |= {id(hooks): type(hooks)() for name, hooks in vars(part).items() if name in _HOOKS}
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
    """Something without a value for each attribute that cannot be copied."""
    found: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if name in _NOT_ATTRIBUTES or id(value) in memo or isinstance(value, (int, float, str, type(None))):
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                # Of a dict or list that another thread changes meanwhile, or that holds activations, a shallow copy
                found[id(value)] = value.copy() if isinstance(value, (dict, list, set)) else _WithoutValue()
    return found


class _WithoutValue:
    """It can be called, entered and asked for attributes; forward fails where its way depends on what it is."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    __enter__ = __call__

    def __exit__(self, *error: Any) -> None: ...

    def _refuse(self, *others: Any) -> Any:
        raise TypeError("forward depends on an attribute that cannot be copied")

    __bool__ = __eq__ = __ne__ = _refuse
    __hash__ = object.__hash__
