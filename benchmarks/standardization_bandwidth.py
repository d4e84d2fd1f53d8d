"""Time of standardizing, and of projecting the gradients of, all convolutions of ResNet-50 against that of a copy.

    python benchmarks/standardization_bandwidth.py

Each figure is the median of 50 launches between two CUDA events, after warm-up. The copy moves as many float32 values
as the model has convolution weights from one flat tensor to another: what reading the weights and writing them
standardized costs at least. A projection reads two tensors and writes one, so it costs at least 1.5 copies. "Warm"
repeats on the same buffers, part of which the L2 cache keeps; "cold" overwrites that cache before each launch, as the
activations of a training step do. "With host" is the time from the call in Python until the device is done.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

from ws_algorithm.formula import FORMULAS

RUNS = 50
WARM_UP = 10
CACHE = 512 * 2**20  # bytes; several times the L2 cache


def convolution_weights() -> list[Tensor]:
    """Of ResNet-50, as separate float32 CUDA tensors."""
    model = torchvision.models.resnet50(weights=None)
    return [m.weight.detach().cuda() for m in model.modules() if isinstance(m, nn.Conv2d)]


def microseconds(call: Callable[[], object], cold: bool) -> float:
    """Median time on the device of what `call` launches."""
    cache = torch.empty(CACHE, dtype=torch.uint8, device="cuda")
    times = []
    for run in range(WARM_UP + RUNS):
        if cold:
            cache.zero_()
        # The device is kept busy until the launch is queued, lest the time of the host be measured
        torch.cuda._sleep(1_000_000)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream())
        call()
        end.record(torch.cuda.current_stream())
        end.synchronize()
        if run >= WARM_UP:
            times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def microseconds_with_host(call: Callable[[], object]) -> float:
    times = []
    for run in range(WARM_UP + RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if run >= WARM_UP:
            times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def calls_of(weights: list[Tensor], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Standardizing float32 weights to `dtype`, and projecting gradients of `dtype`."""
    from ws_algorithm.triton_kernels import project_all, standardize_all

    outputs = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    gradients = [torch.randn_like(output) for output in outputs]
    means, scales = ([torch.empty(len(weight), device="cuda") for weight in weights] for _ in range(2))
    name = str(dtype).removeprefix("torch.")
    return {
        f"standardize_all, {name}": lambda: standardize_all(weights, outputs, means, scales, FORMULAS["composer"]),
        f"project_all, {name}": lambda: project_all(gradients, weights, means, scales, FORMULAS["composer"]),
    }


def main() -> int:
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device.")
        return 1
    import triton  # pyright: ignore[reportMissingImports]

    weights = convolution_weights()
    count = sum(weight.numel() for weight in weights)
    source = torch.randn(count, device="cuda")
    target = torch.empty_like(source)
    calls = {"copy, float32": lambda: target.copy_(source)}
    calls |= calls_of(weights, torch.float32) | calls_of(weights, torch.bfloat16)
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    print(f"{torch.cuda.get_device_name()}, {versions}; median of {RUNS} after {WARM_UP}")
    print(f"ResNet-50: {len(weights)} weights, {sum(map(len, weights))} rows, {4 * count / 1e6:.1f} MB in float32")
    print(f"{'microseconds':28}{'warm':>8}{'/ copy':>8}{'cold':>8}{'/ copy':>8}{'with host':>12}")
    times = {name: (microseconds(call, cold=False), microseconds(call, cold=True)) for name, call in calls.items()}
    copy_warm, copy_cold = times["copy, float32"]
    for name, (warm, cold) in times.items():
        ratios = f"{warm:8.1f}{warm / copy_warm:8.2f}{cold:8.1f}{cold / copy_cold:8.2f}"
        print(f"{name:28}{ratios}{microseconds_with_host(calls[name]):12.1f}")
    moved = 2 * 4 * count / 1e6  # MB, and MB per microsecond are TB/s
    print(f"copy bandwidth, read and written: {moved / copy_warm:.2f} TB/s warm, {moved / copy_cold:.2f} TB/s cold")
    return 0


if __name__ == "__main__":
    sys.exit(main())
