"""Standardized weights that are cached inside a scope, and the memory that they keep from one scope to the next.

In plain words:

- a cached weight is used only while the version counter and the address of the raw weight are those of the moment at
  which it was computed; inside a scope, every edit that PyTorch counts is noticed;
- its memory belongs to the standardizer and is written to again by the next scope, unless something still reads it;
- copies and files of a model have neither.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ws_algorithm.formula import Formula, Standardized, project_gradient
from ws_algorithm.multi_tensor import empty_standardized, has_layout_of, project_all, standardize_all
from ws_algorithm.torch_internals import shares_memory


class WeightCache:
    """What one standardizer keeps: the entry of the scope that is open, and memory for the standardized weight."""

    def __init__(self) -> None:
        self.entry: Any = None  # a `CacheEntry` while a scope is open
        self._memory: Standardized | None = None
        self._last: weakref.ref[CachedWeight] | None = None

    def memory_for(self, raw: Tensor, dtype: torch.dtype) -> Standardized:
        """Return the memory for the standardized weight of `raw` in `dtype`: that of the last one, if it is free."""
        memory = self._memory
        is_alike = memory is not None and memory.weight.dtype == dtype and has_layout_of(memory.weight, raw)
        if memory is None or not is_alike or shares_memory(memory.weight):
            memory = self._memory = empty_standardized(raw.detach(), dtype)
        elif self._last is not None and (last := self._last()) is not None:
            last.is_overwritten = True
        return memory

    def remember(self, cached: CachedWeight) -> None:
        """Note who writes to the memory now."""
        self._last = weakref.ref(cached)

    def release(self) -> int:
        """Give the memory back and return its bytes."""
        memory, self._memory = self._memory, None
        return 0 if memory is None else sum(part.nbytes for part in memory)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightCache:
        return WeightCache()

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        return WeightCache, ()


class CachedWeight:
    """The standardized value of one raw weight, and what tells whether the raw weight has changed since.

    Made by :func:`cache_weights`. What tells of a change is read before the value is computed: a thread that writes in
    between is noticed.

    Args:
        raw: The raw weight.
        formula: The formula that standardizes it.
        memory: The memory for the value and its statistics.
    """

    def __init__(self, raw: nn.Parameter, formula: Formula, memory: Standardized) -> None:
        self.raw = raw
        self.formula = formula
        self.memory = memory
        self.dtype = memory.weight.dtype
        self.stream = torch.cuda.current_stream(raw.device) if raw.is_cuda else None
        self.is_overwritten = False
        self._version, self._address, self._raw_dtype = raw._version, raw.data_ptr(), raw.dtype
        self._raw_memory = raw.detach()  # so that no other tensor gets its address
        self._kind = raw.device.type
        self.value: Any = None
        self._value_version = -1

    def set_value(self) -> None:
        """Take what has been written into the memory as the value."""
        self.value = self.memory.weight.detach()  # another tensor, by which the memory is known to be in use
        self._value_version = self.value._version

    def is_valid(self) -> bool:
        """Return whether a convolution here may use the value: no one has written to it or to the raw weight.

        It is asked for every weight of every forward, and calls as little as it can.
        """
        value, raw = self.value, self.raw
        if value is None or value._version != self._value_version or raw._version != self._version:
            return False  # without a value: another thread has closed the scope
        if raw.data_ptr() != self._address:
            return False
        return self.dtype is (convolution_dtype(raw) if torch.is_autocast_enabled(self._kind) else self._raw_dtype)

    def is_of_raw_weight(self) -> bool:
        """Return whether the raw weight has not changed since its value was computed."""
        raw = self.raw
        return raw._version == self._version and raw.data_ptr() == self._address and raw.dtype is self._raw_dtype

    def close(self) -> None:
        """Use the memory no longer; gradients of graphs that are left can still be projected."""
        self.value = None

    def project(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the raw weight, from that of the standardized weight; in new memory."""
        return project_gradient(gradient, *self.state_then(gradient), self.formula)

    @torch.no_grad()
    def state_then(self, gradient: Tensor) -> tuple[Tensor, Standardized]:
        """Return the raw weight that was standardized and its statistics, where `gradient` is.

        If the raw weight has changed since, it is computed back from the value.

        Raises:
            RuntimeError: If the value is gone as well.
        """
        if self.is_of_raw_weight():
            return self.raw.detach(), self.memory
        if self.is_overwritten:
            raise RuntimeError(
                "A weight that is standardized once was changed, and standardized again, between a forward and its "
                "backward. Run the backward first."
            )
        standardized, mean, reciprocal_scale = (part.to(gradient.device) for part in self.memory)
        shape = (-1, *[1] * (standardized.ndim - 1))
        weight = standardized.to(mean.dtype).div(reciprocal_scale.view(shape)).add_(mean.view(shape))
        return weight, Standardized(standardized, mean, reciprocal_scale)


@torch.inference_mode(False)
@torch.no_grad()
def cache_weights(
    caches: Sequence[WeightCache], raws: Sequence[nn.Parameter], formula: Formula, dtype: torch.dtype
) -> list[CachedWeight]:
    """Standardize raw weights into the memory of their caches, in one launch on CUDA, and return the values."""
    cached = [CachedWeight(raw, formula, cache.memory_for(raw, dtype)) for cache, raw in zip(caches, raws, strict=True)]
    standardize_all([raw.detach() for raw in raws], [one.memory for one in cached], formula)
    for cache, one in zip(caches, cached, strict=True):
        cache.remember(one)
        one.set_value()
    return cached


def project_cached(pending: Sequence[tuple[Tensor, CachedWeight]]) -> None:
    """Project gradients of cached weights in place, in one launch for each formula on CUDA."""
    by_formula: dict[Formula, list[tuple[Tensor, CachedWeight]]] = {}
    for gradient, cached in pending:
        by_formula.setdefault(cached.formula, []).append((gradient, cached))
    for formula, group in by_formula.items():
        weights, statistics = zip(*[cached.state_then(gradient) for gradient, cached in group], strict=True)
        project_all([gradient for gradient, _ in group], weights, statistics, formula)


def convolution_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which a convolution computes with `weight` here: that of autocast, where it is on."""
    kind = weight.device.type
    if not torch.is_autocast_enabled(kind) or weight.dtype == torch.float64:
        return weight.dtype
    return torch.get_autocast_dtype(kind)
