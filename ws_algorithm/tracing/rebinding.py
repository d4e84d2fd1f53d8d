"""Functions that a model keeps and that refer to its modules, made anew for a copy of the model.

``copy.deepcopy`` returns functions and weak references as they are: a lambda that closes over a layer would run the
layer of the original.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

_PLAIN = (int, float, str, bytes, type(None))


class Rebinding:
    """New functions for those reachable from the attributes of a model, and weak references likewise.

    Args:
        module: The original.
        others: The identities of other values for which `memo` will have something else.
    """

    def __init__(self, module: nn.Module, others: Collection[int] = ()) -> None:
        self._functions: dict[int, tuple[types.FunctionType, types.FunctionType]] = {}
        self._references: dict[int, tuple[Any, _Reference]] = {}
        modules = {id(part) for part in (*module.modules(), *module.parameters(), *module.buffers())} | set(others)
        for part in module.modules():
            for name, value in list(vars(part).items()):
                if name not in ("_modules", "_parameters", "_buffers") and not isinstance(value, _PLAIN):
                    self._visit(value, modules, set())

    @property
    def memo(self) -> dict[int, Any]:
        """For ``copy.deepcopy``: what takes the place of each, still without what it refers to."""
        return {key: new for key, (_, new) in (*self._functions.items(), *self._references.items())}

    def complete(self, memo: dict[int, Any], stand_in: Any) -> None:
        """Let the new ones refer to copies, once `memo` knows them, or to `stand_in` for what cannot be copied."""

        def copied(value: Any) -> Any:
            try:
                return copy.deepcopy(value, memo)
            except Exception:
                return stand_in

        for old, new in self._functions.values():
            for old_cell, new_cell in zip(old.__closure__ or (), new.__closure__ or (), strict=True):
                if _is_filled(old_cell):
                    new_cell.cell_contents = copied(old_cell.cell_contents)
            new.__defaults__ = old.__defaults__ and tuple(map(copied, old.__defaults__))
            new.__kwdefaults__ = old.__kwdefaults__ and {k: copied(v) for k, v in old.__kwdefaults__.items()}
        for old, new in self._references.values():
            new.target = memo.get(id(old()), old())

    def _visit(self, value: Any, modules: set[int], seen: set[int]) -> bool:
        """Whether a value leads to a module or tensor of the model; remembers functions and references on the way."""
        if id(value) in modules or id(value) in self._functions or id(value) in self._references:
            return True
        if id(value) in seen:
            return False
        seen.add(id(value))
        leads = [self._visit(part, modules, seen) for part in _parts_of(value)]
        if not any(leads):
            return False
        if isinstance(value, types.FunctionType):
            self._functions[id(value)] = (value, _emptied(value))
        elif isinstance(value, weakref.ref):
            self._references[id(value)] = (value, _Reference())
        return True


class _Reference:
    """What a weak reference to the original becomes."""

    target: Any = None

    def __call__(self) -> Any:
        return self.target


def _parts_of(value: Any) -> Iterator[Any]:
    """What a function, a container or a reference refers to."""
    if isinstance(value, types.FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell))
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, weakref.ref):
        yield value()
    elif isinstance(value, dict):
        yield from list(value.values())  # at once: other threads may be at work
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from list(value)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _emptied(function: types.FunctionType) -> types.FunctionType:
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    new = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    new.__dict__.update({name: value for name, value in vars(function).items() if name != "__wrapped__"})
    return new
