"""What each of two processes runs in ``test_algorithm_with_others_ranks.py``: ``two_ranks.py CASES FOLDER``.

Each process writes ``CASE-RANK.json``: the names of the standardized convolutions, or the error that stopped it.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from composed_runs import bottlenecks, fit, prepare, standardized, two_convolutions
from composer.algorithms import BlurPool, StochasticDepth
from composer.core import Algorithm
from composer.utils import dist
from leaving import leave_together
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ws_algorithm import WeightStandardization

TIMEOUT = 60.0  # seconds that a collective waits for the other process, instead of five minutes


def with_head(extra: bool = False) -> Any:
    """Convolutions ``module.0``, ``module.3`` and a head ``module.6`` that no normalization follows."""
    model = two_convolutions()
    model.module.insert(6, nn.Conv2d(4, 4, 1))
    if extra:
        model.side_branch = nn.Conv2d(3, 4, 3)
    return model


def with_weight_norm(put_on: bool) -> Any:
    """A convolution ``module.3`` that cannot be standardized."""
    model = two_convolutions()
    if put_on:
        weight_norm(model.module[3])
    return model


class Branches(nn.Module):
    """Two convolutions side by side, called in an order of their own in each process."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.get_submodule(name)(x) for name in self.names)
        return first + second


def with_branches(names: list[str]) -> Any:
    model = two_convolutions()
    model.module[0] = Branches(names)
    return model


def stochastic_depth(layers: Any) -> tuple[Any, Sequence[Algorithm]]:
    algorithms = [WeightStandardization(layers=layers), StochasticDepth("ResNetBottleneck", drop_rate=0.9)]
    return bottlenecks(nn.BatchNorm2d, blocks=(2, 2, 2, 2)), algorithms


def two_surgeries() -> tuple[Any, Sequence[Algorithm]]:
    depth = StochasticDepth("ResNetBottleneck", drop_rate=0.9)
    return bottlenecks(), [BlurPool(), WeightStandardization(1), depth]


AGREE: dict[str, Callable[[int], tuple[Any, Sequence[Algorithm]]]] = {
    "all": lambda rank: stochastic_depth("all"),
    "normalized": lambda rank: stochastic_depth("normalized"),
    "surgeries": lambda rank: two_surgeries(),
    "order": lambda rank: (with_branches([["left", "right"], ["right", "left"]][rank]), [WeightStandardization()]),
}
DIFFER: dict[str, Callable[[int], tuple[Any, Sequence[Algorithm]]]] = {
    "extra": lambda rank: (with_head(extra=rank == 1), [WeightStandardization()]),
    "exclude": lambda rank: (with_head(), [WeightStandardization(exclude=[["module.0"], ["module.3"]][rank])]),
    "count": lambda rank: (with_head(), [WeightStandardization(rank)]),
    "layers": lambda rank: (with_head(), [WeightStandardization(layers="all" if rank == 0 else "normalized")]),
    "pattern": lambda rank: (with_head(extra=rank == 1), [WeightStandardization(exclude="side_branch")]),
    "refused": lambda rank: (with_weight_norm(rank == 1), [WeightStandardization()]),
    "surgery": lambda rank: (bottlenecks(), [WeightStandardization(), *[BlurPool()][rank:]]),
}


def main(cases: str, folder: str) -> None:
    for case, build in {"agree": AGREE, "differ": DIFFER}[cases].items():
        rank = dist.get_global_rank()
        try:
            model, algorithms = build(rank)
            trainer = prepare(model, algorithms, batch_size=2, dist_timeout=TIMEOUT)
            result: Any = sorted(standardized(model))
            fit(trainer)
        except Exception as error:
            result = {type(error).__name__: str(error)}
        (Path(folder) / f"{case}-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_together()
