"""Weight Standardization of many tensors in one launch, as Triton kernels.

A step of a convolutional network standardizes dozens of small weights, and one launch per weight takes longer than the
work. Here a table on the device lists the addresses of all tensors, and each program of a launch looks up its rows.

Sources: Qiao et al. 2019, https://arxiv.org/abs/1903.10520, section 3.1, for the formulas; the multi-tensor tables
follow the grouped matrix product of Triton's tutorials, https://triton-lang.org.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]  # not in the wheels of torch for CPUs
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from ws_algorithm.formula import Formula

Tensors = Sequence[Tensor]

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# A program holds 2048 values, 16 in each of its 128 threads: some short rows, one row, or a piece of a longer one
_ROWS = tl.constexpr(4)
_SHORT = tl.constexpr(512)
_LONG = tl.constexpr(2048)


def is_supported(tensor: Tensor) -> bool:
    """Whether the kernels can work on `tensor`.

    It must be a plain tensor of float32, float16 or bfloat16 whose rows ``tensor[o]`` are dense blocks of memory, one
    after the other; inside a row any order of dimensions will do, such as ``channels_last``. None is supported while
    a CUDA graph is captured.

    Example:
        >>> is_supported(torch.ones(8, 4, 3, 3)), is_supported(torch.ones(4, 8, 3, 3).transpose(0, 1))
        (True, False)
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        return False
    if tensor.dtype not in _DTYPES or tensor.ndim < 1 or tensor.numel() == 0:
        return False
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # replays would copy the tables again, from memory that is free by then
    n = 1
    for stride, size in sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True)):
        if size != 1 and stride != n:
            return False
        n *= size
    return tensor.shape[0] == 1 or tensor.stride(0) == n


def standardize_all(weights: Tensors, outputs: Tensors, means: Tensors, scales: Tensors, formula: Formula) -> None:
    r"""Standardize all `weights` in one launch.

    .. math:: \hat{W}_{o} = (W_{o} - \mu_{o}) \, r_{o}, \qquad r_{o} = 1 / s_{o}

    with the scale :math:`s` of :class:`~ws_algorithm.formula.Formula`, computed in float32.

    Args:
        weights: Tensors ``(O_i, ...)`` of one dtype on one device, for which :func:`is_supported` holds.
        outputs: Receive :math:`\hat{W}`: shapes and strides of the weights, one dtype of their own.
        means, scales: Receive :math:`\mu` and :math:`r`: float32, shapes ``(O_i,)``.
        formula: Which scale.

    Source: https://arxiv.org/abs/1903.10520, equations 7 and 8.
    """
    _launch((weights, outputs, means, scales), formula, project=False)


def project_all(gradients: Tensors, weights: Tensors, means: Tensors, scales: Tensors, formula: Formula) -> None:
    r"""Turn gradients of standardized weights into gradients of the raw weights, in place and in one launch.

    .. math:: g_{i} \leftarrow r \left( g_{i} - \bar{g} - \hat{w}_{i} \, \frac{k}{m} \sum_{j} g_{j} \hat{w}_{j} \right)

    for each row, where :math:`m` is what the variance divides by, :math:`k = 1` with ``eps`` under the root, else
    :math:`k = s / \sigma = 1 / (1 - r \, \mathrm{eps})` with the standard deviation :math:`\sigma`; the last term is 0
    where :math:`\sigma` is 0. Computed in float32.

    Args:
        gradients: Shapes and strides of `weights`, one dtype of their own; replaced.
        weights: The raw weights that :func:`standardize_all` read.
        means, scales: What it wrote.
        formula: The same as there.

    Source: the derivative of :math:`\hat{W}`; https://arxiv.org/abs/1903.10520, section 3.2.
    """
    _launch((weights, gradients, means, scales), formula, project=True)


def _launch(tables: tuple[Tensors, Tensors, Tensors, Tensors], formula: Formula, project: bool) -> None:
    """Run on `tables`: the weights, what is written, the means and the inverse scales."""
    weights, written = tables[:2]
    device = weights[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
        shapes = tuple((weight.shape[0], weight.numel() // weight.shape[0]) for weight in weights)
        programs, sizes = _programs(shapes, device, stream)
        launch: Any = _kernel[(len(programs),)]
        launch(
            programs,
            sizes,
            *(_addresses(tuple(tensor.data_ptr() for tensor in tensors), device, stream) for tensors in tables),
            *_scale_arguments(formula),
            WEIGHT=_DTYPES[weights[0].dtype],
            WRITTEN=_DTYPES[written[0].dtype],
            PROJECT=project,
            num_warps=4,
        )
    for tensor in written:  # one by one: torch 2.4 takes no list
        torch.autograd.graph.increment_version(tensor)


def _scale_arguments(formula: Formula) -> tuple[float, float, float]:
    """`correction`, `under`, `beside`: ``m = max(n - correction, 1)`` and ``s = sqrt(var + under) + beside``."""
    eps = float(formula.eps)
    return (float(formula.unbiased), eps, 0.0) if formula.eps_inside_root else (float(formula.unbiased), 0.0, eps)


# The stream is a part of the keys of both tables: on another one the copy to the device might not be done yet


@lru_cache(maxsize=8)
def _programs(shapes: tuple[tuple[int, int], ...], device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """Tables ``(programs, 2)`` of a program's tensor and first row, and ``(tensors, 2)`` of rows and their length."""
    programs = []  # the longest rows first, lest a few of them run on alone at the end
    for index in sorted(range(len(shapes)), key=lambda index: shapes[index][1], reverse=True):
        rows, n = shapes[index]
        step = _ROWS.value if n <= _SHORT.value else 1
        first = torch.arange(0, rows, step, dtype=torch.int32, device="cpu")
        programs.append(torch.stack([torch.full_like(first, index), first], dim=1))
    sizes = torch.tensor(shapes, dtype=torch.int32, device="cpu")
    return _to_device(torch.cat(programs), device), _to_device(sizes, device)


@lru_cache(maxsize=32)  # eight calls' four each
def _addresses(addresses: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return _to_device(torch.tensor(addresses, dtype=torch.int64, device="cpu"), device)


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    # Torch keeps pinned memory until it is copied
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


# Below, a row is the `n` values from ``row * n`` on, and ``c`` are a row's weights less their mean


@triton.jit
def _kernel(
    programs,
    sizes,
    weights,
    written,
    means,
    scales,
    correction,
    under,
    beside,
    WEIGHT: tl.constexpr,
    WRITTEN: tl.constexpr,
    PROJECT: tl.constexpr,
):
    program = tl.program_id(0)
    index = tl.load(programs + 2 * program)
    row = tl.load(programs + 2 * program + 1)
    rows = tl.load(sizes + 2 * index)
    n = tl.load(sizes + 2 * index + 1)
    w = tl.load(weights + index).to(tl.pointer_type(WEIGHT))  # pyright: ignore[reportArgumentType]
    out = tl.load(written + index).to(tl.pointer_type(WRITTEN))  # pyright: ignore[reportArgumentType]
    mean = tl.load(means + index).to(tl.pointer_type(tl.float32))
    scale = tl.load(scales + index).to(tl.pointer_type(tl.float32))
    if n <= _SHORT:
        if PROJECT:
            _project_tile(w, out, mean, scale, row, rows, n, correction, beside, _ROWS, _SHORT)
        else:
            _standardize_tile(w, out, mean, scale, row, rows, n, correction, under, beside, _ROWS, _SHORT)
    elif n <= _LONG:
        if PROJECT:
            _project_tile(w, out, mean, scale, row, rows, n, correction, beside, 1, _LONG)
        else:
            _standardize_tile(w, out, mean, scale, row, rows, n, correction, under, beside, 1, _LONG)
    else:
        if PROJECT:
            _project_row(w, out, mean, scale, row, n, correction, beside)
        else:
            _standardize_row(w, out, mean, scale, row, n, correction, under, beside)


@triton.jit
def _standardize_tile(
    w, out, mean, scale, row, rows, n, correction, under, beside, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row += tl.arange(0, ROWS)[:, None]
    exists = row < rows
    column = tl.arange(0, COLUMNS)[None, :]
    inside = exists & (column < n)
    place = row.to(tl.int64) * n + column
    # Differences to one value of the row keep the digits that a large mean, rounded, would lose
    origin = tl.load(w + row.to(tl.int64) * n, mask=exists, other=0.0).to(tl.float32)
    shifted = tl.load(w + place, mask=inside, other=0.0).to(tl.float32) - origin
    shift = tl.sum(tl.where(inside, shifted, 0.0), axis=1, keep_dims=True) / n
    c = tl.where(inside, shifted - shift, 0.0)
    r = _inverse_scale(tl.sum(c * c, axis=1, keep_dims=True), n, correction, under, beside)
    tl.store(out + place, c * r, mask=inside)
    tl.store(mean + row, origin + shift, mask=exists)
    tl.store(scale + row, r, mask=exists)


@triton.jit
def _standardize_row(w, out, mean, scale, row, n, correction, under, beside):
    first = row.to(tl.int64) * n
    origin = tl.load(w + first).to(tl.float32)
    sums = tl.zeros([_LONG], dtype=tl.float32)
    for start in range(0, n, _LONG):
        values, _, inside = _piece(w + first, start, n)
        sums += tl.where(inside, values - origin, 0.0)
    shift = tl.sum(sums, axis=0) / n
    squares = tl.zeros([_LONG], dtype=tl.float32)
    for start in range(0, n, _LONG):
        values, _, inside = _piece(w + first, start, n)
        c = tl.where(inside, values - origin - shift, 0.0)
        squares += c * c
    r = _inverse_scale(tl.sum(squares, axis=0), n, correction, under, beside)
    for start in range(0, n, _LONG):
        values, column, inside = _piece(w + first, start, n)
        tl.store(out + first + column, (values - origin - shift) * r, mask=inside)
    tl.store(mean + row, origin + shift)
    tl.store(scale + row, r)


@triton.jit
def _piece(values, start, n):
    """The values from `start` on, in float32; their columns, and which of them are in the row."""
    column = start + tl.arange(0, _LONG)
    inside = column < n
    return tl.load(values + column, mask=inside, other=0.0).to(tl.float32), column, inside


@triton.jit
def _inverse_scale(squares, n, correction, under, beside):
    return 1.0 / (tl.sqrt(squares / tl.maximum(n - correction, 1.0) + under) + beside)


@triton.jit
def _project_tile(w, g, mean, scale, row, rows, n, correction, beside, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row += tl.arange(0, ROWS)[:, None]
    exists = row < rows
    column = tl.arange(0, COLUMNS)[None, :]
    inside = exists & (column < n)
    place = row.to(tl.int64) * n + column
    r = tl.load(scale + row, mask=exists, other=0.0)
    centre = tl.load(mean + row, mask=exists, other=0.0)
    c = tl.load(w + place, mask=inside, other=0.0).to(tl.float32) - centre
    c -= tl.sum(tl.where(inside, c, 0.0), axis=1, keep_dims=True) / n  # what rounding the mean has left
    gradient = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
    gradient -= tl.sum(gradient, axis=1, keep_dims=True) / n
    dot = tl.sum(tl.where(inside, gradient * c, 0.0), axis=1, keep_dims=True)
    tl.store(g + place, r * (gradient - c * _factor(dot * r, r, n, correction, beside)), mask=inside)


@triton.jit
def _project_row(w, g, mean, scale, row, n, correction, beside):
    first = row.to(tl.int64) * n
    r = tl.load(scale + row)
    centre = tl.load(mean + row)
    c_sums = tl.zeros([_LONG], dtype=tl.float32)
    gradient_sums = tl.zeros([_LONG], dtype=tl.float32)
    dots = tl.zeros([_LONG], dtype=tl.float32)
    for start in range(0, n, _LONG):
        values, _, inside = _piece(w + first, start, n)
        gradient, _, _ = _piece(g + first, start, n)
        c = tl.where(inside, values - centre, 0.0)
        c_sums += c
        gradient_sums += gradient
        dots += gradient * c
    rest = tl.sum(c_sums, axis=0) / n
    gradient_mean = tl.sum(gradient_sums, axis=0) / n
    dot = tl.sum(dots, axis=0) - n * rest * gradient_mean
    factor = _factor(dot * r, r, n, correction, beside)
    for start in range(0, n, _LONG):
        values, column, inside = _piece(w + first, start, n)
        gradient, _, _ = _piece(g + first, start, n)
        projected = r * (gradient - gradient_mean - (values - centre - rest) * factor)
        tl.store(g + first + column, projected, mask=inside)


@triton.jit
def _factor(dot, r, n, correction, beside):
    """What ``c`` is multiplied by: ``r k / m`` times `dot`, the sum of ``g`` times the standardized weights."""
    share = 1.0 - r * beside  # of the standard deviation in the scale
    return tl.where(share > 0.0, dot * r / (tl.maximum(n - correction, 1.0) * share), 0.0)
