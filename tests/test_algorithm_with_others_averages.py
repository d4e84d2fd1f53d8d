"""The algorithm beside Composer's averages of weights: what is averaged are the raw weights, wherever it stands."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from composed_runs import assert_same, bottlenecks, predict, prepare, run, standardized, two_convolutions
from composer.algorithms import EMA, SWA, BlurPool
from composer.core import Algorithm, Callback, State
from composer.loggers import Logger
from torch import Tensor

from ws_algorithm import WeightStandardization, standardize_weight

pytestmark = pytest.mark.filterwarnings("ignore:SWA has known issues:UserWarning")

RAW = "module.0.parametrizations.weight.original"


def half_life_of_a_batch() -> EMA:
    return EMA(half_life="1ba")


def average_of_the_middle() -> SWA:
    """From the first of four batches to the third, which ends with the average in the model."""
    return SWA(swa_start="0.25dur", swa_end="0.75dur", update_interval="1ba")


def ordered(place: int, *others: Algorithm) -> Sequence[Algorithm]:
    algorithms = list(others)
    algorithms.insert(place, WeightStandardization())
    return algorithms


class Trajectory(Callback):
    """The parameters after every step."""

    def __init__(self) -> None:
        self.parameters: list[dict[str, Tensor]] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        self.parameters.append({name: value.detach().clone() for name, value in state.model.named_parameters()})


def trajectory(algorithms: Sequence[Algorithm]) -> list[dict[str, Tensor]]:
    recorder = Trajectory()
    run(two_convolutions(), algorithms, callbacks=recorder)
    return recorder.parameters


@pytest.mark.parametrize("place", [0, 1])
def test_ema_averages_the_raw_weights(place):
    steps = trajectory([WeightStandardization()])
    average = steps[0]  # EMA starts at the end of the first batch
    for parameters in steps[1:]:
        average = {name: average[name] / 2 + parameters[name] / 2 for name in average}
    ema = half_life_of_a_batch()

    trainer = run(two_convolutions(), ordered(place, ema))

    assert ema.ema_model is not None and RAW in average
    assert not torch.equal(average[RAW], steps[-1][RAW])
    assert_same(ema.ema_model.named_parameters_dict, average)
    assert_same(dict(trainer.state.model.named_parameters()), steps[-1])
    averaged: Any = ema.get_ema_model(copy.deepcopy(trainer.state.model))
    assert standardized(averaged) == {"module.0", "module.3"}
    assert torch.equal(averaged.module[0].weight, standardize_weight(average[RAW]))


@pytest.mark.parametrize("place", [0, 1])
def test_swa_averages_the_raw_weights(place):
    steps = trajectory([WeightStandardization()])
    average = steps[0]
    for count, parameters in enumerate(steps[1:3], start=1):
        average = {name: torch.lerp(average[name], parameters[name], 1 / (count + 1)) for name in average}
    swa = average_of_the_middle()

    actual = trajectory(ordered(place, swa))

    assert swa.swa_completed
    assert_same(actual[:2], steps[:2])
    assert list(actual[2]) == list(average) and RAW in average
    # The running mean is rounded at each step, in an order of operations that is torch's own
    torch.testing.assert_close(actual[2], average, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("surgery", [None, BlurPool], ids=["alone", "with BlurPool"])
def test_the_first_copy_of_ema_is_of_the_standardized_model(place, surgery):
    ema = half_life_of_a_batch()
    others = [ema] if surgery is None else [surgery(), ema]

    trainer = prepare(bottlenecks(), ordered(place, *others))

    assert ema.ema_model is not None
    assert_same(ema.ema_model.named_parameters_dict, dict(trainer.state.model.named_parameters()))
    assert_same(ema.ema_model.named_buffers_dict, dict(trainer.state.model.named_buffers()))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("surgery", [None, BlurPool], ids=["alone", "with BlurPool"])
def test_the_first_copy_of_swa_is_of_the_standardized_model(place, surgery):
    swa = average_of_the_middle()
    others = [swa] if surgery is None else [surgery(), swa]

    trainer = prepare(bottlenecks(), ordered(place, *others))

    assert swa.swa_model is not None
    copied: Any = swa.swa_model.module
    assert_same(copied.state_dict(), trainer.state.model.state_dict())
    assert standardized(copied) == standardized(trainer.state.model) != set()


def test_the_learning_rate_of_swa_survives_that_its_copy_is_taken_again():
    swa = SWA("0.25dur", "0.75dur", update_interval="1ba", schedule_swa_lr=True, anneal_steps=2, swa_lr=0.01)
    rates = []
    for algorithms in ([swa, WeightStandardization()], [WeightStandardization(), copy.deepcopy(swa)]):
        trainer = run(two_convolutions(), algorithms)
        rates.append([group["lr"] for optimizer in trainer.state.optimizers for group in optimizer.param_groups])

    assert rates[0] == rates[1]


def checkpoints(folder: Path) -> dict[str, Any]:
    """A checkpoint in the middle of the only epoch and one at its end."""
    name = {"save_folder": str(folder), "save_filename": "ba{batch}.pt", "save_overwrite": True}
    return {**name, "save_interval": "2ba", "batch_size": 2}


def outcome(trainer: Any) -> dict[str, Any]:
    """All that training changed: the model and the state of each algorithm."""
    states = {type(algorithm).__name__: algorithm.state_dict() for algorithm in trainer.state.algorithms}
    return {"model": trainer.state.model.state_dict(), **{name: states[name] for name in sorted(states)}}


@pytest.mark.parametrize("build", [half_life_of_a_batch, average_of_the_middle], ids=["EMA", "SWA"])
@pytest.mark.parametrize("saved, loaded", [(0, 0), (1, 1), (0, 1), (1, 0)])
def test_a_run_resumes_to_the_same_weights(build: Callable[[], Algorithm], saved: int, loaded: int, tmp_path: Path):
    files = checkpoints(tmp_path)
    whole = run(two_convolutions(), ordered(saved, build()), **files)

    resumed = prepare(two_convolutions(), ordered(loaded, build()), **files, load_path=str(tmp_path / "ba2.pt"))
    assert resumed.state.timestamp.batch == 2
    resumed.fit()

    expected, actual = outcome(whole), outcome(resumed)
    assert "EMA" in expected or "SWA" in expected
    for state in (*expected.values(), *actual.values()):
        state.pop("repr", None)
    assert_same(actual, expected)
    assert_same(predict(resumed.state.model), predict(whole.state.model))
    assert standardized(resumed.state.model) == {"module.0", "module.3"}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_run_with_surgery_resumes_too(place: int, tmp_path: Path):
    def algorithms() -> Sequence[Algorithm]:
        return ordered(place, average_of_the_middle(), BlurPool())

    files = checkpoints(tmp_path)
    whole = run(bottlenecks(), algorithms(), **files)

    resumed = prepare(bottlenecks(), algorithms(), **files, load_path=str(tmp_path / "ba2.pt"))
    resumed.fit()

    assert_same(resumed.state.model.state_dict(), whole.state.model.state_dict())
