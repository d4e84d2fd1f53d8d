"""Random numbers: generators are left as they were, and a forward that draws is noticed."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OF_ALL_MODULES = frozenset(vars(nn.Module()))


@contextmanager
def random_states_restored(module: nn.Module) -> Iterator[None]:
    """Return generators to where they were: those of torch, CUDA, Python, NumPy, and those that a model keeps."""
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    generators = [torch.default_generator, *cuda, *global_generators(), *_kept_generators(module.modules())]
    states = [_state_of(generator) for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            if isinstance(generator, random.Random):
                generator.setstate(state)
            elif hasattr(generator, "bit_generator"):
                generator.bit_generator.state = state
            else:
                generator.set_state(state)


def seed_generators() -> None:
    """Let the global generators draw the same numbers in every process."""
    torch.manual_seed(0)
    for generator in global_generators():
        generator.seed(0)


class DrawsNoticed(TorchDispatchMode):
    """While it is on, draws change ``state()``: those of torch in this thread, those of Python and NumPy in any.

    Args:
        modules: Modules that may keep generators of Python or NumPy.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        generators = [*global_generators(), *_kept_generators(modules)]
        self._generators = [generator for generator in generators if not isinstance(generator, torch.Generator)]
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._count += torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        return func(*args, **(kwargs or {}))

    def state(self) -> bytes:
        """Return something that differs after a draw."""
        return pickle.dumps((self._count, *map(_state_of, self._generators)))


def global_generators() -> list[Any]:
    """Return the objects behind the functions of ``random`` and, if anyone has imported it, ``numpy.random``."""
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    functions: list[Any] = [random.seed, *([numpy_random.rand] if numpy_random else [])]
    return [function.__self__ for function in functions]


def _kept_generators(modules: Iterable[nn.Module]) -> list[Any]:
    """Those that are attributes of modules, or whose methods are."""
    attributes = [value for module in modules for name, value in vars(module).items() if name not in _OF_ALL_MODULES]
    values = [getattr(value, "__self__", value) for value in tree_leaves(attributes)]
    kinds: tuple[Any, ...] = (torch.Generator, random.Random, *(type(generator) for generator in global_generators()))
    is_one = [isinstance(v, kinds) or hasattr(v, "bit_generator") for v in values]
    return [v for v, one in zip(values, is_one, strict=True) if one and not isinstance(v, random.SystemRandom)]


def _state_of(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state()
