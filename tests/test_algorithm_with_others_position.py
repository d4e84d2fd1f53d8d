"""The place of the algorithm in the list of the ``Trainer``, and what happens behind it all the same."""

from collections.abc import Sequence
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from composed_runs import bottlenecks, fit, prepare, run, standardizable, standardized, two_convolutions
from composer.algorithms import BlurPool, GhostBatchNorm, LayerFreezing, SqueezeExcite
from composer.core import Algorithm, Callback, Event, State
from composer.core.passes import sort_to_front
from composer.loggers import Logger
from torch import nn

from ws_algorithm import WeightStandardization, apply_weight_standardization

LATER = [Event.BEFORE_LOAD, Event.AFTER_LOAD, Event.FIT_START]


class Calls(Algorithm):
    """A user's algorithm that notes when it is applied."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        self.events.append(event)


class NewConvolution(Algorithm):
    """A user's algorithm that gives the model new convolutions of the given names at an event."""

    def __init__(self, event: Event, *names: str) -> None:
        self.event, self.names = event, names

    def match(self, event: Event, state: State) -> bool:
        return event == self.event

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        for name in self.names:
            network: Any = state.model.module
            place = int(name.removeprefix("module."))
            new = nn.Conv2d(network[place].in_channels, network[place].out_channels, network[place].kernel_size)
            network[place] = new
            state.optimizers[0].add_param_group({"params": list(new.parameters())})


class StandardizedConvolution(NewConvolution):
    """The same, standardized at once."""

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        super().apply(event, state, logger)
        apply_weight_standardization(state.model)


class LateBlurPool(BlurPool):
    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_LOAD


class Forwards(Callback):
    def __init__(self) -> None:
        self.count = 0

    def before_forward(self, state: State, logger: Logger) -> None:
        self.count += 1


class NewConvolutionByCallback(Callback):
    def __init__(self, event: str) -> None:
        setattr(self, event, self.replace)

    def replace(self, state: State, logger: Logger) -> None:
        NewConvolution(Event.INIT, "module.3").apply(Event.INIT, state, logger)


def positions(trainer: Any) -> list[int]:
    return [id(algorithm) for algorithm in trainer.state.algorithms]


def test_alone():
    ws = WeightStandardization()

    trainer = prepare(two_convolutions(), [ws])

    assert positions(trainer) == [id(ws)]
    assert standardized(trainer.state.model) == {"module.0", "module.3"}


def test_last_already():
    algorithms = [BlurPool(), SqueezeExcite(4, 16), WeightStandardization()]

    trainer = prepare(bottlenecks(), algorithms)

    assert positions(trainer) == [id(algorithm) for algorithm in algorithms]


@pytest.mark.parametrize("place", [0, 1, 2, 3, 4])
def test_it_acts_behind_all_surgery_and_the_others_keep_their_order(place):
    others = [BlurPool(), Calls(), LayerFreezing(), SqueezeExcite(4, 16)]
    ws = WeightStandardization()
    listed = [*others[:place], ws, *others[place:]]
    given = list(listed)

    trainer = prepare(bottlenecks(), listed)

    assert listed == given  # the user's own list
    found = positions(trainer)
    assert sorted(found) == sorted(map(id, given))
    assert [key for key in found if key != id(ws)] == [id(other) for other in others]
    assert standardized(trainer.state.model) == set(standardizable(trainer.state.model))


@pytest.mark.parametrize("place", [0, 1])
def test_surgery_of_a_users_own_comes_first_too(place):
    algorithms: list[Algorithm] = [NewConvolution(Event.INIT, "module.3")]
    algorithms.insert(place, WeightStandardization())

    trainer = run(two_convolutions(), algorithms)

    assert standardized(trainer.state.model) == {"module.0", "module.3"}


def test_a_pass_of_the_users_own_that_puts_it_first_stops_the_run():
    def first(algorithms: Sequence[Algorithm], event: Event) -> Sequence[Algorithm]:
        return sort_to_front(algorithms, cls=WeightStandardization)

    trainer = prepare(bottlenecks(), [BlurPool(), WeightStandardization()], algorithm_passes=first)

    with pytest.raises(ValueError, match=r"layer2\.0\.conv2"):
        fit(trainer)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_every_algorithm_runs_exactly_once_at_each_of_its_events(place):
    calls = [Calls(), Calls(), Calls()]
    algorithms: list[Algorithm] = [*calls]
    algorithms.insert(place, WeightStandardization())

    run(two_convolutions(), algorithms)

    for one in calls:
        assert one.events == [Event.INIT, *[Event.BATCH_START] * 4]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_two_of_them_keep_both(place):
    first, second = WeightStandardization(), WeightStandardization(1)
    algorithms: list[Algorithm] = [first, second]
    algorithms.insert(place, BlurPool())

    trainer = prepare(bottlenecks(), algorithms)

    assert sorted(positions(trainer)) == sorted(map(id, algorithms))
    assert standardized(trainer.state.model) == set(standardizable(trainer.state.model))


@pytest.mark.parametrize("pattern", ["ww", "wbw", "wwb", "bww", "wbb", "bwb"])
def test_the_same_object_listed_twice(pattern):
    ws, blur_pool = WeightStandardization(), BlurPool()

    trainer = run(bottlenecks(), [{"w": ws, "b": blur_pool}[letter] for letter in pattern])

    for letter, algorithm in {"w": ws, "b": blur_pool}.items():
        listed = pattern.count(letter)
        assert min(listed, 1) <= positions(trainer).count(id(algorithm)) <= listed
    assert len(positions(trainer)) <= len(pattern)
    assert standardized(trainer.state.model) == set(standardizable(trainer.state.model))


def test_one_object_serves_two_trainers():
    ws = WeightStandardization()
    for others in ([BlurPool()], [SqueezeExcite(4, 16), BlurPool()], []):
        trainer = run(bottlenecks(), [ws, *others])

        assert sorted(positions(trainer)) == sorted(map(id, [ws, *others]))
        assert standardized(trainer.state.model) == set(standardizable(trainer.state.model))
        trainer.close()


def test_fit_may_be_called_again():
    trainer = run(bottlenecks(torch.nn.BatchNorm2d), [WeightStandardization(), GhostBatchNorm(2)])
    trainer.fit(duration="2ba")

    assert trainer.state.timestamp.batch == 6


def test_a_compiled_model_is_trained_and_its_late_surgery_found():
    eager: Any = {"compile_config": {"backend": "eager"}}

    trainer = run(two_convolutions(), [WeightStandardization()], **eager)

    assert trainer.state.timestamp.batch == 4
    late = prepare(two_convolutions(), [WeightStandardization(), NewConvolution(Event.AFTER_LOAD, "module.3")], **eager)
    with pytest.raises(ValueError, match=r"module\.3"):
        fit(late)


@pytest.mark.parametrize("mock", [Mock, MagicMock])
def test_it_matches_init_whatever_the_state_is(mock):
    assert WeightStandardization().match(Event.INIT, mock())


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("names", [("module.3",), ("module.0", "module.3")], ids=" ".join)
@pytest.mark.parametrize("event", LATER, ids=str)
def test_convolutions_that_are_replaced_later_stop_the_run(event, names, is_first):
    algorithms = [WeightStandardization(), NewConvolution(event, *names)]
    forwards = Forwards()
    trainer = prepare(two_convolutions(), algorithms if is_first else algorithms[::-1], callbacks=forwards)

    with pytest.raises(ValueError) as caught:
        fit(trainer)

    for name in ("module.0", "module.3"):
        assert (name in str(caught.value)) == (name in names)
    assert forwards.count == trainer.state.timestamp.batch == 0


@pytest.mark.parametrize("event", ["before_load", "after_load", "fit_start"])
def test_convolutions_that_a_callback_replaces_stop_the_run(event):
    forwards = Forwards()
    trainer = prepare(
        two_convolutions(), [WeightStandardization()], callbacks=[NewConvolutionByCallback(event), forwards]
    )

    with pytest.raises(ValueError, match=r"module\.3"):
        fit(trainer)

    assert forwards.count == trainer.state.timestamp.batch == 0


@pytest.mark.parametrize("is_first", [True, False])
def test_surgery_of_composer_that_comes_late_stops_the_run(is_first):
    algorithms = [WeightStandardization(), LateBlurPool()]
    trainer = prepare(bottlenecks(), algorithms if is_first else algorithms[::-1])

    with pytest.raises(ValueError, match=r"layer2\.0\.conv2"):
        fit(trainer)


@pytest.mark.parametrize("event", LATER, ids=str)
def test_a_replacement_that_is_standardized_may_come_late(event):
    trainer = run(two_convolutions(), [WeightStandardization(), StandardizedConvolution(event, "module.3")])

    assert trainer.state.timestamp.batch == 4
    assert standardized(trainer.state.model) == {"module.0", "module.3"}
