"""Once per step in two processes of which one leaves out convolutions that the other uses.

``DistributedDataParallel(find_unused_parameters=True)`` then adds the gradient of the other rank to a raw weight.
This file is also what each process runs: ``test_algorithm_once_unused_ranks.py FOLDER``. It writes ``RANK.pt`` there.
"""

import contextlib
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accumulating_runs import sgd
from composed_runs import group_norm
from composer import Trainer
from composer.algorithms import StochasticDepth
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.models import ComposerClassifier
from composer.utils import dist
from exact_twins import assert_near
from leaving import leave_together
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import Bottleneck, ResNet
from two_processes import results_of_two_processes

from ws_algorithm import WeightStandardization, apply_weight_standardization, standardize_once

TESTS = Path(__file__).parent
TIMEOUT = 60.0  # seconds that a collective waits for the other process
SEED = 7


class Routed(nn.Module):
    """Images whose mean is positive also go through the convolution ``detour``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.stem, self.detour = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.stem(x)).relu()
        if x.mean() > 0:
            hidden = hidden + self.norm(self.detour(hidden)).relu()
        return self.head(hidden.mean((2, 3)))


def images(sign: float, count: int = 2) -> Tensor:
    """Images that take the way of `sign`."""
    return sign + 0.3 * torch.randn(count, 3, 8, 8, dtype=torch.float64)


# Loops by hand: which micro-batches synchronize, and the rank whose images take the detour in each of them

LOOPS: dict[str, tuple[tuple[bool, bool], tuple[int, int], dict[str, Any]]] = {
    "all": ((True, True), (0, 0), {}),
    "last": ((False, True), (0, 0), {}),
    "in turn": ((False, True), (0, 1), {}),
    "views": ((False, True), (1, 1), {"gradient_as_bucket_view": True}),
    "all, views, small buckets": ((True, True), (1, 1), {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4}),
}


def loop_by_hand(name: str, is_zeroed_to_none: bool, once: bool) -> dict[str, Tensor]:
    """Three steps of two micro-batches, of a detour that one rank only takes."""
    synchronizes, takers, arguments = LOOPS[name]
    model = Routed()
    apply_weight_standardization(model)
    parallel = DistributedDataParallel(model, find_unused_parameters=True, **arguments)
    optimizer = sgd(model)
    torch.manual_seed(SEED + dist.get_global_rank())
    for _ in range(3):
        optimizer.zero_grad(set_to_none=is_zeroed_to_none)
        with standardize_once(parallel) if once else contextlib.nullcontext():
            for is_synchronized, taker in zip(synchronizes, takers, strict=True):
                batch = images(1.0 if dist.get_global_rank() == taker else -1.0)
                with contextlib.nullcontext() if is_synchronized else parallel.no_sync():
                    parallel(batch).square().mean().backward()
        optimizer.step()
    return model.state_dict()


def loop_of_layers_that_all_use(once: bool) -> dict[str, Tensor]:
    model = Routed()
    apply_weight_standardization(model)
    parallel = DistributedDataParallel(model)
    conv: Any = model.stem
    with standardize_once(parallel) if once else contextlib.nullcontext():
        for is_last in (False, True):
            with contextlib.nullcontext() if is_last else parallel.no_sync():
                parallel(images(1.0)).square().mean().backward()
            if once:  # what waits has to be projected before it is averaged
                assert (conv.parametrizations["weight"][0].cache.entry.pending is None) == is_last
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


class FindsUnused(Algorithm):
    """Does nothing; Composer asks every algorithm whether it leaves out layers."""

    @property
    def find_unused_parameters(self) -> bool:
        return True

    def match(self, event: Event, state: State) -> bool:
        return False

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        pass


def train(model: nn.Module, algorithms: list[Algorithm], inputs: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """Two epochs, of micro-batches of two images on each rank: the samplers give even ones to rank 0, odd ones to 1."""
    dataset = TensorDataset(inputs, torch.arange(len(inputs)) // 2 % 2)
    trainer = Trainer(
        model=ComposerClassifier(model.double(), num_classes=2),
        train_dataloader=DataLoader(dataset, batch_size=4, sampler=dist.get_sampler(dataset, shuffle=False)),
        algorithms=algorithms,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration="2ep",
        device_train_microbatch_size=2,
        device="cpu",
        seed=SEED,
        progress_bar=False,
        dist_timeout=TIMEOUT,
        **arguments,
    )
    trainer.fit()
    return {name: value.detach().clone() for name, value in trainer.state.model.state_dict().items()}


def routed_run(strategy: str, once: bool) -> dict[str, Tensor]:
    torch.manual_seed(SEED)
    inputs = torch.stack([images(1.0 if index % 2 == 0 else -1.0, 1)[0] for index in range(16)])
    algorithms = [FindsUnused(), WeightStandardization(once_per_step=once)]
    return train(Routed(), algorithms, inputs, ddp_sync_strategy=strategy)


def stochastic_depth_run(once: bool) -> dict[str, Tensor]:
    """Whole blocks are dropped, other ones on each rank."""
    torch.manual_seed(SEED)
    depth = StochasticDepth("ResNetBottleneck", stochastic_method="block", drop_rate=0.5)
    model = ResNet(Bottleneck, [1, 2, 1, 1], num_classes=2, width_per_group=8, norm_layer=group_norm)
    inputs = torch.randn(16, 3, 32, 32, dtype=torch.float64)
    return train(model, [depth, WeightStandardization(once_per_step=once)], inputs)


CASES: dict[str, Any] = {
    **{name: lambda once, name=name: loop_by_hand(name, True, once) for name in LOOPS},
    **{f"{name}, zeros": lambda once, name=name: loop_by_hand(name, False, once) for name in LOOPS},
    "used by all": loop_of_layers_that_all_use,
    "Trainer, single_auto_sync": lambda once: routed_run("single_auto_sync", once),
    "Trainer, multi_auto_sync": lambda once: routed_run("multi_auto_sync", once),
    "Trainer, StochasticDepth": stochastic_depth_run,
}


class Lines(logging.Handler):
    """What is logged about gradients that are projected in every backward."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "projected in every backward" in record.getMessage():
            self.lines.append(record.getMessage())


def run_both(case: str) -> dict[str, Any]:
    lines = Lines()
    logging.getLogger("ws_algorithm").addHandler(lines)
    try:
        once, exact = (CASES[case](once) for once in (True, False))
        return {"once": once, "exact": exact, "lines": lines.lines}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        logging.getLogger("ws_algorithm").removeHandler(lines)


def main(folder: str) -> None:
    warnings.filterwarnings("ignore")
    dist.initialize_dist("cpu", timeout=TIMEOUT)
    results = {case: run_both(case) for case in CASES}
    torch.save(results, Path(folder) / f"{dist.get_global_rank()}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return results_of_two_processes(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_of_a_run_without_and_the_ranks_agree(case, ranks):
    first, second = (results[case] for results in ranks)
    for result in (first, second):
        assert "error" not in result, result["error"]
        assert_near(result["once"], result["exact"], tolerance=1e-9)

    assert_near(first["once"], second["once"], tolerance=0.0)


@pytest.mark.parametrize("case", CASES)
def test_one_line_says_why_gradients_are_projected_in_every_backward(case, ranks):
    for results in ranks:
        lines = results[case]["lines"]
        if case == "used by all":
            assert lines == []
        else:
            assert len(lines) == 1 and "find_unused_parameters" in lines[0], lines


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_together()
