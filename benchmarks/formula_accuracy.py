"""Largest error of every formula against a float64 oracle, over shapes and dtypes.

    python benchmarks/formula_accuracy.py

The oracle is the formula written out in NumPy, in float64, on the very values that the dtype holds. The error is
relative to the largest standardized weight (about 4), so that it compares with the rounding step of the dtype, ``eps``.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from ws_algorithm import FORMULAS, Formula, standardize_weight

SHAPES = [(1, 1, 1), (8, 1, 3, 3), (64, 3, 7, 7), (16, 4, 5), (8, 4, 3, 3, 3), (256, 64, 1, 1), (2048, 512, 3, 3)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def oracle(weight: torch.Tensor, formula: Formula) -> np.ndarray:
    rows = weight.double().numpy().reshape(weight.shape[0], -1)
    centred = rows - rows.mean(1, keepdims=True)
    divisor = max(rows.shape[1] - 1, 1) if formula.unbiased else rows.shape[1]
    variance = (centred**2).sum(1, keepdims=True) / divisor
    if formula.eps_inside_root:
        scale = np.sqrt(variance + formula.eps)
    else:
        scale = np.sqrt(variance) + formula.eps
    if formula.rescaling == "scaled":
        scale = scale * rows.shape[1] ** 0.5
    return (centred / scale).reshape(weight.shape)


def largest_error(shape: tuple[int, ...], dtype: torch.dtype, formula: Formula) -> float:
    fan_in = int(np.prod(shape[1:]))
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator, dtype=torch.float64) * (2 / fan_in) ** 0.5).to(dtype)
    expected = oracle(weight, formula)
    actual = standardize_weight(weight, formula).double().numpy()
    return float(np.abs(actual - expected).max() / (np.abs(expected).max() or 1.0))  # a fan-in of 1 gives 0


def main() -> int:
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads; seed 0, one draw per shape")
    print(f"{'formula':12}{'shape':20}" + "".join(f"{str(dtype).removeprefix('torch.'):>12}" for dtype in DTYPES))
    for name, formula in FORMULAS.items():
        for shape in SHAPES:
            errors = [largest_error(shape, dtype, formula) for dtype in DTYPES]
            print(f"{name:12}{'x'.join(map(str, shape)):20}" + "".join(f"{error:12.1e}" for error in errors))
    print(f"{'':12}{'eps of the dtype':20}" + "".join(f"{torch.finfo(dtype).eps:12.1e}" for dtype in DTYPES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
