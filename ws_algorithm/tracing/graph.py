"""The operations of a forward, from its ``torch.fx`` graph: no input is needed.

``torch.fx`` gives up where a forward makes a condition, a number or a loop of what it computes. A module whose forward
does so is opaque: one step in the graph of the module that calls it, of whose inside nothing is known.
"""

from __future__ import annotations

import inspect
import os
import threading
import traceback
from collections.abc import Hashable
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Proxy, TraceError
from torch.nn.modules import batchnorm
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only

from ws_algorithm.layers import (
    CONVOLVING_FUNCTIONS,
    VIEW_FUNCTIONS,
    changed_in_place,
    is_convolution,
    is_elementary,
    is_norm_operation,
    is_transparent,
    lets_through,
    weights_of,
)
from ws_algorithm.tracing.dataflow import INPUT, OUTPUT, WEIGHT, Operation, Recorder, name_of
from ws_algorithm.tracing.meta_copy import closes_over, copied_modules, forward_of
from ws_algorithm.tracing.proxies import ParameterValue, Value
from ws_algorithm.tracing.random_states import DrawsNoticed

# Note [torch.fx patches nn.Module]
# While it traces, ``torch.fx`` replaces ``nn.Module.__call__`` and ``nn.Module.__getattr__`` for all threads:
# https://github.com/pytorch/pytorch/blob/v2.7.0/torch/fx/_symbolic_trace.py#L830. So one thread traces at a time, and
# the tracer lets those of other threads pass. Beyond reach: what another thread has compiled refuses to run meanwhile.
_LOCK = threading.RLock()

# Where a user does not look for the cause of an error
_NOT_THE_USERS = (str(Path(torch.__file__).parent) + os.sep, str(Path(__file__).parent) + os.sep)

# What is known by its name: functions of some packages, and of others if the name says it. Others may do anything
_KNOWN = ("torch", "_operator", "builtins", "math")
_KNOWN_BY_NAME = ("torch._ops", "torchvision", "timm", "composer")


_OUTLIVED = (
    "forward kept a value of the trace that looked for its convolutions, in a class attribute, a default argument or a "
    "global variable. Clear that first, or give an `example_input`."
)
_LEFT_BEHIND = "forward reaches the model itself from its copy, through a function that refers to it"


class TracedForward(NamedTuple):
    """What the forward of a module does."""

    run: list[Operation]
    opaque: dict[nn.Module, str]  # modules whose forward cannot be traced, itself perhaps included, and why not


def traced_forward(module: nn.Module, *, training: bool) -> TracedForward:
    """Trace the forward of a module, on a copy without data. Arguments that have a default have it."""
    tracer = _Tracer(module, copied_modules(module, data=False, training=training))
    try:
        with _LOCK, tracer.draws, torch.set_grad_enabled(training):
            tracer.trace(lambda: tracer.call_model())
        return TracedForward(tracer.operations(), tracer.opaque)
    finally:
        vars(tracer).clear()  # what it holds is not to wait for the garbage collector


class _Tracer(fx.Tracer):
    """Traces the copy of a model. Convolutions, norms and layers of torch that contain neither are leaves."""

    _left_behind: Any = None  # once the trace is over

    def __init__(self, module: nn.Module, copies: dict[nn.Module, nn.Module]) -> None:
        super().__init__()
        self.opaque: dict[nn.Module, str] = {}
        self.draws = DrawsNoticed(copies.values())
        self._refused, self._drawn = 0, self.draws.state()
        self._thread, self._model = threading.get_ident(), copies[module]
        self._originals = {new: part for part, new in copies.items()}
        self._left_behind = {id(part) for part, new in copies.items() if part is not new}
        self._left_behind |= {id(t) for t in (*module.parameters(), *module.buffers()) if not is_lazy(t)}
        self._names: dict[int, str] = {}
        self._named: dict[str, Any] = {}
        self._owners: dict[str, nn.Module] = {}  # convolutions, by the names of what makes up their weights
        for new, part in self._originals.items():
            if isinstance(new, batchnorm._NormBase):  # it asks for the number of dimensions
                vars(new)["_check_input_dim"] = lambda input: None
            parametrizations: Any = is_convolution(new) and new._modules.get("parametrizations") or {}
            computed = [parametrizations["weight"]] if "weight" in parametrizations else []
            self._owners |= {self._name_of(source): part for source in (*weights_of(new), *computed)}

    def call_model(self) -> Any:
        """Call the model with values of the graph for all arguments that have no default."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in _parameters_of(forward_of(self._model)):
            if parameter.default is parameter.empty and "VAR" not in parameter.kind.name:
                value = self.create_proxy("placeholder", parameter.name, (), {})
                if parameter.kind is parameter.KEYWORD_ONLY:
                    kwargs[parameter.name] = value
                else:
                    args.append(value)
        return self.call_module(self._model, None, tuple(args), kwargs)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Follow the call of a module, or make one step of it."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        self._check(m)
        tree_map_only(Proxy, lambda proxy: proxy.node, (args, kwargs))  # those of attributes are made when asked for
        if is_elementary(m) or self._name_of(m) in self._owners:
            return self.create_proxy("call_module", self._name_of(m), args, kwargs)
        self._refuse_draws()
        nodes: Any = self.graph.nodes
        last, refused = next(iter(reversed(nodes)), None), self._refused
        try:
            if any(closes_over(value, self._left_behind) for value in vars(m).values()):
                raise RuntimeError(_LEFT_BEHIND)
            result = forward_of(m)(*args, **kwargs)
            self._refuse_draws()
            if self._refused != refused:
                raise RuntimeError("what it asked was refused, and it went on")
            if m is self._model:
                self.create_arg(result)
            return result
        except Exception as error:  # whatever a forward raises when it is traced
            self._refused, self._drawn = refused, self.draws.state()
            self.opaque[self._originals.get(m, m)] = _in_one_line(error)
            for node in list(takewhile(lambda node: node is not last, reversed(nodes))):
                self.graph.erase_node(node)
            return self.create_proxy("call_module", self._name_of(m), args, kwargs)

    def refuse(self, reason: str) -> Any:
        """Raise, and remember it if the forward goes on all the same."""
        self._refused += 1
        raise TraceError(reason)

    def to_bool(self, obj: Proxy) -> bool:
        """Refuse: a condition of what is computed."""
        return self.refuse("symbolically traced variables cannot be used as inputs to control flow")

    def iter(self, obj: Proxy) -> Any:
        """Refuse: a loop over what is computed."""
        return self.refuse("symbolically traced variables cannot be iterated")

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Let parameters that something else than a leaf reads be values of the graph."""
        if threading.get_ident() != self._thread or not isinstance(attr_val, Tensor):
            return attr_val
        self._check(attr_val)
        if not isinstance(attr_val, nn.Parameter):
            return attr_val
        return ParameterValue(self, self.create_arg(attr_val), attr, attr_val)

    def create_arg(self, a: Any) -> Any:
        """Return what stands for a value among the arguments of a step."""
        if isinstance(a, Proxy):
            return a.node
        if isinstance(a, Tensor):
            self._check(a)
            return self.create_node("get_attr", self._name_of(a), (), {})
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *others: Any, **more: Any) -> Any:
        """Return what a step computes; refuse one that writes into a tensor that is there, which others may read."""
        changed = changed_in_place(name_of(target), None, args, kwargs) if kind != "call_module" else None
        if not isinstance(changed, Proxy) and isinstance(changed, Tensor):
            self.refuse("what is computed is written into another tensor")
        return super().create_proxy(kind, target, args, kwargs, *others, **more)

    def proxy(self, node: fx.Node) -> Proxy:
        """Return the value that a step computes."""
        return Value(node, self)

    def operations(self) -> list[Operation]:
        """Return the steps of the graph."""
        recorder = _NodeRecorder()
        for node in self.graph.nodes:
            name, layer, hidden = self._described(node)
            first: Any = next(iter(tree_leaves((node.args, node.kwargs))), None)
            is_view = name in VIEW_FUNCTIONS if layer is None else is_transparent(layer)
            shared = changed_in_place(name, layer, node.args, node.kwargs) or (first if is_view else None)
            recorder.memories[node] = recorder.memory_of(shared) or node
            recorder.add(name, layer, node.args, node.kwargs, node, hidden)
        return recorder.run

    def _described(self, node: fx.Node) -> tuple[str, nn.Module | None, bool]:
        """The name of a step, its layer, and whether it is hidden."""
        target: Any = node.target
        if target in self._owners:
            return WEIGHT, self._owners[target], False
        if node.op == "call_module":
            part = self._named[target]
            layer = self._originals.get(part, part)
            return type(part).__name__, layer, layer in self.opaque
        if node.op == "call_function":
            name = str(node.args[1]) if target is getattr else name_of(target)
            if isinstance(target, type):  # a tuple with names, or a dataclass
                return "alias", None, False
            home = getattr(target, "__module__", None) or "torch"
            package = "torch._ops" if home.startswith("torch._ops.") else home.partition(".")[0]
            says_it = lets_through(name, None, True) or is_norm_operation(name, None) or name in CONVOLVING_FUNCTIONS
            return name, None, not (package in _KNOWN or (package in _KNOWN_BY_NAME and says_it))
        return {"placeholder": INPUT, "output": OUTPUT}.get(node.op, str(target)), None, False

    def _name_of(self, value: Any) -> str:
        """The name of a module or tensor in the graph; kept with it, so that its identity is not given anew."""
        name = self._names.setdefault(id(value), f"value.{len(self._names)}")
        self._named[name] = value
        return name

    def _check(self, value: Any) -> None:
        if self._left_behind is None:
            raise RuntimeError(_OUTLIVED)
        if id(value) in self._left_behind:
            raise RuntimeError(_LEFT_BEHIND)

    def _refuse_draws(self) -> None:
        state, self._drawn = self._drawn, self.draws.state()
        if self._drawn != state:
            raise RuntimeError("it draws random numbers")


class _NodeRecorder(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.memories: dict[fx.Node, Hashable] = {}

    def memory_of(self, value: Any) -> Hashable | None:
        return self.memories.get(value) if isinstance(value, fx.Node) else None


def _parameters_of(forward: Any) -> list[inspect.Parameter]:
    try:
        return [*inspect.signature(forward).parameters.values()]
    except (TypeError, ValueError):  # it has no signature, and may do without arguments
        return []


def _in_one_line(error: Exception) -> str:
    """What was raised, and the line of the user's code that did it."""
    lines = [line for line in traceback.extract_tb(error.__traceback__) if not line.filename.startswith(_NOT_THE_USERS)]
    place = f", at {Path(lines[-1].filename).name}:{lines[-1].lineno}: {lines[-1].line}" if lines else ""
    return f"{type(error).__name__}: {error}".split("\n")[0].split(". ")[0] + place
