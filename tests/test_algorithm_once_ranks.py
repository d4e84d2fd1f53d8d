"""Once per optimizer step in two processes with gloo: the weights of a run without, the same on both ranks.

This file is also what each process runs: ``test_algorithm_once_ranks.py FOLDER``. It writes ``RANK.pt`` there.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accumulating_runs import adam, assert_ends_near, lamb, outcome, run, sgd, weights
from composer.algorithms import SAM, GradientClipping
from composer.core import Algorithm
from composer.utils import dist
from exact_twins import images, tiny
from leaving import leave_together
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from two_processes import results_of_two_processes

from ws_algorithm import WeightStandardization, standardize_once

TESTS = Path(__file__).parent
TIMEOUT = 60.0  # seconds that a collective waits for the other process

STRATEGIES = ["single_auto_sync", "multi_auto_sync", "forced_sync"]
OTHERS: dict[str, tuple[Any, Callable[[], list[Algorithm]]]] = {
    "SGD": (sgd, lambda: []),
    "Adam, clip norm": (adam, lambda: [GradientClipping("norm", 0.05)]),
    "LAMB, clip norm": (lamb, lambda: [GradientClipping("norm", 0.05)]),
    "SAM": (sgd, lambda: [SAM(rho=0.1)]),
    "SAM, clip norm": (sgd, lambda: [SAM(rho=0.1, interval=2), GradientClipping("norm", 0.05)]),
}
CASES = [(name, strategy) for name in OTHERS for strategy in STRATEGIES]


def train(name: str, strategy: str, once: bool) -> dict[str, Tensor]:
    """Six steps of two micro-batches on each rank."""
    optimizer, others = OTHERS[name]
    algorithms = [*others(), WeightStandardization(once_per_step=once)]
    arguments: Any = {"ddp_sync_strategy": strategy, "max_duration": "6ba", "device_train_microbatch_size": 4}
    return outcome(run(algorithms, None, optimizer, dist_timeout=TIMEOUT, **arguments))


DDP: dict[str, dict[str, Any]] = {
    "DDP": {},
    "DDP, views": {"gradient_as_bucket_view": True},
    "DDP, static": {"static_graph": True},
    "DDP, unused": {"find_unused_parameters": True},
    "DDP, small buckets": {"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True},
}
LOOPS = [(name, sync) for name in DDP for sync in ("last", "all")]
LOOPS.remove(("DDP, static", "last"))  # not supported by torch


def loop_by_hand(name: str, sync: str, once: bool) -> dict[str, Tensor]:
    """Five steps of three micro-batches under ``DistributedDataParallel``, one of which leaves gradients standing."""
    model = tiny()
    parallel = DistributedDataParallel(model, **DDP[name])
    optimizer = sgd(model)
    shift = float(dist.get_global_rank())
    for step in range(5):
        if step != 3:
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        with standardize_once(parallel) if once else contextlib.nullcontext():
            for index, batch in enumerate(images()):
                with contextlib.nullcontext() if sync == "all" or index == 2 else parallel.no_sync():
                    parallel(batch + shift).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return weights(model)


def main(folder: str) -> None:
    warnings.filterwarnings("ignore")
    results = {}
    for make, cases in ((train, CASES), (loop_by_hand, LOOPS)):
        for case in cases:
            try:
                results[case] = [make(*case, once=once) for once in (True, False)]
            except Exception as error:
                results[case] = f"{type(error).__name__}: {error}"
    torch.save(results, Path(folder) / f"{dist.get_global_rank()}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return results_of_two_processes(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name, strategy", [*CASES, *LOOPS])
def test_the_weights_are_those_of_a_run_without(name, strategy, ranks):
    for results in ranks:
        assert not isinstance(results[name, strategy], str), results[name, strategy]
        once, exact = results[name, strategy]
        assert_ends_near(once, exact, tolerance=1e-6)


@pytest.mark.parametrize("name, strategy", [*CASES, *LOOPS])
def test_the_ranks_agree(name, strategy, ranks):
    (first, _), (second, _) = (results[name, strategy] for results in ranks)

    # SAM adds and subtracts what differs between ranks, which rounds differently on each
    assert_ends_near(first, second, tolerance=1e-12 if "SAM" in name else 0.0)


def test_the_cases_differ(ranks):
    raw = "module.0.parametrizations.weight.original"
    weights = [ranks[0][name, STRATEGIES[0]][1] for name in OTHERS]
    values = [next(value for key, value in case.items() if key.endswith(raw)) for case in weights]

    assert not any(torch.allclose(value, values[0], rtol=1e-4) for value in values[1:])


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_together()
