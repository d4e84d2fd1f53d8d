"""``GroupNormalization`` in Composer's ``Trainer``, alone and beside other algorithms, in any order.

What a run must equal: ``apply_group_normalization`` by hand, then the run with the other algorithms.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from composed_runs import assert_same, bottlenecks, fit, predict, prepare, run, standardizable, standardized
from composer.algorithms import EMA, SWA, BlurPool, GhostBatchNorm, LowPrecisionGroupNorm, StochasticDepth
from composer.algorithms.low_precision_groupnorm.low_precision_groupnorm import (
    LPGroupNorm,
    apply_low_precision_groupnorm,
)
from composer.algorithms.warnings import NoEffectWarning
from composer.core import Algorithm, Event, Precision, State
from composer.devices import DeviceCPU
from composer.loggers import InMemoryLogger, Logger
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from ws_algorithm import GroupNormalization, WeightStandardization, apply_group_normalization
from ws_algorithm.recipes import registry

pytestmark = pytest.mark.filterwarnings("ignore:SWA has known issues:UserWarning")

NORMS = 17  # of `bottlenecks`: the stem, four blocks of three and their shortcuts


class AlwaysLowPrecisionGroupNorm(LowPrecisionGroupNorm):
    """Composer's replaces layers in mixed precision only, which it refuses on a CPU."""

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        apply_low_precision_groupnorm(state.model, precision=Precision.AMP_BF16, optimizers=state.optimizers)


OTHERS: dict[str, Callable[[], Algorithm]] = {
    "WS": WeightStandardization,
    "WS normalized": lambda: WeightStandardization(layers="normalized"),
    "BlurPool": BlurPool,
    "StochasticDepth": lambda: StochasticDepth("ResNetBottleneck", drop_rate=0.9),
    "EMA": lambda: EMA(half_life="1ba"),
    "SWA": lambda: SWA(swa_start="0.25dur", swa_end="0.75dur", update_interval="1ba"),
}
COMBINATIONS = [*[(name,) for name in OTHERS], ("EMA", "WS"), ("BlurPool", "WS normalized", "SWA")]


def network(norm: Any = nn.BatchNorm2d) -> Any:
    return bottlenecks(norm)


def count(model: nn.Module, layer: type[nn.Module]) -> int:
    return sum(type(part) is layer for part in model.modules())


def outcome(trainer: Any) -> dict[str, Any]:
    """The weights of the model, and what EMA and SWA have averaged."""
    algorithms = [algorithm for algorithm in trainer.state.algorithms if isinstance(algorithm, (EMA, SWA))]
    averages = [{**algorithm.state_dict(), "repr": None} for algorithm in algorithms]  # an address in memory
    return {"model": trainer.state.model.state_dict(), "averages": averages}


@cache
def expected(names: tuple[str, ...]) -> dict[str, Any]:
    model = network()
    assert apply_group_normalization(model, 4) == NORMS
    return outcome(run(model, [OTHERS[name]() for name in names]))


@pytest.mark.parametrize(
    "names, place", [(names, place) for names in COMBINATIONS for place in range(len(names) + 1)], ids=str
)
def test_any_place_in_the_list_equals_the_surgery_by_hand(names, place):
    algorithms = [OTHERS[name]() for name in names]
    algorithms.insert(place, GroupNormalization(4))
    memory = InMemoryLogger()

    trainer = run(network(), algorithms, loggers=memory)

    model: Any = trainer.state.model
    assert trainer.state.timestamp.batch == 4
    assert (count(model, nn.GroupNorm), count(model, nn.BatchNorm2d)) == (NORMS, 0)
    assert memory.hyperparameters["GroupNormalization/num_layers_replaced"] == NORMS
    assert_same(outcome(trainer), expected(names))
    if names[0].startswith("WS"):
        assert standardized(model) == set(standardizable(model)) != set()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_first_copies_of_ema_and_swa_are_of_the_model_with_group_norms(place):
    ema, swa = EMA(half_life="1ba"), SWA(swa_start="0.25dur", swa_end="0.75dur", update_interval="1ba")
    algorithms: list[Algorithm] = [ema, swa]
    algorithms.insert(place, GroupNormalization(4))

    model = prepare(network(), algorithms).state.model

    assert ema.ema_model is not None and swa.swa_model is not None
    copied: Any = swa.swa_model.module
    assert_same(ema.ema_model.named_parameters_dict, dict(model.named_parameters()))
    assert ema.ema_model.named_buffers_dict == {}
    assert_same(copied.state_dict(), model.state_dict())


def test_the_trainers_optimizer_keeps_the_parameters_and_trains_them():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    before = [id(parameter) for parameter in optimizer.param_groups[0]["params"]]

    trainer = prepare(model, [GroupNormalization(4)], optimizers=optimizer)

    assert [id(parameter) for parameter in model.parameters()] == before
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(trainer)
    assert not any(torch.equal(p, start[name]) for name, p in model.named_parameters() if "bn" in name)


def test_the_new_parameters_of_frozen_batch_norms_are_trained():
    model = network(FrozenBatchNorm2d)
    trainer = prepare(model, [EMA(half_life="1ba"), GroupNormalization(4)])
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    fit(trainer)

    assert count(model, nn.GroupNorm) == NORMS
    assert not any(torch.equal(p, start[name]) for name, p in model.named_parameters() if "bn" in name)


def test_new_parameters_without_a_place_stop_the_trainer():
    model = network(FrozenBatchNorm2d)
    first, *others = model.parameters()
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": others}], lr=0.05)

    with pytest.raises(ValueError, match=r"2 parameter groups.*module\.bn1.*Build the optimizer after"):
        prepare(model, [GroupNormalization(4)], optimizers=optimizer)


def test_channels_that_do_not_divide_stop_the_trainer():
    with pytest.raises(ValueError, match="must divide the channels.*8 channels: module.bn1|64 channels"):
        prepare(network(), [GroupNormalization(7)])


def test_two_of_them_equal_one():
    twice = run(network(), [GroupNormalization(4), GroupNormalization(2)])

    assert_same(outcome(twice), expected(("EMA",)) | {"averages": []})  # EMA does not change training


def test_low_precision_group_norm_takes_them_if_it_comes_after():
    model = network()

    run(model, [GroupNormalization(4), AlwaysLowPrecisionGroupNorm()])

    assert (count(model, LPGroupNorm), count(model, nn.GroupNorm)) == (NORMS, 0)
    assert predict(model).isfinite().all()


def test_low_precision_group_norm_says_itself_that_it_came_too_early():
    model = network()

    with pytest.warns(NoEffectWarning, match="No instances of torch.nn.GroupNorm found"):
        prepare(model, [AlwaysLowPrecisionGroupNorm(), GroupNormalization(4)])

    assert count(model, nn.GroupNorm) == NORMS


def test_the_batch_norms_of_ghost_batch_norm_stay(caplog):
    model = network()

    run(model, [GhostBatchNorm(2), GroupNormalization(4)])

    assert count(model, nn.BatchNorm2d) == NORMS
    assert "0 of 17 batch norms" in caplog.text and "part of GhostBatchNorm2d" in caplog.text


def test_a_checkpoint_resumes_to_the_same_weights(tmp_path: Path):
    def algorithms() -> Sequence[Algorithm]:
        return [WeightStandardization(), EMA(half_life="1ba"), GroupNormalization(4)]

    files: dict[str, Any] = {"save_folder": str(tmp_path), "save_filename": "ba{batch}.pt", "save_interval": "2ba"}
    files |= {"save_overwrite": True, "batch_size": 2}
    whole = run(network(), algorithms(), **files)

    resumed = prepare(network(), algorithms(), **files, load_path=str(tmp_path / "ba2.pt"))
    assert resumed.state.timestamp.batch == 2
    resumed.fit()

    assert_same(resumed.state.model.state_dict(), whole.state.model.state_dict())


def test_the_weights_of_a_checkpoint_do_not_load_without_the_algorithm(tmp_path: Path):
    run(network(), [GroupNormalization(4)], save_folder=str(tmp_path), save_filename="group.pt")

    with pytest.raises(RuntimeError, match="running_mean"):
        prepare(network(), [], load_path=str(tmp_path / "group.pt"), load_weights_only=True)


def test_it_runs_on_init_only_and_is_required_on_load():
    state = State(model=network(), rank_zero_seed=0, run_name="run", device=DeviceCPU())

    assert [event for event in Event if GroupNormalization().match(event, state)] == [Event.INIT]
    assert GroupNormalization.required_on_load() is True


@pytest.mark.parametrize(
    "algorithm",
    [
        GroupNormalization(),
        GroupNormalization(16, indivisible="largest_divisor", copy_affine=True, eps=1e-3),
        GroupNormalization(channels_per_group=8, include="module.*", exclude=["module.0", "module.1.*"]),
    ],
    ids=repr,
)
def test_the_repr_evaluates(algorithm):
    again = eval(repr(algorithm))

    assert type(again) is GroupNormalization
    assert vars(again) == vars(algorithm)
    assert repr(again) == repr(algorithm)


def test_the_repr_of_the_default():
    assert repr(GroupNormalization()) == (
        "GroupNormalization(num_groups=32, channels_per_group=None, indivisible='error', copy_affine=False, eps=1e-05, "
        "include=None, exclude=None)"
    )


@pytest.mark.parametrize(
    "arguments", [{"num_groups": 0}, {"channels_per_group": 1.5}, {"indivisible": "no"}, {"eps": -1}, {"include": []}]
)
def test_the_constructor_refuses_bad_arguments(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        GroupNormalization(**arguments)


def test_recipes_know_it_as_surgery():
    assert registry.ALGORITHMS["GroupNormalization"] is GroupNormalization
    assert "GroupNormalization" in registry.SURGERY
