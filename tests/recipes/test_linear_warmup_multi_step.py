"""A warm-up from a factor and steps, iteration by iteration, and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from composer.core import Time, Timestamp, TimeUnit

from ws_algorithm.recipes.linear_warmup_multi_step import LinearWarmupMultiStepScheduler
from ws_algorithm.recipes.report import read_metrics
from ws_algorithm.recipes.resolve import resolve_recipe
from ws_algorithm.recipes.schema import RecipeError
from ws_algorithm.recipes.train import train

from .runs import FEW

EPOCH = 100  # batches


def factor(scheduler: LinearWarmupMultiStepScheduler, batch: int, ssr: float = 1.0) -> float:
    state: Any = SimpleNamespace(
        max_duration=Time(12, TimeUnit.EPOCH),
        timestamp=Timestamp(epoch=batch // EPOCH, batch=batch, batch_in_epoch=batch % EPOCH),
        dataloader_len=Time(EPOCH, TimeUnit.BATCH),
    )
    return scheduler(state, ssr)


@pytest.mark.parametrize("start", [1 / 3, 0.001, 0.0, 1.0])
def test_the_formula(start):
    scheduler = LinearWarmupMultiStepScheduler("50ba", ["8ep", "11ep"], start_factor=start)

    for batch in (0, 1, 25, 49, 50, 799, 800, 1099, 1100, 1199):
        # Detectron and maskrcnn-benchmark: f (1 - a) + a with a = iteration / iterations of the warm-up
        a = min(1, batch / 50)
        assert factor(scheduler, batch) == pytest.approx(
            (start * (1 - a) + a) * 0.1 ** ((batch >= 800) + (batch >= 1100))
        )


def test_milestones_in_iterations_and_parts_of_the_run():
    scheduler = LinearWarmupMultiStepScheduler("1ep", ["600ba", "0.75dur"], gamma=0.5)

    found = [factor(scheduler, batch) for batch in (100, 599, 600, 899, 900)]
    assert found == [1, 1, 0.5, 0.5, 0.25]
    assert factor(scheduler, 50) == pytest.approx(2 / 3)


def test_without_a_warm_up():
    assert [factor(LinearWarmupMultiStepScheduler("0ba", ["1ep"]), batch) for batch in (0, 100)] == [1, 0.1]


def test_a_milestone_within_the_warm_up_counts():
    assert factor(LinearWarmupMultiStepScheduler("100ba", ["50ba"], start_factor=0), 50) == pytest.approx(0.05)


@pytest.mark.parametrize(("scale_warmup", "expected"), [(False, 1.0), (True, 2 / 3)])
def test_a_stretched_schedule(scale_warmup, expected):
    scheduler = LinearWarmupMultiStepScheduler("50ba", ["8ep"], scale_warmup=scale_warmup)

    assert factor(scheduler, 50, ssr=2) == pytest.approx(expected)
    assert [factor(scheduler, batch, ssr=2) for batch in (1599, 1600)] == [1, pytest.approx(0.1)]
    assert factor(scheduler, 400, ssr=0.5) == pytest.approx(0.1)


BLOCK = "schedulers={name: LinearWarmupMultiStepScheduler, t_warmup: 500ba, milestones: [8ep, 11ep]}"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("schedulers.t_warmup=500", "`t_warmup`: '500' is no time; write it with its unit, such as 8ep or 500ba"),
        ("schedulers.t_warmup=-1ba", "`t_warmup`: '-1ba' must not be negative"),
        ("schedulers.t_warmup=3sec", "Wall clock time not an allowed time unit"),
        ("schedulers.milestones=[8, 11]", "`milestones`: 8 is no time"),
        ("schedulers.milestones=[8ep, long]", "`milestones`: 'long' is no time"),
        ("schedulers.milestones=[11ep, 8ep]", "`milestones` (=['11ep', '8ep']) must be in order"),
        ("schedulers.milestones=[8ep, 8ep]", "must be in order"),
        ("schedulers.milestones=[]", "`milestones` (=[]) must be a list of times"),
        ("schedulers.milestones=8ep", "`milestones` (='8ep') must be a list of times"),
        ("schedulers.start_factor=500", "`start_factor` (=500.0) must be from 0 to 1"),
        ("schedulers.start_factor=-0.1", "`start_factor` (=-0.1) must be from 0 to 1"),
        ("schedulers.gamma=0", "`gamma` (=0.0) must be positive"),
        ("schedulers.factor=0.1", "`schedulers.factor`: unknown argument of LinearWarmupMultiStepScheduler"),
    ],
)
def test_mistakes_are_found_before_a_run(override, says):
    with pytest.raises(RecipeError) as raised:
        resolve_recipe("quickstart", [BLOCK, override])

    (mistake,) = raised.value.errors
    assert mistake.startswith("`schedulers") and says in mistake


def test_a_run_follows_it():
    block = "schedulers={name: LinearWarmupMultiStepScheduler, t_warmup: 2ba, milestones: [1ep], start_factor: 0.5}"
    train("quickstart", [*FEW, "max_duration=2ep", "optimizers.lr=0.08", block, "save_folder=run"])

    rows = read_metrics(Path("run/metrics.jsonl"))
    rates = [row[name] for row in rows for name in row if name.startswith("lr-")]
    assert rates == pytest.approx([0.04, 0.06, 0.08, 0.008, 0.008, 0.008])
