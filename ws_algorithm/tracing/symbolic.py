"""Runs of a forward with symbols in place of tensors: no input is needed.

``torch.fx`` traces with symbols too, but patches ``nn.Module`` for all threads while it does, and gives up at the first
``if`` or ``len``. Here what a forward asks of a symbol is answered: conditions with both answers in turn, numbers with
two different ones, and random draws are symbols as well.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute
from torch.utils._pytree import tree_leaves, tree_map

from ws_algorithm.layers import is_convolution
from ws_algorithm.tracing.following import Reading
from ws_algorithm.tracing.recorder import INPUT, OUTPUT, Recorder, Run, name_of

# What a forward is told that asks a symbol for a number: what it does must not depend on it
_NUMBERS = (4, 7)
# A forward with more conditions is not tried in all its ways
_MOST_CONDITIONS = 32
# After so many equal answers at one place, a loop is told to end
_MOST_ROUNDS = 256

_DRAWS = frozenset(
    "rand randn randint randperm rand_like randn_like randint_like bernoulli bernoulli_ multinomial normal normal_ "
    "uniform_ random_ exponential_ geometric_ cauchy_ log_normal_ poisson".split()
)

# Functions of torch that look at their arguments before they let a symbol answer
_STRICT_FUNCTIONS = "arange linspace full tril_indices triu_indices cat concat stack".split()

Answers = Mapping[Hashable, bool]


def symbolic_runs(module: nn.Module) -> list[Run]:
    """The ways through the forward of a model, in training and, if that leaves convolutions out, in evaluation.

    Raises:
        Exception: Whatever forward raises if it does not get through, in neither of the two.
        RuntimeError: If it has too many ways.
    """
    convolutions = {part for part in module.modules() if is_convolution(part)}
    runs: list[Run] = []
    failures: list[Exception] = []
    for training in (True, False):
        try:
            runs += _ways(module, training)
        except Exception as failure:  # whatever the user's code raises when given symbols
            failures.append(failure)
            continue
        if any(convolutions <= Reading(run).calls.keys() for run in runs):
            break
    if not runs:
        raise failures[-1]
    return runs


def _ways(module: nn.Module, training: bool) -> list[Run]:
    base = _passage(module, training, _NUMBERS[0], {})
    trials = [base]
    if len(base.asked) > _MOST_CONDITIONS:
        raise RuntimeError(f"forward depends on {len(base.asked)} conditions of its input")
    for index, condition in enumerate(base.asked):
        answers = {earlier: base.answers[earlier] for earlier in base.asked[:index]}
        try:
            trials.append(_passage(module, training, _NUMBERS[0], answers | {condition: not base.answers[condition]}))
        except Exception:  # no way through: forward checks its input here
            continue
    if any(trial.gave_a_number for trial in trials):
        other = _passage(module, training, _NUMBERS[1], base.answers)
        if Reading(other.operations).calls.keys() != Reading(base.operations).calls.keys():
            raise RuntimeError("which convolutions it uses depends on a number or length computed from its input")
        trials.append(other)
    return [trial.operations for trial in trials]


def _passage(module: nn.Module, training: bool, number: int, answers: Answers) -> _Trial:
    """A run that reaches the end of forward with these answers; others are ``True``, or ``False`` if that fails."""
    given = dict(answers)
    while True:
        trial = _Trial(module, training, number, given)
        try:
            trial.go()
        except Exception as error:
            failure = error
        else:
            return trial
        open_conditions = [c for c in trial.asked if c not in given]
        if not open_conditions or len(trial.asked) > _MOST_CONDITIONS:
            raise failure
        given |= {condition: True for condition in open_conditions[:-1]} | {open_conditions[-1]: False}


class _Trial(Recorder):
    """One run with symbols.

    Attributes:
        asked: The places in the code that made a condition of a symbol, in order.
        answers: What they were told.
        gave_a_number: Whether a symbol was asked for a number.
    """

    def __init__(self, module: nn.Module, training: bool, number: int, answers: Answers) -> None:
        super().__init__(module, training=training, data=False)
        self.asked: list[Hashable] = []
        self.answers = dict(answers)
        self.gave_a_number = False
        self._number = number
        self._rounds: Counter[Hashable] = Counter()

    def go(self) -> None:
        args, kwargs = self._arguments()
        with self, self._lenient_functions():
            output = self.shadow.forward(*args, **kwargs)
        self.add(OUTPUT, output)

    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """A symbol for each argument of forward that has no default."""
        args, kwargs = [], {}
        parameters = inspect.signature(self.shadow.forward.args[1]).parameters.values()  # pyright: ignore
        required = [p for p in parameters if p.default is p.empty]
        for parameter in required:
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                args.append(self._symbol(self.add(INPUT, ())))
            elif parameter.kind is parameter.KEYWORD_ONLY:
                kwargs[parameter.name] = self._symbol(self.add(INPUT, ()))
            elif parameter.kind is parameter.VAR_POSITIONAL and not args:
                args.append(self._symbol(self.add(INPUT, ())))
        return args, kwargs

    def call_layer(self, part: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        return self._result_of(type(part).__name__, args, kwargs, part)

    def position_of(self, value: Any) -> int | None:
        return value.node if isinstance(value, fx.Proxy) else None  # pyright: ignore

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, values = name_of(func), tree_leaves((args, kwargs))
        if name in _DRAWS or any(isinstance(value, fx.Proxy) for value in values):
            return self._result_of(name, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except RuntimeError:  # a tensor made for the input, which is said to be on the CPU, and one of the copy
            args, kwargs = tree_map(_without_data, (args, kwargs))
            result = func(*args, **kwargs)
        if any(self.is_weight(value) for value in values) and isinstance(result, Tensor):
            return self._result_of(name, args, kwargs)
        return result

    def _result_of(self, name: str, args: Any, kwargs: Any, part: nn.Module | None = None) -> Any:
        """Write an operation down; one that works in place changes what its first argument stands for."""
        position = self.add(name, (args, kwargs), part)
        if name in ("setitem", "__setitem__") or _works_in_place(name, kwargs, part):
            changed = next(iter(args), None)
            if isinstance(changed, _Symbol):
                changed.node = position  # pyright: ignore
            elif isinstance(changed, Tensor):
                raise TypeError("forward writes what it computes from its input into a tensor of its own")
        return self._symbol(position)

    # What fx's Proxy expects of a tracer

    trace_asserts = False

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *others: Any, **options: Any) -> Any:
        name = target if isinstance(target, str) else args[1] if target is getattr else name_of(target)
        return self._result_of(name, args, kwargs)

    def iter(self, symbol: Any) -> Iterator[Any]:
        return (symbol[index] for index in range(self.give_a_number()))

    def keys(self, symbol: Any) -> Any:
        raise TypeError("forward unpacks an input whose keys are not known")

    def to_bool(self, symbol: Any) -> bool:
        place = _place_in_forward()
        if place not in self.asked:
            self.asked.append(place)
        self._rounds[place] += 1
        answer = self.answers.setdefault(place, True)
        return answer if self._rounds[place] <= _MOST_ROUNDS else not answer

    def give_a_number(self) -> int:
        self.gave_a_number = True
        return self._number

    def _symbol(self, position: int) -> Any:
        return _Symbol(position, self)  # pyright: ignore

    @contextmanager
    def _lenient_functions(self) -> Iterator[None]:
        def lenient(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if any(isinstance(value, fx.Proxy) for value in tree_leaves((args, kwargs))):
                    return self._result_of(name_of(function), args, kwargs)
                return function(*args, **kwargs)

            return call

        with ExitStack() as stack:
            for name in _STRICT_FUNCTIONS:
                stack.enter_context(mock.patch.object(torch, name, lenient(getattr(torch, name))))
            yield


# What a forward passes on to functions that accept nothing else
_KNOWN_ATTRIBUTES = {"device": torch.device("cpu"), "dtype": torch.float32}


class _Numeric:
    """What Python's numbers and lengths ask for, which fx's Proxy does not answer."""

    tracer: Any

    def __len__(self) -> int:
        return self.tracer.give_a_number()

    def __int__(self) -> int:
        return self.tracer.give_a_number()

    def __index__(self) -> int:
        return self.tracer.give_a_number()

    def __float__(self) -> float:
        return float(self.tracer.give_a_number())

    def __round__(self, digits: int = 0) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, digits), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other  # pyright: ignore

    def __repr__(self) -> str:
        return "<symbol>"

    def __format__(self, specification: str) -> str:
        return repr(self)

    def __getattr__(self, name: str) -> Any:
        if name in _KNOWN_ATTRIBUTES:
            return _KNOWN_ATTRIBUTES[name]
        return _SymbolAttribute(self, name)  # pyright: ignore


class _Symbol(_Numeric, fx.Proxy):
    """A tensor, or anything else that a forward computes from its inputs; ``node`` is its operation."""

    @classmethod
    def __torch_function__(cls, orig_method: Any, types: Any, args: Any = None, kwargs: Any = None) -> Any:
        trial = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, fx.Proxy)).tracer
        return trial.create_proxy("call_function", orig_method, args, kwargs)


class _SymbolAttribute(_Numeric, Attribute):
    """An attribute of a symbol: a property, or a method about to be called."""


def _works_in_place(name: str, kwargs: Any, part: nn.Module | None) -> bool:
    named_so = name.endswith("_") and not name.endswith("__")
    return named_so or kwargs.get("inplace") is True or getattr(part, "inplace", False) is True


def _without_data(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _place_in_forward() -> Hashable:
    """Where, in the code that is not ours or fx's, a symbol is being asked."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in (__name__, fx.proxy.__name__):
        frame = frame.f_back
    return frame.f_code, frame.f_lasti
