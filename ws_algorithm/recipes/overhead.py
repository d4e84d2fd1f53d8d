"""What Weight Standardization costs: time, bytes saved for backward and peak memory, one way beside the other.

In plain words, so that differences of a percent can be seen:

- all contestants are in one process and take turns, one step each per round, in an order that rotates;
- each ratio is that of two steps of the same round, and what is reported is the median over the rounds;
- the garbage collector runs between steps, never in one;
- on request the C library keeps freed memory, see :func:`keep_freed_memory`.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ws_algorithm.recipes.contest import Case, Contestant, check_choices
from ws_algorithm.recipes.rivals import RIVALS, reason_against

FEWEST_REPEATS = 9
_WARM_UPS = 2

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Record:
    """What one contestant took in one case.

    Args:
        case: The case.
        contestant: A key of ``RIVALS``.
        times: Seconds of each measured step.
        seconds: Their median and quartiles.
        ratio: Of the time to that of ``none`` in the same round.
        bytes_saved: What one micro-batch saves for its backward, parameters and buffers aside; ``None`` in evaluation.
        bytes_held: What lives from one micro-batch of a step to the next, parameters, their gradients, buffers and
            images aside, saved for backward as well or not; ``None`` in evaluation.
        peak_bytes: The most device memory of a step while the contestant is alone on it; ``None`` on a CPU.
    """

    case: Case
    contestant: str
    times: list[float]
    seconds: Spread
    ratio: Spread
    bytes_saved: int | None
    bytes_held: int | None
    peak_bytes: int | None


def keep_freed_memory() -> bool:
    """Have glibc keep the memory that is freed, instead of returning it to the system after each step.

    With its defaults the pages at the top of the heap, and blocks that were mapped on their own, are returned and
    faulted in again in every step: up to 30 % of its time, depending on which contestant's block happens to be where.
    The same as the environment variables ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_MMAP_THRESHOLD_``, for a process that
    runs already.

    Returns:
        Whether it does from now on; false where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    largest = 2**31 - 1
    mapped_only_if_larger = mallopt(_M_MMAP_THRESHOLD, largest) or mallopt(_M_MMAP_MAX, 0)
    return bool(mapped_only_if_larger and mallopt(_M_TRIM_THRESHOLD, -1))  # -1: never


def measure(
    case: Case,
    contestants: Sequence[str],
    repeats: int = FEWEST_REPEATS,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Record]:
    """Measure contestants in a case.

    A step is ``zero_grad``, forward, loss and backward of each micro-batch, and an SGD step with momentum; in
    evaluation it is one forward without gradients. Two rounds of steps come before those that count.

    Args:
        case: The case.
        contestants: Keys of ``RIVALS``; ``none``, which the others are compared with, takes part in any case.
        repeats: How many rounds count; at least 9.
        progress: Called with a line after each round.

    Returns:
        A record per contestant, ``none`` first.

    Raises:
        ValueError: If `repeats` is too small, or a contestant is unknown or cannot take part.
    """
    check_repeats(repeats)
    names = list(dict.fromkeys(["none", *contestants]))
    check_choices("contestants", names, RIVALS)
    for name in names:
        if reason := reason_against(name, case.mode):
            raise ValueError(f"`contestants` has {name!r}, which cannot take part: {reason}. Leave it out.")
    with _threads(case.threads):
        memory = {name: _memory(name, case) for name in names}
        times = _times(case, names, repeats, progress)
    return [
        Record(case, name, times[name], Spread.of(times[name]), ratio_to(times["none"], times[name]), *memory[name])
        for name in names
    ]


def check_repeats(repeats: int) -> None:
    """Raise ``ValueError`` if there are too few."""
    if repeats < FEWEST_REPEATS:
        raise ValueError(f"`repeats` (={repeats}) must be at least {FEWEST_REPEATS}: quartiles of fewer say little.")


def ratio_to(baseline: Sequence[float], times: Sequence[float]) -> Spread:
    """Median and quartiles of the ratio of two times, each of two steps of the same round."""
    return Spread.of([time / base for time, base in zip(times, baseline, strict=True)])


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _times(case: Case, names: list[str], repeats: int, progress: Callable[[str], None]) -> dict[str, list[float]]:
    contestants = {name: Contestant(name, case) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    rounds = _WARM_UPS + repeats
    with ExitStack() as stack:
        stack.enter_context(_frozen_garbage())
        if case.mode == "eval":
            for contestant in contestants.values():
                stack.enter_context(contestant.around())
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                seconds = _seconds_of_step(contestants[name])
                if number >= _WARM_UPS:
                    times[name].append(seconds)
            progress(f"{case.title}: round {number + 1} of {rounds}")
    return times


@contextmanager
def _frozen_garbage() -> Iterator[None]:
    """Collections in here look only at objects that are made in here, and so take no time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _seconds_of_step(contestant: Contestant) -> float:
    step = contestant.train if contestant.case.mode == "train" else contestant.evaluate
    gc.collect()
    gc.disable()
    try:
        _synchronize(contestant.case)
        start = time.perf_counter()
        step()
        _synchronize(contestant.case)
        return time.perf_counter() - start
    finally:
        gc.enable()


def _synchronize(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()


def _memory(name: str, case: Case) -> tuple[int | None, int | None, int | None]:
    """Bytes saved, bytes held and peak bytes of a contestant that is alone."""
    gc.collect()
    contestant = Contestant(name, case)
    step = contestant.train if case.mode == "train" else contestant.evaluate
    saved = held = peak = None
    with contestant.around() if case.mode == "eval" else ExitStack():
        step()
        if case.device == "cuda":
            step()
            torch.cuda.reset_peak_memory_stats()
            step()
            peak = torch.cuda.max_memory_allocated()
    if case.mode == "train":
        saved, held = _saved_and_held(contestant)
    return saved, held, peak


def _saved_and_held(contestant: Contestant) -> tuple[int, int]:
    images, targets = contestant.micro_batches[0]
    contestant.zero_grad()
    before = _alive(contestant)
    with contestant.around():
        first = _saved(contestant, images.clone(), _copy(targets))
        between = _alive(contestant)
        second = _saved(contestant, images.clone(), _copy(targets))
    contestant.zero_grad()
    held = {key: storage for key, storage in between.items() if key not in before}
    held |= {key: storage for key, storage in first.items() if key in second}
    return _bytes_of(first), _bytes_of(held)


# Storages by address. While they are in such a dict no other storage gets their address
_Storages = dict[int, torch.UntypedStorage]


def _copy(targets: Any) -> Any:
    """Labels, or what is known of each image, in memory of their own."""
    if isinstance(targets, Tensor):
        return targets.clone()
    return [{name: value.clone() for name, value in own.items()} for own in targets]


def _saved(contestant: Contestant, images: Tensor, targets: Any) -> _Storages:
    """What one micro-batch saves for its backward, parameters and buffers aside."""
    saved: _Storages = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = contestant.loss(images, targets)
    contestant.backward(loss)
    own = _own(contestant)
    return {key: storage for key, storage in saved.items() if key not in own}


def _alive(contestant: Contestant) -> _Storages:
    """What tensors of Python hold, those of the model itself aside."""
    gc.collect()
    own = _own(contestant)
    tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.layout == torch.strided]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == contestant.case.device]
    return {storage.data_ptr(): storage for storage in storages if storage.data_ptr() not in own}


def _own(contestant: Contestant) -> set[int]:
    """Addresses of parameters, their gradients and buffers."""
    parameters = list(contestant.model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return {tensor.untyped_storage().data_ptr() for tensor in [*parameters, *gradients, *contestant.model.buffers()]}


def _bytes_of(storages: _Storages) -> int:
    return sum(storage.nbytes() for storage in storages.values())
