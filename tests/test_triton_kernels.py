"""The Triton kernels against float64: in Triton's interpreter on every machine, compiled on one with a CUDA device.

The interpreter must be chosen before Triton is imported, so one subprocess runs this file as a program for all cases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ws_algorithm.formula import FORMULAS, Formula, standardize

pytest.importorskip("triton")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Of each kind of program: four short rows, one row that fits, one row in pieces; full and with remainders
SHAPES = [(5, 1), (6, 3, 3, 3), (3, 3, 7, 7), (4, 64, 1, 1), (3, 512), (2, 1025), (2, 2048), (3, 512, 3, 3), (1, 20000)]

WEIGHTS = {  # their dtype and that of what is written
    "float32": (F32, F32),
    "float32 to bfloat16": (F32, BF16),
    "float32 to float16": (F32, F16),
    "bfloat16": (BF16, BF16),
    "float16": (F16, F16),
}
VALUES = {
    "channels_last": lambda shape: channels_last(torch.randn(shape)),
    "constant": lambda shape: torch.linspace(-0.7, 1.1, shape[0]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape),
    "offset": lambda shape: 1e3 + 1e-2 * torch.randn(shape),
    "tiny": lambda shape: 1e-6 * torch.randn(shape),  # the size of eps
    "an outlier first": lambda shape: torch.randn(shape).flatten(1).index_fill(1, torch.tensor(0), 1e3).view(shape),
}
# The kernels compute what stands before gain and shift, so that some formulas are one to them
KINDS = {(f.eps, f.eps_inside_root, f.unbiased): name for name, f in reversed(FORMULAS.items())}
CASES = [f"{formula}: {kind}" for formula in reversed(KINDS.values()) for kind in [*WEIGHTS, *VALUES]]


def channels_last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight


def standardized(weight: Tensor, formula: Formula) -> tuple[Tensor, Tensor, Tensor]:
    """The standardized weight, the means and the scales ``s``, in float64."""
    rows = weight.double().flatten(1)
    var = rows.var(1, correction=int(formula.unbiased and rows.shape[1] > 1))
    scale = (var + formula.eps).sqrt() if formula.eps_inside_root else var.sqrt() + formula.eps
    return standardize(weight.double(), formula), rows.mean(1), scale


def projected(gradient: Tensor, weight: Tensor, formula: Formula) -> Tensor:
    weight = weight.double().requires_grad_()
    return torch.autograd.grad(standardize(weight, formula), weight, gradient.double())[0]


def excess(actual: Tensor, expected: Tensor, size: Tensor | None = None) -> float:
    """The largest error over the tolerance of ``torch.testing.assert_close``, relative to a row's largest value.

    Errors of a row's sums are in all of its values, the small ones too. `size` has other rows to take the largest of.
    """
    rtol, atol = {F32: (1.3e-6, 1e-5), F16: (1e-3, 1e-5), BF16: (1.6e-2, 1e-5)}[actual.dtype]
    rows, wanted = actual.double().reshape(len(actual), -1), expected.reshape(len(expected), -1)
    largest = (expected if size is None else size).double().reshape(len(expected), -1).abs().amax(1, keepdim=True)
    return ((rows - wanted).abs() / (atol + rtol * largest)).nan_to_num(float("inf")).max().item()


def run_case(case: str, device: str) -> dict[str, Any]:
    """Both kernels on weights of all shapes in one call: errors over their tolerance, and side effects."""
    from ws_algorithm.triton_kernels import is_supported, project_all, standardize_all

    torch.manual_seed(17)
    name, kind = case.split(": ")
    formula = FORMULAS[name]
    dtype, written = WEIGHTS.get(kind, (F32, F32))
    weights = [VALUES.get(kind, torch.randn)(shape).to(device, dtype).clone() for shape in SHAPES]
    before = [weight.clone() for weight in weights]
    outputs = [torch.full_like(weight, float("nan"), dtype=written) for weight in weights]
    gradients = [torch.randn_like(output) for output in outputs]
    expected = [standardized(weight, formula) for weight in weights]
    expected_gradients = [projected(g, w, formula) for g, w in zip(gradients, weights, strict=True)]
    means, scales = ([torch.full((len(w),), float("nan"), device=device) for w in weights] for _ in range(2))
    versions = [tensor._version for tensor in outputs + gradients]

    standardize_all(weights, outputs, means, scales, formula)
    project_all(gradients, weights, means, scales, formula)
    return {
        "supported": [is_supported(tensor) for tensor in weights + outputs + gradients],
        "kept": list(map(torch.equal, weights, before)),
        "version": [t._version > v for t, v in zip(outputs + gradients, versions, strict=True)],
        "zero": [not output.any() for output in outputs],
        "weight": [excess(o, e[0]) for o, e in zip(outputs, expected, strict=True)],
        "mean": [excess(m, e[1], w) for m, e, w in zip(means, expected, weights, strict=True)],
        "scale": [excess(r * e[2].float(), torch.ones_like(e[2])) for r, e in zip(scales, expected, strict=True)],
        "gradient": [excess(g, e) for g, e in zip(gradients, expected_gradients, strict=True)],
    }


def check(report: dict[str, Any], case: str) -> None:
    for effect in ("supported", "kept", "version"):
        assert all(report[effect]), effect
    for error in ("weight", "mean", "scale", "gradient"):
        assert max(report[error]) <= 1, (error, report[error])
    if case.endswith("constant"):
        assert all(report["zero"])
    else:
        assert report["zero"] == [shape == (5, 1) for shape in SHAPES]


def count_copies(device: str) -> list[int]:
    """How many tables were copied to the device after each of: a call, the same again, one with other gradients."""
    from ws_algorithm.triton_kernels import _addresses, _programs, project_all

    weights, gradients, others = ([torch.randn(4, 9, device=device)] for _ in range(3))
    means, scales = ([torch.ones(4, device=device)] for _ in range(2))
    counts = []
    for written in (gradients, gradients, others):
        project_all(written, weights, means, scales, FORMULAS["composer"])
        counts.append(_addresses.cache_info().misses + _programs.cache_info().misses)
    return [count - counts[0] for count in counts]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("case", CASES)
def test_interpreted(case: str, interpreted: dict[str, Any]) -> None:
    check(interpreted[case], case)


def test_tables_are_copied_once(interpreted: dict[str, Any]) -> None:
    assert interpreted["copies"] == [0, 0, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_compiled(case: str) -> None:
    check(run_case(case, "cuda"), case)


DENSE = torch.zeros(8, 4, 3, 3)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (DENSE, True),
        (torch.nn.Parameter(DENSE), True),
        (channels_last(DENSE), True),
        (DENSE[2:4], True),
        (DENSE[:1].permute(1, 0, 2, 3)[:1], True),
        (torch.zeros(3), True),
        (DENSE.half(), True),
        (DENSE.bfloat16(), True),
        (DENSE.double(), False),
        (DENSE.to(torch.complex64), False),
        (DENSE.int(), False),
        (DENSE[::2], False),
        (DENSE[:, :2], False),
        (DENSE[..., :2], False),
        (DENSE.transpose(0, 1), False),
        (DENSE[:1].expand(8, 4, 3, 3), False),
        (DENSE[0], True),
        (DENSE[:0], False),
        (torch.zeros(()), False),
        (torch.zeros(8, 4).to_sparse(), False),
        (torch.zeros(8, 4, device="meta"), False),
    ],
)
def test_is_supported(tensor: Tensor, expected: bool) -> None:
    from ws_algorithm.triton_kernels import is_supported

    assert is_supported(tensor) is expected


if __name__ == "__main__":
    print(json.dumps({**{case: run_case(case, "cpu") for case in CASES}, "copies": count_copies("cpu")}))
