"""The formulas for all weights of a model at once: one kernel launch on CUDA, a loop over fused kernels elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ws_algorithm.formula import Formula, Standardized, project_gradient, standardize_with_statistics


@torch.inference_mode(False)
def standardize_all(weights: Sequence[Tensor], dtype: torch.dtype, formula: Formula) -> list[Standardized]:
    """:func:`~ws_algorithm.formula.standardize_with_statistics` of several weights, in `dtype`.

    The results may be used outside of inference mode as well.
    """
    results: list[Standardized | None] = [None] * len(weights)
    for positions, kernels in _launches([(weight, dtype) for weight in weights]):
        group = [weights[position].detach() for position in positions]
        outputs = [_empty_standardized(weight, dtype) for weight in group]
        kernels.standardize_all(group, *_columns(outputs), formula)
        for position, output in zip(positions, outputs, strict=True):
            results[position] = output
    return [
        standardize_with_statistics(weight.detach(), formula, dtype) if result is None else result
        for weight, result in zip(weights, results, strict=True)
    ]


@torch.no_grad()
def project_all(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], statistics: Sequence[Standardized], formula: Formula
) -> None:
    """:func:`~ws_algorithm.formula.project_gradient` of several gradients, in place."""
    launched: set[int] = set()
    for positions, kernels in _launches(list(zip(gradients, [weight.dtype for weight in weights], strict=True))):
        positions = [p for p in positions if _is_alike(gradients[p], weights[p]) and kernels.is_supported(weights[p])]
        if positions:
            _, means, scales = _columns([statistics[p] for p in positions])
            kernels.project_all(
                [gradients[p] for p in positions], [weights[p] for p in positions], means, scales, formula
            )
        launched.update(positions)
    for position, gradient in enumerate(gradients):
        if position not in launched:
            gradient.copy_(project_gradient(gradient, weights[position], statistics[position], formula))


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


def _empty_standardized(weight: Tensor, dtype: torch.dtype) -> Standardized:
    statistics = torch.empty(2, weight.shape[0], dtype=torch.float32, device=weight.device)
    return Standardized(torch.empty_like(weight, dtype=dtype), statistics[0], statistics[1])


def _columns(rows: Sequence[Standardized]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return [row.weight for row in rows], [row.mean for row in rows], [row.reciprocal_scale for row in rows]


def _is_alike(gradient: Tensor, weight: Tensor) -> bool:
    return gradient.stride() == weight.stride() and gradient.device == weight.device
