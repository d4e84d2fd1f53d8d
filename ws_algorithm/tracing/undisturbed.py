"""Surroundings in which a forward can be tried without a trace."""

from __future__ import annotations

import builtins
import functools
import io
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

# One trial at a time: what is replaced for a moment is shared by all threads
_TRIAL = threading.RLock()

_PYTHON_GENERATOR: Any = random.seed.__self__

Function = Callable[..., Any]


class SideEffect(RuntimeError):
    """A forward on trial was about to change something outside of itself."""


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Where a forward can be tried: it writes no file, and draws the same random numbers in every process.

    For this thread alone, Python's and NumPy's global generators are replaced by private ones and seeding torch does
    nothing, nor do printing and warning; what would write, rename or remove a file, or start a process or a thread,
    raises :class:`SideEffect`. Other threads run and draw as they would.

    Args:
        module: The model whose forward is tried.
    """
    try:
        with _TRIAL, _settings_kept(), _no_files_written(), _private_draws(module), _silence(), torch.no_grad():
            yield
    except FromOutside as outside:
        assert outside.__cause__ is not None
        raise outside.__cause__ from None


@contextmanager
def in_this_thread(replacements: Mapping[tuple[Any, str], Function]) -> Iterator[None]:
    """Replace functions, given by owner and name, for calls from this thread; others reach what was there."""
    thread: int | None = threading.get_ident()

    def divided(original: Function, replacement: Function) -> Function:
        @functools.wraps(original)  # other threads may pickle it, by its name
        def call(*args: Any, **kwargs: Any) -> Any:
            chosen = replacement if threading.get_ident() == thread else original
            return chosen(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for (owner, name), replacement in replacements.items():
            stack.enter_context(mock.patch.object(owner, name, divided(getattr(owner, name), replacement)))
        try:
            yield
        finally:
            thread = None  # a module that forward imports may keep what it found here


@contextmanager
def draws_answered_by(answer: Callable[[str], Any]) -> Iterator[None]:
    """Let `answer`, given the name of a method, stand for what Python's and NumPy's global generators return."""
    global _answer
    before, _answer = _answer, answer
    try:
        yield
    finally:
        _answer = before


_answer: Callable[[str], Any] | None = None  # of the one trial at a time
_redirections: dict[int, Function] = {}


def redirections() -> dict[int, Function]:
    """By identity: for each function that draws from a global generator, what to call instead on trial."""
    return _redirections


@contextmanager
def _private_draws(module: nn.Module) -> Iterator[None]:
    methods = _methods_of_generators()
    replacements: dict[tuple[Any, str], Function] = {}
    for owner in (random, getattr(sys.modules.get("numpy"), "random", None), *_python_modules_of(module)):
        for name, value in list(vars(owner).items()) if owner else ():
            private = methods.get(id(getattr(value, "__self__", None)))
            if private is not None and callable(value):
                replacements[owner, name] = _drawing(private, value.__name__)
                _redirections[id(value)] = replacements[owner, name]
    for owner in (torch, torch.random, torch.cuda, torch.cuda.random):
        for name in "manual_seed manual_seed_all seed seed_all set_rng_state set_rng_state_all".split():
            if hasattr(owner, name):
                replacements[owner, name] = lambda *args, **kwargs: torch.default_generator
    try:
        with in_this_thread(replacements):
            yield
    finally:
        _redirections.clear()


def _methods_of_generators() -> dict[int, Any]:
    """By the identity of each global generator: a private one of its kind, with a fixed seed."""
    return {id(generator): type(generator)(0) for generator in global_generators() if is_generator(generator)}


def _drawing(private: Any, method: str) -> Function:
    def draw(*args: Any, **kwargs: Any) -> Any:
        return _answer(method) if _answer is not None else getattr(private, method)(*args, **kwargs)

    return draw


def _python_modules_of(module: nn.Module) -> list[Any]:
    """Those in which the classes of a model are defined: they may have imported functions that draw."""
    names = {cls.__module__ for part in module.modules() for cls in type(part).__mro__}
    return [sys.modules[name] for name in sorted(names) if name in sys.modules and not name.startswith("torch.")]


class HiddenDraws:
    """Draws that cannot be seen while they happen: from generators of a model's own, or through names of its own.

    From the global generators other threads may draw too, so they are looked at in a process with one thread alone.

    Args:
        own: Generators of Python or NumPy beside the global ones.
    """

    def __init__(self, own: Iterable[Any] = ()) -> None:
        self._generators = [*own, *(global_generators() if threading.active_count() == 1 else ())]
        self._states = [_state_of(generator) for generator in self._generators]

    def have_happened(self) -> bool:
        """Whether a generator is no longer where it was."""
        return pickle.dumps([_state_of(generator) for generator in self._generators]) != pickle.dumps(self._states)

    def undo(self) -> None:
        """Return the generators to where they were."""
        for generator, state in zip(self._generators, self._states, strict=True):
            _set_state(generator, state)


@contextmanager
def _settings_kept() -> Iterator[None]:
    dtype, draws = torch.get_default_dtype(), HiddenDraws()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        draws.undo()


def global_generators() -> list[Any]:
    """Those behind the functions of torch on the CPU, ``random`` and, if it has been imported, ``numpy.random``."""
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    return [torch.default_generator, _PYTHON_GENERATOR, *([numpy_random.mtrand._rand] if numpy_random else [])]


def is_generator(value: Any) -> bool:
    """Whether a value is a generator of Python or NumPy."""
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    kinds = (numpy_random.RandomState, numpy_random.Generator) if numpy_random else ()
    return isinstance(value, (random.Random, *kinds)) and not isinstance(value, random.SystemRandom)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state(legacy=False)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.tensor(state, dtype=torch.uint8, device="cpu"))
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


@contextmanager
def _silence() -> Iterator[None]:
    """What a forward prints and warns of is for those who run it."""
    quiet = {(builtins, "print"), (warnings, "warn"), (warnings, "warn_explicit")}
    with in_this_thread({place: lambda *args, **kwargs: None for place in quiet}):
        yield


@contextmanager
def _no_files_written() -> Iterator[None]:
    def guarded(function: Function, writes: Callable[..., bool]) -> Function:
        def guard(*args: Any, **kwargs: Any) -> Any:
            if writes(*args, **kwargs) and _is_forwards_own():
                raise SideEffect(f"forward calls {function.__name__}{args!r:.80} while it is only being looked at")
            return function(*args, **kwargs)

        return guard

    writing: dict[tuple[Any, str], Callable[..., bool]] = {
        (builtins, "open"): _opens_to_write,
        (io, "open"): _opens_to_write,
        (os, "open"): _opens_descriptor_to_write,
    }
    always = "mkdir remove unlink rename replace rmdir truncate symlink link chmod system putenv unsetenv".split()
    writing |= {(os, name): _always for name in always if hasattr(os, name)}
    writing |= {(torch, "save"): _always, (subprocess, "Popen"): _always, (threading.Thread, "start"): _always}
    with in_this_thread({place: guarded(getattr(*place), writes) for place, writes in writing.items()}):
        yield


def _opens_to_write(file: Any, mode: Any = "r", *args: Any, **kwargs: Any) -> bool:
    return any(letter in str(mode) for letter in "wax+")


def _opens_descriptor_to_write(path: Any, flags: int, *args: Any, **kwargs: Any) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR))


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def _is_forwards_own() -> bool:
    """Whether forward is doing this, and not what runs in between: an import, a finalizer, a handler of a signal.

    Half a module would stay imported, a temporary folder on the disk, a checkpoint unwritten.
    """
    handlers = _codes_of_signal_handlers()
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") != "ws_algorithm.tracing.recorder":
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib") or code.co_name == "__del__" or code in handlers:
            return False
        if frame.f_globals.get("__name__") == "weakref":
            return False
        frame = frame.f_back
    return True


def _codes_of_signal_handlers() -> set[Any]:
    handlers = (signal.getsignal(number) for number in signal.valid_signals())
    return {getattr(getattr(handler, "__func__", handler), "__code__", None) for handler in handlers} - {None}


class FromOutside(BaseException):
    """Carries an exception that a handler of a signal has raised past those who expect some from forward."""


def is_from_outside(error: BaseException) -> bool:
    """Whether a handler of a signal has raised an exception."""
    handlers = _codes_of_signal_handlers()
    return any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__))
