"""The formulas for all weights of a model at once: one kernel launch on CUDA, a loop over fused kernels elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ws_algorithm.formula import (
    Formula,
    Standardized,
    is_one_kernel,
    project_gradient,
    standardize_with_statistics,
)

# Elements that are computed at a time on a CPU: their temporary memory stays in its cache
_BLOCK = 2**17


def empty_standardized(weight: Tensor, dtype: torch.dtype) -> Standardized:
    """Return memory for :func:`standardize_all`: the layout of `weight` in `dtype`, statistics in its precision."""
    precision = torch.float32 if weight.dtype.itemsize < 4 else weight.dtype
    statistics = torch.empty(2, weight.shape[0], dtype=precision, device=weight.device)
    return Standardized(torch.empty_like(weight, dtype=dtype), statistics[0], statistics[1])


@torch.no_grad()
def standardize_all(weights: Sequence[Tensor], outputs: Sequence[Standardized], formula: Formula) -> None:
    """Write :func:`~ws_algorithm.formula.standardize_with_statistics` of several weights into memory that is there.

    Args:
        weights: The raw weights.
        outputs: The memory for each of them, made by :func:`empty_standardized`, in the dtype of the result.
        formula: The formula of all of them.
    """
    launched: set[int] = set()
    dtypes = [output.weight.dtype for output in outputs]
    for positions, kernels in _launches(list(zip(weights, dtypes, strict=True))):
        kernels.standardize_all(
            [weights[p].detach() for p in positions], *_columns([outputs[p] for p in positions]), formula
        )
        launched.update(positions)
    for position, (weight, output) in enumerate(zip(weights, outputs, strict=True)):
        if position not in launched:
            _standardize_in_blocks(weight.detach(), output, formula)


@torch.no_grad()
def project_all(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], statistics: Sequence[Standardized], formula: Formula
) -> None:
    """:func:`~ws_algorithm.formula.project_gradient` of several gradients, in place."""
    launched: set[int] = set()
    for positions, kernels in _launches(list(zip(gradients, [weight.dtype for weight in weights], strict=True))):
        positions = [
            p for p in positions if has_layout_of(gradients[p], weights[p]) and kernels.is_supported(weights[p])
        ]
        if positions:
            _, means, scales = _columns([statistics[p] for p in positions])
            kernels.project_all(
                [gradients[p] for p in positions], [weights[p] for p in positions], means, scales, formula
            )
        launched.update(positions)
    for position, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
        if position not in launched:
            _project_in_blocks(gradient, weight, statistics[position], formula)


def _standardize_in_blocks(weight: Tensor, output: Standardized, formula: Formula) -> None:
    """Standardize a weight into memory that is there, a few rows at a time."""

    def compute(block: Tensor) -> Any:
        if is_bare:  # many blocks are small, and take as long as what is called for them
            return torch.native_layer_norm(block, shape, None, None, formula.eps)
        return standardize_with_statistics(block, formula, dtype)

    shape, dtype = weight.shape[1:], output.weight.dtype
    is_bare = is_one_kernel(weight, formula) and dtype == weight.dtype
    rows = _rows_at_a_time(weight)
    of_blocks = []
    for block, target in zip(weight.split(rows), output.weight.split(rows), strict=True):
        values, *statistics = compute(block)
        target.copy_(values)
        of_blocks.append(statistics)
    for target, parts in zip(output[1:], zip(*of_blocks, strict=True), strict=True):
        target.copy_(torch.cat(parts).flatten())


def _project_in_blocks(gradient: Tensor, weight: Tensor, statistics: Standardized, formula: Formula) -> None:
    """Project a gradient in its own memory, a few rows at a time."""

    def compute(gradient: Tensor, weight: Tensor, mean: Tensor, reciprocal_scale: Tensor) -> Tensor:
        if is_bare:
            return backward(gradient, weight, shape, mean, reciprocal_scale, None, None, [True, False, False])[0]
        return project_gradient(gradient, weight, Standardized(weight, mean, reciprocal_scale), formula)

    backward: Any = torch.ops.aten.native_layer_norm_backward
    shape = weight.shape[1:]
    is_alike = gradient.dtype == weight.dtype and gradient.is_contiguous() and gradient.device == weight.device
    is_bare = is_alike and is_one_kernel(weight, formula)
    rows = _rows_at_a_time(weight)
    columns = (gradient, weight, statistics.mean, statistics.reciprocal_scale)
    for block, *others in zip(*[column.split(rows) for column in columns], strict=True):
        block.copy_(compute(block, *others))


def _rows_at_a_time(weight: Tensor) -> int:
    count = _BLOCK * len(weight) // max(weight.numel(), 1) if weight.device.type == "cpu" else len(weight)
    return max(count, 1)


def _launches(tensors: list[tuple[Tensor, torch.dtype]]) -> list[tuple[list[int], ModuleType]]:
    """Positions of the CUDA tensors that one launch can serve: of one device, dtype and other dtype."""
    groups: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
    for position, (tensor, other_dtype) in enumerate(tensors):
        if tensor.is_cuda and other_dtype != torch.float64:
            groups.setdefault((tensor.device, tensor.dtype, other_dtype), []).append(position)
    kernels = _triton_kernels() if groups else None
    if kernels is None:
        return []
    supported = ([p for p in group if kernels.is_supported(tensors[p][0])] for group in groups.values())
    return [(positions, kernels) for positions in supported if positions]


def _triton_kernels() -> ModuleType | None:
    """Imported when the first CUDA weight comes: a machine without CUDA never imports Triton."""
    try:
        from ws_algorithm import triton_kernels
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        return None
    return triton_kernels


def _columns(rows: Sequence[Standardized]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return [row.weight for row in rows], [row.mean for row in rows], [row.reciprocal_scale for row in rows]


def has_layout_of(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have one shape, device and order in memory; strides of one element do not count."""
    if tensor.shape != other.shape or tensor.device != other.device:
        return False
    strides = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    return tensor.stride() == other.stride() or all(size == 1 or one == two for size, one, two in strides)
