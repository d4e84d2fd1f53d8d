"""The values of a graph: proxies of ``torch.fx`` that refuse the questions to which they would give a wrong answer.

Note [questions of type]
A proxy is no tensor. ``isinstance``, ``hasattr``, a lookup in a dictionary and ``x += y`` would be answered all the
same, and forward would go another way than in a run.
Source: https://github.com/pytorch/pytorch/blob/v2.7.0/torch/fx/proxy.py#L407.
Python asks for the type through ``__class__``, which cannot tell who asks but by the frame that does: ``torch.fx``
itself and ``nn.Module.__setattr__`` get an answer. Beyond reach are ``type(x)``, ``callable(x)``
and ``str(x.device)``.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from torch.fx.proxy import Attribute, ParameterProxy, Proxy

# Attributes of a tensor that a forward compares with ``None``
_NONE_OR_NOT = ("grad_fn", "grad", "_base")


class Unknown:
    """A value that is known only when the forward runs."""

    tracer: Any
    node: Any
    __hash__: Any = None

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        frame: Any = sys._getframe(1)
        while frame.f_globals.get("__name__") == "torch.nn.parameter":  # the class of ``Parameter``, for another
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").startswith(("torch.fx.", "torch.nn.modules.module")):
            return type(self)
        return self.tracer.refuse("the type of a symbolically traced variable is not known")

    def __getattr__(self, name: str) -> Any:
        if name in _NONE_OR_NOT or (not hasattr(Tensor, name) and self.node.op != "call_module"):
            self.tracer.refuse(f"it is not known whether a symbolically traced variable has {name!r}")
        return AttributeValue(self, name)  # pyright: ignore[reportArgumentType]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data" or name in _NONE_OR_NOT:
            self.tracer.refuse(f"a symbolically traced variable gets other {name}")
        super().__setattr__(name, value)

    def _refuse(self, *others: Any) -> Any:
        return self.tracer.refuse("the value of a symbolically traced variable is not known")

    keys = property(_refuse)  # which ``torch.fx`` has, and a tensor has not
    __len__ = __int__ = __float__ = __index__ = __setitem__ = __contains__ = _refuse


def _in_place(name: str) -> Any:
    def operate(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_method", name, (self, other), {})

    return operate


# The proxy of ``torch.fx`` has none, so that Python makes ``x = x + y`` of ``x += y``, and aliases stay as they were
for _name in "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift".split():
    setattr(Unknown, f"__{_name}__", _in_place(f"__{_name}__"))


class Value(Unknown, Proxy): ...


class AttributeValue(Unknown, Attribute): ...  # pyright: ignore[reportIncompatibleMethodOverride]


class ParameterValue(Unknown, ParameterProxy): ...
