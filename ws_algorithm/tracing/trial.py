"""One run of a forward with symbols in place of tensors, and with given answers to what it asks of them."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ws_algorithm.layers import is_transparent
from ws_algorithm.tracing import recorder as recorder_file
from ws_algorithm.tracing import symbol as symbol_file
from ws_algorithm.tracing.recorder import INPUT, OUTPUT, Recorder, changed_in_place
from ws_algorithm.tracing.symbol import Symbol, name_of
from ws_algorithm.tracing.undisturbed import (
    FromOutside,
    HiddenDraws,
    draws_answered_by,
    in_this_thread,
    is_from_outside,
    is_generator,
)

Answers = Mapping[Hashable, bool]

# After so many equal answers at one place, a loop is told to end
_MOST_ROUNDS = 256
# Numbers may be sizes of images, lengths are those of lists
_LONGEST = 8
_MOST_OPERATIONS = 200_000

_DRAWS = frozenset(
    "rand randn randint randperm rand_like randn_like randint_like bernoulli bernoulli_ multinomial normal normal_ "
    "uniform_ random_ exponential_ geometric_ cauchy_ log_normal_ poisson dropout dropout1d dropout2d dropout3d "
    "alpha_dropout feature_alpha_dropout rrelu gumbel_softmax".split()
)

# Of Python and NumPy, these pick or arrange what is given, and a symbol cannot take its place
_PICKS = frozenset("choice choices sample shuffle permutation seed setstate set_state".split())

# Functions of torch that look at their arguments before they let a symbol answer
_STRICT_FUNCTIONS = "arange linspace full zeros ones empty tensor as_tensor cat concat stack".split()

# What a forward passes on to functions that accept nothing else
_KNOWN_ATTRIBUTES = {"device": torch.device("cpu"), "dtype": torch.float32}

# Results of these share memory with their first argument
_VIEWS = frozenset(
    "view view_as reshape reshape_as flatten unflatten ravel permute transpose swapaxes swapdims movedim moveaxis t T "
    "mT H mH adjoint squeeze unsqueeze expand expand_as narrow select __getitem__ chunk split split_with_sizes "
    "tensor_split unbind detach data contiguous alias to type float half bfloat16 double cpu cuda real imag diagonal "
    "unfold as_strided view_as_real view_as_complex".split()
)


class Trial(Recorder):
    """One run with symbols.

    Args:
        module: The model; a copy of it without data runs.
        training: Whether the copy runs as in training.
        number: The answer where a number or a length is asked for.
        answers: Those to conditions, by their places in the code; others are ``True``.

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
        self._memories: list[list[Symbol]] = []
        self._rounds: Counter[Hashable] = Counter()
        self._written: dict[int, tuple[Tensor, Symbol]] = {}  # tensors of forward's own that hold what was computed

    def go(self) -> None:
        try:
            self._go()
        except Exception as error:
            if is_from_outside(error):
                raise FromOutside from error
            raise
        finally:
            self.release()
            for symbols in self._memories:
                symbols.clear()

    def _go(self) -> None:
        args, kwargs = self._arguments()
        attributes = [value for part in self.shadow.modules() for value in vars(part).values()]
        draws = HiddenDraws(filter(is_generator, attributes))
        try:
            with self, self._lenient_functions():
                output = self.shadow.forward(*args, **kwargs)
            if draws.have_happened():
                raise RuntimeError("forward draws random numbers in a way that cannot be followed")
        finally:
            draws.undo()
        self.add(OUTPUT, output)

    def _arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """A symbol for each argument of forward that has no default."""
        args, kwargs = [], {}
        for parameter in inspect.signature(self.forward).parameters.values():
            if parameter.default is not parameter.empty:
                continue
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                args.append(Symbol.of(self, self.add(INPUT, ())))
            elif parameter.kind is parameter.KEYWORD_ONLY:
                kwargs[parameter.name] = Symbol.of(self, self.add(INPUT, ()))
            elif parameter.kind is parameter.VAR_POSITIONAL and not args:
                args.append(Symbol.of(self, self.add(INPUT, ())))
        return args, kwargs

    def position_of(self, value: Any) -> int | None:
        symbol = self._symbol_of(value)
        return None if symbol is None else symbol.position

    def _symbol_of(self, value: Any) -> Symbol | None:
        if isinstance(value, Symbol):
            return value
        return self._written.get(id(value), (None, None))[1]

    def call_layer(self, part: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        return self._result_of(type(part).__name__, args, kwargs, part)

    def respond(self, name: str, args: Any, kwargs: Any) -> Any:
        if name in _KNOWN_ATTRIBUTES and isinstance(args[0], Symbol) and len(args) == 1:
            return _KNOWN_ATTRIBUTES[name]
        return self._result_of(name, args, kwargs)

    def called_function(self, func: Any, args: Any, kwargs: Any) -> Any:
        name, values = name_of(func), tree_leaves((args, kwargs))
        if name in _DRAWS or any(self.position_of(value) is not None for value in values):
            return self.respond(name, args, kwargs)
        if any(isinstance(value, Tensor) and value.is_meta for value in values):
            return self._compute_without_data(func, name, values, args, kwargs)
        return func(*args, **kwargs)

    def _compute_without_data(self, func: Any, name: str, values: list[Any], args: Any, kwargs: Any) -> Any:
        """A function of parameters and buffers of the copy: their values are not known, their shapes are."""
        if name in ("__bool__", "__int__", "__index__", "__float__"):
            answer = self.decide() if name == "__bool__" else self.give_a_number()
            return float(answer) if name == "__float__" else answer
        if name in ("item", "tolist", "numpy"):
            return self.respond(name, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except RuntimeError:  # a tensor made for the input, which is said to be on the CPU, and one of the copy
            result = func(*tree_map(_without_data, args), **tree_map(_without_data, kwargs))
        if isinstance(result, Tensor) and any(self.is_weight(value) for value in values):
            return self._result_of(name, args, kwargs)
        return result

    def _result_of(self, name: str, args: Any, kwargs: Any, part: nn.Module | None = None) -> Any:
        """Write an operation down; one that works in place changes what an argument stands for."""
        if len(self.operations) > _MOST_OPERATIONS:
            raise RuntimeError("forward does not come to an end")
        position = self.add(name, args, kwargs, part)
        changed = changed_in_place(name, args, kwargs, part)
        if isinstance(changed, Tensor) and self._symbol_of(changed) is None:
            self._written[id(changed)] = (changed, Symbol.of(self, position))
        whole = self._symbol_of(changed)
        if whole is not None:
            whole.changed_by(position)
        elif name in _VIEWS or (part is not None and is_transparent(part)):
            whole = self._symbol_of(args[0]) if args else None
        return Symbol.of(self, position, alias_of=whole, length=_length_of(name, args))

    def decide(self) -> bool:
        place = _place_in_forward()
        if place not in self.asked:
            self.asked.append(place)
        self._rounds[place] += 1
        answer = self.answers.setdefault(place, True)
        return answer if self._rounds[place] <= _MOST_ROUNDS else not answer

    def new_memory(self) -> list[Symbol]:
        self._memories.append([])
        return self._memories[-1]

    def give_a_number(self) -> int:
        self.gave_a_number = True
        return self._number

    def give_a_length(self) -> int:
        return min(self.give_a_number(), _LONGEST)

    @contextmanager
    def _lenient_functions(self) -> Iterator[None]:
        def lenient(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if any(isinstance(value, Symbol) for value in tree_leaves((args, kwargs))):
                    return self.respond(name_of(function), args, kwargs)
                return function(*args, **kwargs)

            return call

        def drawn(name: str) -> Any:
            if name in _PICKS:
                raise TypeError(f"forward picks at random, with {name}")
            return self.respond(name, (), {})

        strict = {(torch, name): lenient(getattr(torch, name)) for name in _STRICT_FUNCTIONS}
        with in_this_thread(strict), draws_answered_by(drawn):
            yield


def _length_of(name: str, args: Any) -> int | None:
    """How many items a function returns, where its arguments tell."""
    if name in ("split", "split_with_sizes", "tensor_split") and len(args) > 1 and isinstance(args[1], (list, tuple)):
        return len(args[1]) + (name == "tensor_split")
    if name == "chunk" and len(args) > 1 and isinstance(args[1], int):
        return args[1]
    return None


def _without_data(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


_OURS = (__name__, symbol_file.__name__, recorder_file.__name__)


def _place_in_forward() -> Hashable:
    """Where, in the code that is not ours, a symbol is being asked."""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in _OURS:
        frame = frame.f_back
    caller = frame.f_back  # of a function that several lines of forward call
    if caller is None or caller.f_globals.get("__name__", "").startswith(("torch.", "ws_algorithm.")):
        return frame.f_code, frame.f_lasti
    return frame.f_code, frame.f_lasti, caller.f_code, caller.f_lasti
