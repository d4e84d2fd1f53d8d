"""The algorithm once per optimizer step: runs of the ``Trainer`` end in the weights of those without.

In float64, where twenty steps leave roundings of 1e-12 or so; a wrong gradient shows in the first digits.
"""

import copy
import logging
from pathlib import Path
from typing import Any

import composer.algorithms
import pytest
import torch
from accumulating_runs import (
    OTHERS,
    WeightsUsed,
    assert_ends_near,
    by_hand,
    classifier,
    data,
    exact,
    expected,
    lamb,
    outcome,
    prepare,
    run,
    weights,
)
from composer.algorithms import SAM, GradientClipping
from composer.core import Callback, State
from composer.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader

from ws_algorithm import WeightStandardization, fold_weight_standardization
from ws_algorithm.parametrization import raw_weight

pytestmark = [
    pytest.mark.filterwarnings("ignore:SAM has known issues:UserWarning"),
    pytest.mark.filterwarnings("ignore:SWA has known issues:UserWarning"),
]


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_run_ends_in_the_same_weights(name, place):
    optimizer, build = OTHERS[name]
    others, ours = build(), [WeightStandardization()]

    trainer = run([*ours, *others] if place == "first" else [*others, *ours], None, optimizer)

    assert_ends_near(outcome(trainer), expected(name))
    if name != "SGD":  # the other one does something
        plain, actual = expected("SGD"), outcome(trainer)
        raw = "module.0.parametrizations.weight.original"
        assert actual.keys() != plain.keys() or not torch.allclose(actual[raw], plain[raw], rtol=1e-4)


@pytest.mark.parametrize("formula", ["paper", "tensorflow", "timm", "bit"])
def test_a_run_by_formula(formula):
    once, plain = (
        run([WeightStandardization(formula=formula, once_per_step=once)], max_duration="6ba") for once in (True, False)
    )

    assert_ends_near(outcome(once), outcome(plain))


def test_a_run_in_float32():
    once, plain = (
        run([WeightStandardization(once_per_step=once)], classifier(torch.float32), max_duration="10ba")
        for once in (True, False)
    )

    assert_ends_near(outcome(once), outcome(plain), tolerance=1e-6)


def test_a_run_of_lamb_in_float32():
    once, plain = (
        run([ours, GradientClipping("norm", 0.05)], classifier(torch.float32), lamb)
        for ours in (WeightStandardization(), exact())
    )

    assert_ends_near(outcome(once), outcome(plain), tolerance=1e-6)


@pytest.mark.parametrize("name", ["SGD", "clip norm", "SAM"])
def test_a_run_with_the_algorithm_of_composer(name):
    optimizer, others = OTHERS[name]

    theirs = weights(run([composer.algorithms.WeightStandardization(), *others()], None, optimizer).state.model)

    ours = expected(name)
    assert list(ours) == list(theirs)
    actual = outcome(run([WeightStandardization(), *others()], None, optimizer))
    assert_ends_near(actual, theirs, tolerance=1e-5)


def test_two_of_them_equal_one():
    trainer = run([WeightStandardization(), GradientClipping("norm", 0.05), WeightStandardization()])

    assert_ends_near(outcome(trainer), expected("clip norm"))


def test_it_is_the_default():
    assert WeightStandardization().once_per_step is True
    assert "once_per_step=True" in repr(WeightStandardization())
    assert "once_per_step=False" in repr(exact())


@pytest.mark.parametrize("value", [None, 1, "yes"], ids=repr)
def test_what_is_not_a_truth_value_is_refused(value):
    with pytest.raises(ValueError, match="`once_per_step`"):
        WeightStandardization(once_per_step=value)


@pytest.mark.parametrize("once, count", [(True, 1), (False, 4)])
def test_weights_are_computed_once_per_step(once, count):
    used = WeightsUsed()

    run([WeightStandardization(once_per_step=once)], callbacks=used, max_duration="3ba")

    assert list(used.by_batch) == [0, 1, 2]
    assert all(len(batch) == 4 for batch in used.by_batch.values())
    assert [len({weight.data_ptr() for weight in batch}) for batch in used.by_batch.values()] == [count] * 3


# Checkpoints, evaluation, fallback


def test_checkpoints(tmp_path: Path):
    def files(name: str) -> dict[str, Any]:
        files = {"save_folder": str(tmp_path / name), "save_filename": "ba{batch}.pt", "save_interval": "5ba"}
        return {**files, "max_duration": "8ba"}

    whole = run([WeightStandardization()], **files("once"))
    run([exact()], **files("exact"))

    once, plain = (
        torch.load(tmp_path / name / "ba5.pt", weights_only=False)["state"]["model"] for name in ("once", "exact")
    )
    assert_ends_near(once, plain)
    for name in ("once", "exact"):
        for algorithm in (WeightStandardization(), exact()):
            resumed = prepare([algorithm], load_path=str(tmp_path / name / "ba5.pt"), max_duration="8ba")
            assert resumed.state.timestamp.batch == 5
            resumed.fit()
            assert_ends_near(weights(resumed.state.model), weights(whole.state.model))


class EvaluatedLosses(Callback):
    """The loss of each evaluation, and what it must be: that of the model with its weights folded."""

    def __init__(self) -> None:
        self.pairs: list[tuple[float, float]] = []

    def eval_end(self, state: State, logger: Logger) -> None:
        folded: Any = copy.deepcopy(state.model)
        fold_weight_standardization(folded)
        images, labels = data().tensors
        with torch.no_grad():
            expected = nn.functional.cross_entropy(folded.module(images), labels)
        self.pairs.append((state.eval_metrics["eval"]["CrossEntropy"].compute().item(), expected.item()))


def test_evaluation_uses_the_weights_of_now():
    losses = EvaluatedLosses()
    evaluation: Any = {"eval_dataloader": DataLoader(data(), batch_size=4), "eval_interval": "2ba"}
    trainer = prepare([WeightStandardization()], callbacks=losses, max_duration="6ba", **evaluation)

    trainer.fit()
    trainer.eval()
    with torch.no_grad():
        network: Any = trainer.state.model.module
        raw_weight(network[0]).mul_(torch.linspace(-1, 1, 3))
    trainer.eval()
    trainer.fit(duration="4ba")
    trainer.eval()

    assert len(losses.pairs) == 3 + 1 + 1 + 2 + 1
    assert len({folded for _, folded in losses.pairs}) == 3 + 1 + 2
    for actual, folded in losses.pairs:
        assert actual == pytest.approx(folded, rel=1e-6)  # the metric is a float32


def test_a_copy_of_the_model_within_a_step():
    class Copies(Callback):
        def after_backward(self, state: State, logger: Logger) -> None:
            copied: Any = copy.deepcopy(state.model)
            by_hand(copied, copied.module, zeroes=True)

    trainer = run([WeightStandardization()], callbacks=Copies(), max_duration="6ba")

    assert_ends_near(outcome(trainer), outcome(run([exact()], max_duration="6ba")))


def test_evaluation_within_a_step():
    """A callback that predicts between micro-batches changes nothing."""

    class Predicts(Callback):
        def after_backward(self, state: State, logger: Logger) -> None:
            with torch.no_grad():
                state.model(state.batch)

    trainer = run([WeightStandardization()], callbacks=Predicts())

    assert_ends_near(outcome(trainer), expected("SGD"))


def test_a_compiled_model_is_standardized_exactly_and_one_line_says_so(caplog):
    torch._dynamo.reset()
    with caplog.at_level(logging.INFO):
        trainer = run([WeightStandardization()], compile_config={"backend": "eager"}, max_duration="3ba")
    torch._dynamo.reset()

    records = [record for record in caplog.records if "once per step" in record.getMessage()]
    assert [record.name for record in records] == ["ws_algorithm.once"]
    assert "compiled" in records[0].getMessage()
    assert_ends_near(outcome(trainer), outcome(run([exact()], max_duration="3ba")))


def test_nothing_is_said_in_an_ordinary_run(caplog):
    with caplog.at_level(logging.INFO):
        run([WeightStandardization(), GradientClipping("norm", 1.0), SAM()], max_duration="2ba")

    assert [record.getMessage() for record in caplog.records if "once per step" in record.getMessage()] == []
