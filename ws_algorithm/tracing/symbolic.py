"""Runs of a forward with symbols in place of tensors: no input is needed.

``torch.fx`` traces with symbols too, but patches ``nn.Module`` for all threads while it does, and gives up at the first
``if`` or ``len``. Here what a forward asks of a symbol is answered: conditions with both answers, numbers with
different ones, and random draws are symbols as well.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ws_algorithm.tracing import symbol as symbol_file
from ws_algorithm.tracing.following import Reading
from ws_algorithm.tracing.recorder import INPUT, OUTPUT, Recorder, Run, changed_in_place
from ws_algorithm.tracing.symbol import Symbol, name_of
from ws_algorithm.tracing.undisturbed import HiddenDraws, global_draws, in_this_thread, is_generator

# What a forward is told that asks a symbol for a number or a length; what it does should not depend on it
_NUMBERS = (4, 7, 1)
# A forward with more conditions is not tried in all its ways
_MOST_CONDITIONS = 32
# After so many equal answers at one place, a loop is told to end
_MOST_ROUNDS = 256

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
    "tensor_split unbind detach data contiguous alias to".split()
)

Answers = Mapping[Hashable, bool]


@dataclass(frozen=True)
class Ways:
    """What runs with symbols have shown.

    Args:
        runs: One for each way through forward that was found.
        complete: Whether all that was tried got through, so that what no run uses is not used.
    """

    runs: list[Run]
    complete: bool


def symbolic_ways(module: nn.Module) -> Ways:
    """The ways through the forward of a model, in training and in evaluation.

    Raises:
        Exception: Whatever forward raises if it does not get through, in neither of the two.
        RuntimeError: If it has too many ways, or which convolutions it uses depends on a number.
    """
    found: list[Ways] = []
    failures: list[Exception] = []
    for training in (True, False):
        try:
            found.append(_ways(module, training))
        except Exception as failure:  # whatever the user's code raises when given symbols
            failures.append(failure)
    if not found:
        raise failures[-1]
    return Ways([run for ways in found for run in ways.runs], not failures and all(ways.complete for ways in found))


def _ways(module: nn.Module, training: bool) -> Ways:
    """Runs in which every condition has had both answers, as far as they lead to the end."""
    base = _passage(module, training, _NUMBERS[0], {})
    trials, failed = [base], False
    tried = set(base.answers.items())
    for trial in trials:  # grows meanwhile
        for index, condition in enumerate(trial.asked):
            answers = {earlier: trial.answers[earlier] for earlier in trial.asked[:index]}
            other = not trial.answers[condition]
            if (condition, other) in tried:
                continue
            if len(tried) > 2 * _MOST_CONDITIONS:
                raise RuntimeError(f"forward depends on more than {_MOST_CONDITIONS} conditions of its input")
            tried.add((condition, other))
            try:
                trials.append(_passage(module, training, _NUMBERS[0], answers | {condition: other}))
            except Exception:  # no way through: forward checks its input here
                failed = True
                continue
            tried |= set(trials[-1].answers.items())
    if any(trial.gave_a_number for trial in trials):
        others, refused = _with_other_numbers(module, training, base)
        trials, failed = trials + others, failed or refused
    return Ways([trial.operations for trial in trials], not failed)


def _with_other_numbers(module: nn.Module, training: bool, base: _Trial) -> tuple[list[_Trial], bool]:
    """Runs with other answers to questions for a number, and whether some did not get through."""
    used = Reading(base.operations).calls.keys()
    trials, refused = [], False
    for number in _NUMBERS[1:]:
        try:
            trial = _passage(module, training, number, base.answers)
        except Exception:  # forward checks a number here
            refused = True
            continue
        if Reading(trial.operations).calls.keys() != used:
            raise RuntimeError("which convolutions forward uses depends on a number or length that it computes")
        trials.append(trial)
    return trials, refused


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
            if trial.hidden_draws is None or not _are_repeated(trial.hidden_draws, module, training, number, given):
                return trial
            raise RuntimeError("forward draws random numbers in a way that cannot be followed")
        open_conditions = [c for c in trial.asked if c not in given]
        if not open_conditions or len(trial.asked) > _MOST_CONDITIONS:
            raise failure
        given |= {condition: True for condition in open_conditions[:-1]} | {open_conditions[-1]: False}


def _are_repeated(
    draws: HiddenDraws, module: nn.Module, training: bool, number: int, answers: dict[Hashable, bool]
) -> bool:
    """Whether hidden draws happen in every run, and so in this thread; then they are undone."""
    for _ in range(2):
        trial = _Trial(module, training, number, answers)
        trial.go()
        if trial.hidden_draws is None:
            return False
    draws.undo()
    return True


class _Trial(Recorder):
    """One run with symbols.

    Attributes:
        asked: The places in the code that made a condition of a symbol, in order.
        answers: What they were told.
        gave_a_number: Whether a symbol was asked for a number.
        hidden_draws: Those that happened meanwhile, in this thread or another.
    """

    def __init__(self, module: nn.Module, training: bool, number: int, answers: Answers) -> None:
        super().__init__(module, training=training, data=False)
        self.asked: list[Hashable] = []
        self.answers = dict(answers)
        self.gave_a_number = False
        self.hidden_draws: HiddenDraws | None = None
        self._number = number
        self._rounds: Counter[Hashable] = Counter()
        self._written: dict[int, tuple[Tensor, int]] = {}  # tensors of forward's own that hold what was computed

    def go(self) -> None:
        args, kwargs = self._arguments()
        attributes = [value for part in self.shadow.modules() for value in vars(part).values()]
        draws = HiddenDraws(filter(is_generator, attributes))
        with self, self._lenient_functions():
            output = self.shadow.forward(*args, **kwargs)
        self.add(OUTPUT, output)
        self.hidden_draws = draws if draws.have_happened() else None

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
        if isinstance(value, Symbol):
            return value.position
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
        position = self.add(name, args, kwargs, part)
        changed = changed_in_place(name, args, kwargs, part)
        if isinstance(changed, Symbol):
            changed.changed_by(position)
        elif isinstance(changed, Tensor):
            self._written[id(changed)] = (changed, position)
        first = args[0] if args else None
        return Symbol.of(self, position, first if name in _VIEWS and isinstance(first, Symbol) else None)

    def decide(self) -> bool:
        place = _place_in_forward()
        if place not in self.asked:
            self.asked.append(place)
        self._rounds[place] += 1
        answer = self.answers.setdefault(place, True)
        return answer if self._rounds[place] <= _MOST_ROUNDS else not answer

    def give_a_number(self) -> int:
        self.gave_a_number = True
        return self._number

    @contextmanager
    def _lenient_functions(self) -> Iterator[None]:
        def lenient(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if any(isinstance(value, Symbol) for value in tree_leaves((args, kwargs))):
                    return self.respond(name_of(function), args, kwargs)
                return function(*args, **kwargs)

            return call

        def drawn(name: str) -> Callable[..., Any]:
            def draw(*args: Any, **kwargs: Any) -> Any:
                if name in _PICKS:
                    raise TypeError(f"forward picks at random, with {name}")
                return self.respond(name, (), {})

            return draw

        with ExitStack() as stack:
            stack.enter_context(
                in_this_thread({(torch, name): lenient(getattr(torch, name)) for name in _STRICT_FUNCTIONS})
            )
            stack.enter_context(in_this_thread({(owner, name): drawn(name) for owner, name in global_draws()}))
            yield


def _without_data(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _place_in_forward() -> Hashable:
    """Where, in the code that is not ours, a symbol is being asked."""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in (__name__, symbol_file.__name__):
        frame = frame.f_back
    return frame.f_code, frame.f_lasti
