"""What a standardized convolution costs in Python: microseconds above a plain one, for one forward and one backward.

    python benchmarks/microseconds_per_convolution.py

53 convolutions, as many as a ResNet-50 has, of 4 channels and 4 x 4 pixels, so that the arithmetic is next to nothing.
Plain and standardized networks take turns in one process with one thread; each turn is ten passes. A number is the
median over the turns of the difference of two neighbours. Opening and closing a scope is not in it and has a line of
its own. Composer's own standardization is measured where it is installed.
"""

from __future__ import annotations

import argparse
import gc
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ws_algorithm import apply_weight_standardization, standardize_once  # noqa: E402
from ws_algorithm.recipes.overhead_report import describe_machine, machine_line  # noqa: E402

CONVOLUTIONS = 53
PASSES = 10
_IMAGE = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))

Pass = Callable[[nn.Module], object]


def network(standardize: Callable[[nn.Module], object]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(CONVOLUTIONS)])
    standardize(model)
    return model


def train(model: nn.Module) -> None:
    model(_IMAGE).sum().backward()


def evaluate(model: nn.Module) -> None:
    with torch.no_grad():
        model(_IMAGE)


def seconds_of_a_pass(run: Pass, model: nn.Module) -> float:
    run(model)
    start = time.perf_counter()
    for _ in range(PASSES):
        run(model)
    return (time.perf_counter() - start) / PASSES


def microseconds(
    run: Pass, plain: nn.Module, model: nn.Module, scope: Callable[[nn.Module], AbstractContextManager], turns: int
) -> tuple[float, float]:
    """Return what a plain convolution takes, and what a standardized one takes above it."""
    base, above = [], []
    gc.collect()
    gc.disable()
    for _ in range(turns):
        base.append(seconds_of_a_pass(run, plain))
        with scope(model):
            above.append(seconds_of_a_pass(run, model) - base[-1])
        plain.zero_grad()
        model.zero_grad()
    gc.enable()
    return 1e6 * statistics.median(base) / CONVOLUTIONS, 1e6 * statistics.median(above) / CONVOLUTIONS


def microseconds_of_scope(model: nn.Module, turns: int) -> float:
    """Return what opening and closing a scope takes for all convolutions together, without standardizing any."""
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        with standardize_once(model):
            pass
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def composers(model: nn.Module) -> None:
    from composer.functional import apply_weight_standardization as composers_own

    composers_own(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=61)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    logging.disable()
    print(machine_line(describe_machine("cpu", [1], "default")))
    print(f"{CONVOLUTIONS} convolutions, {turns} turns of {PASSES} passes, {platform.system()}\n")
    ways: dict[str, tuple[Callable[[nn.Module], object], Callable[[nn.Module], AbstractContextManager]]] = {
        "ours, in a scope": (apply_weight_standardization, standardize_once),
        "ours, no scope": (apply_weight_standardization, lambda model: nullcontext()),
        "Composer's": (composers, lambda model: nullcontext()),
    }
    plain = network(lambda model: None)
    print("| microseconds per convolution | forward and backward | forward without gradients |")
    print("|---|---:|---:|")
    for name, (standardize, scope) in ways.items():
        try:
            model = network(standardize)
        except ImportError:
            continue
        rows = [microseconds(run, plain, model, scope, turns) for run in (train, evaluate)]
        if name == "ours, in a scope":
            print(f"| plain | {rows[0][0]:.1f} | {rows[1][0]:.1f} |")
        print(f"| {name}, above plain | {rows[0][1]:.1f} | {rows[1][1]:.1f} |")
    opening = microseconds_of_scope(network(apply_weight_standardization), turns)
    print(f"\nTo open and close a scope around all {CONVOLUTIONS}: {opening:.0f} microseconds.")


if __name__ == "__main__":
    main()
