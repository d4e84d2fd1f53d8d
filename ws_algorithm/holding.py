"""Standardized weights that are held for as long as the raw weight does not change, and when they may be."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace as fx_tracing

from ws_algorithm.formula import Formula, Standardized, project_gradient
from ws_algorithm.multi_tensor import standardize_all

# Elements of a raw weight that are compared, on a CPU, to notice an edit that PyTorch does not count (`.data`, NumPy)
_SAMPLES = 8

# Asked for every weight of every forward, between large convolutions that empty the caches: no lookups by name
_autocasts = torch.is_autocast_enabled
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack


class HeldWeight:
    """The standardized value of one raw weight, and what tells whether the raw weight has changed since.

    Made by :func:`hold_all`. What tells of a change is read before the value is computed: a thread that writes in
    between is noticed.

    Args:
        raw: The raw weight.
        formula: That standardizes it.
    """

    def __init__(self, raw: nn.Parameter, formula: Formula) -> None:
        self.raw = raw
        self.formula = formula
        self.statistics: Any = None
        self._by_dtype: dict[torch.dtype, tuple[Standardized, int]] = {}
        self._state = _state_of(raw)
        self._alive = raw.detach()  # its memory, so that the samples stay readable
        self._sampled = _view_of_samples(raw)
        self._samples = None if self._sampled is None else self._sampled.tobytes()
        self._kind = raw.device.type

    def take(self, standardized: Standardized) -> None:
        """Hold the standardized value and its statistics, in the dtype that is asked for first."""
        self._by_dtype = {standardized.weight.dtype: (standardized, standardized.weight._version)}
        self.statistics = standardized

    def is_current(self, raw: Tensor) -> bool:
        """Whether `raw` is the same weight with the same values as when it was standardized."""
        if raw is not self.raw or self._state != _state_of(raw):
            return False
        return self._sampled is None or self._sampled.tobytes() == self._samples

    def dtype_here(self) -> torch.dtype:
        """:func:`dtype_in_convolution` of the raw weight."""
        return dtype_in_convolution(self.raw) if _autocasts(self._kind) else self.raw.dtype

    def value(self, dtype: torch.dtype) -> Tensor:
        """The standardized weight in `dtype`; computed again if someone has written into the one that is held.

        Likewise if someone wants its gradient, which stays theirs then.
        """
        held = self._by_dtype.get(dtype)
        if held is None or held[0].weight._version != held[1] or held[0].weight.requires_grad:
            standardized = standardize_all([self.raw], dtype, self.formula)[0]
            held = self._by_dtype[dtype] = (standardized, standardized.weight._version)
        return held[0].weight

    def project(self, gradient: Tensor) -> Tensor:
        """The gradient of the raw weight, from that of the standardized weight that is held."""
        return project_gradient(gradient, self.weight_then(gradient), self.statistics, self.formula)

    @torch.no_grad()
    def weight_then(self, gradient: Tensor) -> Tensor:
        """The raw weight that was standardized, rebuilt if it has changed since."""
        if self.is_current(self.raw):
            return self.raw.detach()
        standardized, mean, scale = self.statistics
        shape = (-1, *[1] * (standardized.ndim - 1))
        return standardized.to(mean.dtype).div(scale.view(shape)).add_(mean.view(shape)).to(gradient.device)


def hold_all(raws: Sequence[nn.Parameter], formula: Formula, dtype: torch.dtype) -> list[HeldWeight]:
    """Standardize raw weights and hold the values, in one launch on CUDA."""
    held = [HeldWeight(raw, formula) for raw in raws]
    for one, standardized in zip(held, standardize_all(raws, dtype, formula), strict=True):
        one.take(standardized)
    return held


def may_be_held(weight: Tensor) -> bool:
    """Whether a value computed from `weight` now is still right later, in a call that PyTorch may not see.

    Not while a program is compiled, traced, transformed or captured, nor for weights that change unnoticed (FSDP).
    """
    if torch.compiler.is_compiling() or type(weight) is not nn.Parameter or is_watched(weight):
        return False
    if weight.is_meta or weight.is_inference() or weight.is_complex() or weight.numel() == 0:
        return False
    return not _shards_modules()


def is_watched(weight: Tensor) -> bool:
    """Whether the operations of this moment are recorded or transformed, so that a held value would be missed."""
    if _tracing_state() is not None or _dispatch_modes() > 0 or _transforms() is not None:
        return True
    if getattr(fx_tracing, "_is_fx_tracing_flag", False):
        return True
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def dtype_in_convolution(weight: Tensor) -> torch.dtype:
    """The dtype in which a convolution computes with `weight` here: that of autocast, if it is on."""
    kind = weight.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return weight.dtype
    return torch.get_autocast_dtype(kind)


def _shards_modules() -> bool:
    """Whether ``fully_shard`` is in use, which refills parameters behind PyTorch's version counters."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    composable = sys.modules.get("torch.distributed._composable_state")
    return composable is not None and bool(getattr(composable, "_module_state_mapping", True))


def _state_of(raw: Tensor) -> tuple[Any, ...]:
    """What changes with every edit that PyTorch counts; on CUDA with the stream as well, which orders the kernels."""
    stream = torch.cuda.current_stream(raw.device).cuda_stream if raw.is_cuda else 0
    return raw._version, raw.data_ptr(), raw.dtype, raw.stride(), stream


def _view_of_samples(raw: Tensor) -> memoryview | None:
    """Evenly spread elements of a raw weight on a CPU; elsewhere reading them would wait for the device."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(raw.shape, raw.stride(), strict=True))
    if raw.device.type != "cpu" or extent != raw.numel():
        return None
    step = max(1, raw.numel() // _SAMPLES)
    elements = (ctypes.c_char * (extent * raw.element_size())).from_address(raw.data_ptr())
    kinds: dict[int, Any] = {2: "H", 4: "I", 8: "Q"}
    return memoryview(elements).cast("B").cast(kinds[raw.element_size()])[::step]
