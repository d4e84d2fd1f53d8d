"""The algorithm beside others of Composer, wherever it stands in the list.

What a run must equal: the others operate on the model, then ``apply_weight_standardization`` by hand, then the run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from composed_runs import (
    assert_same,
    bottlenecks,
    fit,
    group_norm,
    predict,
    prepare,
    run,
    standardizable,
    standardized,
)
from composer.algorithms import (
    EMA,
    SAM,
    SWA,
    BlurPool,
    ChannelsLast,
    Factorize,
    GhostBatchNorm,
    LayerFreezing,
    LowPrecisionGroupNorm,
    SqueezeExcite,
    StochasticDepth,
)
from composer.algorithms.blurpool import BlurConv2d
from composer.algorithms.factorize import FactorizedConv2d
from composer.algorithms.ghost_batchnorm.ghost_batchnorm import GhostBatchNorm2d
from composer.algorithms.low_precision_groupnorm.low_precision_groupnorm import (
    LPGroupNorm,
    apply_low_precision_groupnorm,
)
from composer.algorithms.sam import SAMOptimizer
from composer.algorithms.squeeze_excite import SqueezeExciteConv2d
from composer.core import Algorithm, Event, Precision, State
from composer.loggers import InMemoryLogger, Logger
from torch import Tensor, nn

from ws_algorithm import WeightStandardization, apply_weight_standardization

pytestmark = [
    pytest.mark.filterwarnings("ignore:SAM has known issues:UserWarning"),
    pytest.mark.filterwarnings("ignore:SWA has known issues:UserWarning"),
]


class AlwaysLowPrecisionGroupNorm(LowPrecisionGroupNorm):
    """Composer's replaces layers in mixed precision only, which it refuses on a CPU."""

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        apply_low_precision_groupnorm(state.model, precision=Precision.AMP_BF16, optimizers=state.optimizers)


@dataclass(frozen=True)
class Other:
    """An algorithm, whether it operates on the model before training, and what shows that it had an effect."""

    build: Callable[[], Algorithm]
    is_surgery: bool
    took_effect: Callable[[Any, Any], bool]


def has(layer: type[nn.Module]) -> Callable[[Any, Any], bool]:
    return lambda trainer, algorithm: any(isinstance(module, layer) for module in trainer.state.model.modules())


def is_channels_last(trainer: Any, algorithm: Any) -> bool:
    return all(
        parameter.is_contiguous(memory_format=torch.channels_last)
        for parameter in trainer.state.model.parameters()
        if parameter.ndim == 4
    )


OTHERS = {
    "BlurPool": Other(BlurPool, True, has(BlurConv2d)),
    "Factorize": Other(lambda: Factorize(min_channels=16, latent_channels=0.25), True, has(FactorizedConv2d)),
    "SqueezeExcite": Other(lambda: SqueezeExcite(4, min_channels=16), True, has(SqueezeExciteConv2d)),
    "StochasticDepth": Other(
        lambda: StochasticDepth("ResNetBottleneck", drop_rate=0.9),
        True,
        lambda trainer, algorithm: (
            algorithm.num_stochastic_layers == 4 or "forward" in vars(trainer.state.model.module.layer1[0])
        ),
    ),
    "GhostBatchNorm": Other(lambda: GhostBatchNorm(2), True, has(GhostBatchNorm2d)),
    "ChannelsLast": Other(ChannelsLast, True, is_channels_last),
    "LowPrecisionGroupNorm": Other(AlwaysLowPrecisionGroupNorm, True, has(LPGroupNorm)),
    "LayerFreezing": Other(
        lambda: LayerFreezing(freeze_start=0.0, freeze_level=1.0),
        False,
        lambda trainer, algorithm: not all(p.requires_grad for p in trainer.state.model.parameters()),
    ),
    "EMA": Other(lambda: EMA(half_life="1ba"), False, lambda trainer, algorithm: algorithm.ema_started),
    "SWA": Other(
        lambda: SWA(swa_start="0.25dur", swa_end="0.75dur", update_interval="1ba"),
        False,
        lambda trainer, algorithm: algorithm.swa_completed,
    ),
    "SAM": Other(
        SAM,
        False,
        lambda trainer, algorithm: isinstance(trainer.state.optimizers[0], SAMOptimizer),
    ),
}

TRIPLES = [
    ("BlurPool", "SqueezeExcite", "EMA"),
    ("Factorize", "StochasticDepth", "ChannelsLast"),
    ("SWA", "GhostBatchNorm", "BlurPool"),
    ("StochasticDepth", "LowPrecisionGroupNorm", "SAM"),
    ("EMA", "LayerFreezing", "Factorize"),
]

Names = tuple[str, ...]


def network(names: Names) -> Any:
    return bottlenecks(nn.BatchNorm2d if "GhostBatchNorm" in names else group_norm)


@cache
def expected(names: Names) -> tuple[dict[str, Tensor], Tensor]:
    """Weights and outputs after surgery by one trainer, standardization by hand and training by another."""
    model = network(names)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    others = [OTHERS[name] for name in names]
    prepare(model, [other.build() for other in others if other.is_surgery], optimizers=optimizer).close()
    assert apply_weight_standardization(model) == len(standardizable(model)) > 0
    run(model, [other.build() for other in others if not other.is_surgery], optimizers=optimizer)
    return model.state_dict(), predict(model)


def with_places(combinations: list[Names], count: int) -> list[Any]:
    return [
        pytest.param(names, place, id=f"{'+'.join(names)}-{place}") for names in combinations for place in range(count)
    ]


def check_run(names: Names, algorithms: list[Algorithm], others: list[Algorithm]) -> None:
    model = network(names)
    memory = InMemoryLogger()
    trainer = prepare(model, algorithms, loggers=memory)
    before = standardizable(model)
    assert standardized(model) == set(before)
    assert len(before) >= 17  # those of the network itself

    fit(trainer)

    assert trainer.state.timestamp.batch == 4
    assert standardized(model) == set(before)
    for name, other in zip(names, others, strict=True):
        assert OTHERS[name].took_effect(trainer, other), name
    weights, outputs = expected(names)
    assert_same(model.state_dict(), weights)
    assert_same(predict(model), outputs)


@pytest.mark.parametrize("names, place", [*with_places([(name,) for name in OTHERS], 2), *with_places(TRIPLES, 4)])
def test_any_place_in_the_list_equals_standardizing_last(names, place):
    others = [OTHERS[name].build() for name in names]

    check_run(names, [*others[:place], WeightStandardization(), *others[place:]], others)


@pytest.mark.parametrize("names", [("BlurPool",), ("StochasticDepth",), ("EMA",), *TRIPLES[:2]], ids="+".join)
def test_two_of_them_around_the_others_equal_one_that_is_last(names):
    others = [OTHERS[name].build() for name in names]

    check_run(names, [WeightStandardization(), *others, WeightStandardization()], others)


@pytest.mark.parametrize("names", [("BlurPool",), ("Factorize",), ("SqueezeExcite",)], ids="+".join)
@pytest.mark.parametrize("place", [0, 1])
def test_the_logged_count_is_that_of_the_model_that_is_trained(names, place):
    algorithms = [OTHERS[name].build() for name in names]
    algorithms.insert(place, WeightStandardization())
    model, memory = network(names), InMemoryLogger()

    prepare(model, algorithms, loggers=memory)

    assert memory.hyperparameters["WeightStandardization/num_weights_standardized"] == len(standardizable(model))
