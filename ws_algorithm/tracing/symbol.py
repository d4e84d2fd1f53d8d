"""Symbols: tensors without values, that ask the trial which they belong to about everything."""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Iterator
from types import CodeType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Respondent(Protocol):
    """What a symbol asks."""

    def decide(self) -> bool: ...

    def give_a_number(self) -> int: ...

    def give_a_length(self) -> int: ...

    def new_memory(self) -> list[Symbol]: ...

    def respond(self, name: str, args: Any, kwargs: Any) -> Any: ...


# Whole numbers in one element may stand where torch wants a size or a number
_NOTHING = torch.empty((), dtype=torch.int64, device="meta")


class Symbol(Tensor):
    """Stands for a tensor, or anything else, that a forward computes from its inputs.

    Attributes:
        trial: The run that it belongs to.
        position: The operation that made its present value.
        sharing: All symbols that share its memory, itself included.
        length: How many items it has, if that is known.
        attribute: Of whom it is an attribute, and which; then it may turn out to be a method.
    """

    trial: Respondent
    position: int
    sharing: list[Symbol]
    length: int | None
    attribute: tuple[Symbol, str] | None

    @staticmethod
    def of(trial: Respondent, position: int, alias_of: Symbol | None = None, length: int | None = None) -> Symbol:
        symbol: Any = Tensor._make_subclass(Symbol, _NOTHING)
        sharing = trial.new_memory() if alias_of is None else alias_of.sharing
        symbol.__dict__.update(trial=trial, position=position, sharing=sharing, length=length, attribute=None)
        sharing.append(symbol)
        return symbol

    def changed_by(self, position: int) -> None:
        """It has been changed in place, and with it what shares its memory."""
        for symbol in self.sharing:
            symbol.position = position

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        trial = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, Symbol)).trial
        return trial.respond(name_of(func), args, kwargs or {})

    def __bool__(self) -> bool:
        return self.trial.decide()

    def __len__(self) -> int:
        return self.trial.give_a_length() if self.length is None else self.length

    def __int__(self) -> int:
        return self.trial.give_a_number()

    def __index__(self) -> int:
        return self.trial.give_a_number()

    def __float__(self) -> float:
        return float(self.trial.give_a_number())

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        count = _unpacked_at(frame.f_code, frame.f_lasti)
        return (self[index] for index in range(len(self) if count is None else count))

    def __round__(self, digits: int = 0) -> Any:
        return self.trial.respond("round", (self,), {})

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name == "keys":
            raise TypeError("forward unpacks an input whose keys are not known")
        symbol = self.trial.respond(name, (self,), {})
        symbol.__dict__["attribute"] = (self, name)
        return symbol

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.attribute is None:
            raise TypeError("forward calls what it has computed")
        owner, name = self.attribute
        return self.trial.respond(name, (owner, *args), kwargs)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return sys.modules["numpy"].asarray(float(self.trial.give_a_number()))

    def __array_wrap__(self, array: Any, *others: Any) -> Any:
        return array

    def __deepcopy__(self, memo: Any) -> Symbol:
        return self

    def __repr__(self, **options: Any) -> str:
        return "<symbol>"

    def __format__(self, specification: str) -> str:
        return "<symbol>"

    __str__ = __repr__
    __hash__ = object.__hash__


def _operator(name: str) -> Any:
    def operate(self: Symbol, *others: Any) -> Any:
        return self.trial.respond(name, (self, *others), {})

    return operate


# Torch's own refuse what is no tensor, such as the tuple in ``x.shape != (2, 3)``, before they let a symbol answer
_BINARY = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()
_OPERATORS = [prefix + name for name in _BINARY for prefix in ("", "r", "i")]
_OPERATORS += "eq ne lt le gt ge neg pos abs invert getitem setitem contains".split()
for _name in _OPERATORS:
    setattr(Symbol, f"__{_name}__", _operator(f"__{_name}__"))


def name_of(function: Any) -> str:
    """The name of a function, method or property of torch."""
    name = getattr(function, "__name__", type(function).__name__).partition(".")[0]  # of ``aten.conv2d.default`` too
    if name == "__get__":  # of a property
        return getattr(getattr(function, "__self__", None), "__name__", name)
    return name


@functools.lru_cache
def _unpacked_at(code: CodeType, offset: int) -> int | None:
    """How many values are expected, where code is unpacking a sequence: ``a, b = x``."""
    for instruction in dis.get_instructions(code):
        if instruction.offset == offset:
            return instruction.argval if instruction.opname == "UNPACK_SEQUENCE" else None
    return None
