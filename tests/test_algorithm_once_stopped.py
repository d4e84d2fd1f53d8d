"""Runs once per optimizer step that stop in the middle of a step leave what those without leave, and go on alike.

In float64, where twenty steps leave roundings of 1e-12 or so; a wrong gradient shows in the first digits.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accumulating_runs import WeightsUsed, assert_ends_near, by_hand, exact, prepare, run, weights
from composer import Trainer
from composer.algorithms import GradientClipping
from composer.core import Algorithm, Callback, State
from composer.loggers import Logger
from torch import Tensor

from ws_algorithm import WeightStandardization, standardize_weight
from ws_algorithm.parametrization import raw_weight

RAISING_EVENTS = ["before_forward", "after_forward", "in_backward", "after_backward"]


class Raises(Callback):
    """Raises `error` at the second micro-batch of the third batch, `times` times."""

    def __init__(self, event: str, error: Exception, times: int = 1) -> None:
        self.error, self.times, self.count = error, times, 0
        setattr(self, event, self._count)
        if event == "in_backward":
            self.after_loss = self._arm

    def _is_due(self, state: State) -> bool:
        if int(state.timestamp.batch) != 2 or self.times == 0:
            return False
        self.count += 1
        return self.count == 2

    def _count(self, state: State, logger: Logger) -> None:
        if self._is_due(state):
            self._fail()

    def _arm(self, state: State, logger: Logger) -> None:
        if self._is_due(state):
            loss: Any = state.loss
            loss.register_hook(self._fail)

    def _fail(self, *_: Any) -> None:
        self.times, self.count = self.times - 1, 0
        raise self.error


def stopped(algorithm: Algorithm, event: str) -> Trainer:
    trainer = prepare([algorithm], callbacks=Raises(event, ArithmeticError("stop")), max_duration="6ba")
    with pytest.raises(ArithmeticError, match="stop"):
        trainer.fit()
    assert trainer.state.timestamp.batch == 2
    return trainer


@pytest.mark.parametrize("through", ["model", "network", "layer"])
@pytest.mark.parametrize("zeroes", [True, False], ids=["zeroed", "accumulated"])
@pytest.mark.parametrize("event", RAISING_EVENTS)
def test_a_loop_by_hand_after_a_run_that_stopped(event, zeroes, through):
    results = []
    for algorithm in (WeightStandardization(), exact()):
        model: Any = stopped(algorithm, event).state.model
        forwards: dict[str, Callable[[Tensor], Tensor]] = {
            "model": lambda batch, model=model: model((batch, None)),
            "network": model.module,
            "layer": lambda batch, model=model: model.module[3](batch[:, :1].expand(-1, 4, -1, -1)),
        }
        results.append((by_hand(model, forwards[through], zeroes), weights(model)))
        with torch.no_grad():
            assert torch.equal(model.module[0].weight, standardize_weight(raw_weight(model.module[0])))

    assert_ends_near(results[0][0], results[1][0])
    assert_ends_near(results[0][1], results[1][1])


@pytest.mark.parametrize("event", RAISING_EVENTS)
def test_a_step_by_hand_after_a_run_that_stopped(event):
    """The gradients of the micro-batches before belong to the step."""
    results = []
    for algorithm in (WeightStandardization(), exact()):
        trainer = stopped(algorithm, event)
        trainer.state.optimizers[0].step()
        results.append(weights(trainer.state.model))

    assert_ends_near(*results)


@pytest.mark.parametrize("event", RAISING_EVENTS)
def test_a_run_that_stopped_goes_on(event):
    results = []
    for algorithm in (WeightStandardization(), exact()):
        trainer = stopped(algorithm, event)
        trainer.fit()
        assert trainer.state.timestamp.batch == 6
        results.append(weights(trainer.state.model))

    assert_ends_near(*results)


def test_the_steps_after_a_run_that_stopped_are_standardized_once_again():
    first, second = WeightsUsed(), WeightsUsed()
    trainer = stopped(WeightStandardization(), "after_forward")
    trainer.state.callbacks.append(first)
    trainer.fit()
    run([WeightStandardization()], trainer.state.model, callbacks=second, max_duration="3ba")

    for used in (first, second):
        assert {len({weight.data_ptr() for weight in batch}) for batch in used.by_batch.values()} == {1}


@pytest.mark.parametrize("event", RAISING_EVENTS)
def test_a_copy_of_a_model_whose_run_stopped(event):
    results = []
    for algorithm in (WeightStandardization(), exact()):
        copied: Any = copy.deepcopy(stopped(algorithm, event).state.model)
        results.append(by_hand(copied, copied.module, zeroes=False))

    assert_ends_near(*results)


@pytest.mark.filterwarnings("ignore:CUDA out of memory:RuntimeWarning")
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("event", RAISING_EVENTS)
def test_out_of_memory_with_smaller_micro_batches(event, times):
    """As on a GPU, where the Trainer tries the batch again with micro-batches of half the size."""
    results = []
    for algorithm in (WeightStandardization(), exact()):
        callback = Raises(event, RuntimeError("CUDA out of memory"), times)
        arguments: Any = {"callbacks": callback, "device_train_microbatch_size": 4, "max_duration": "5ba"}
        trainer = prepare([algorithm, GradientClipping("norm", 0.05)], **arguments)
        trainer.state.auto_microbatching = True
        trainer.fit()
        assert callback.times == 0 and trainer.state.device_train_microbatch_size == 4 // 2**times
        results.append(weights(trainer.state.model))

    assert_ends_near(*results)
