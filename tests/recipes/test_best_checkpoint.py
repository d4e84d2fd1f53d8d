import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.core import Time
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import BinaryAccuracy
from torchmetrics.regression import MeanSquaredError

from ws_algorithm.recipes import best_checkpoint
from ws_algorithm.recipes.best_checkpoint import BestCheckpoint, default_monitor
from ws_algorithm.recipes.models.cifar_resnet import build_cifar_resnet


@pytest.fixture(autouse=True)
def _saves_its_value(monkeypatch):
    """Saving writes the value of the evaluation, so that a test sees of which one the file is."""

    def save(state: Any, filename: str, *, ignore_keys: list[str]) -> None:
        assert ignore_keys == ["state/optimizers*"]
        Path(filename).write_text(str(state.eval_metric_values["Monitored"].item()))

    monkeypatch.setattr(best_checkpoint, "save_checkpoint", save)


def evaluated(value: float, higher_is_better: bool, max_duration: Time | None) -> Any:
    metric = BinaryAccuracy() if higher_is_better else MeanSquaredError()
    return SimpleNamespace(
        eval_metric_values={"Monitored": torch.tensor(value, dtype=torch.float64), "Other": torch.tensor(0.0)},
        eval_metrics={"first": {"Other": MeanMetric()}, "eval": {"Monitored": metric}},
        max_duration=max_duration,
    )


def saved_after(values: Sequence[float], callback: BestCheckpoint, *, higher: bool = True, training: bool = True):
    """What the file holds after each evaluation."""
    found = []
    for value in values:
        callback.eval_end(evaluated(value, higher, Time.from_input("1ep") if training else None), None)  # type: ignore
        found.append(float(callback.path.read_text()) if callback.path.exists() else None)
    return found


@pytest.fixture
def callback(tmp_path) -> BestCheckpoint:
    return BestCheckpoint(tmp_path / "best.pt", "Monitored")


def test_higher_is_better(callback):
    assert saved_after([0.25, 0.125, 0.5, 0.375, 0.75], callback) == [0.25, 0.25, 0.5, 0.5, 0.75]


def test_lower_is_better(callback):
    assert saved_after([0.5, 0.75, 0.25], callback, higher=False) == [0.5, 0.5, 0.25]


def test_of_equal_values_the_first_is_kept(callback):
    saved_after([0.5], callback)
    callback.path.write_text("0.125")

    assert saved_after([0.5], callback) == [0.125]


def test_nothing_else_stays_in_the_folder(callback):
    saved_after([0.25, 0.5], callback)

    assert list(callback.path.parent.iterdir()) == [callback.path]


def test_evaluation_outside_training_saves_nothing(callback):
    assert saved_after([0.5], callback, training=False) == [None]


def test_the_best_value_survives_a_resumption(callback):
    saved_after([0.5], callback)
    again = BestCheckpoint(callback.path, "Monitored")
    again.load_state_dict(callback.state_dict())

    assert saved_after([0.25, 0.75], again) == [0.5, 0.75]


def test_the_best_value_of_a_run_elsewhere_does_not_count(callback, tmp_path):
    saved_after([0.5], callback)
    elsewhere = BestCheckpoint(tmp_path / "other.pt", "Monitored")
    elsewhere.load_state_dict(callback.state_dict())

    assert saved_after([0.25], elsewhere) == [0.25]


@pytest.mark.parametrize("higher", [True, False])
def test_a_value_that_is_not_a_number_is_never_the_best_for_long(callback, higher):
    assert saved_after([math.nan, 0.5, math.nan], callback, higher=higher)[1:] == [0.5, 0.5]


def model_with(metrics: dict[str, Metric], **attributes: str) -> Any:
    return SimpleNamespace(get_metrics=lambda is_train: {} if is_train else metrics, **attributes)


def test_the_default_is_what_the_model_names_or_the_last_metric_that_says_what_is_better():
    undecided, higher, lower = MeanMetric(), BinaryAccuracy(), MeanSquaredError()

    assert default_monitor(model_with({"a": higher, "b": lower, "c": undecided})) == "b"
    assert default_monitor(model_with({"a": lower, "b": higher})) == "b"
    assert default_monitor(model_with({"a": lower, "b": higher}, default_monitor="a")) == "a"
    assert default_monitor(model_with({"c": undecided})) is None
    assert default_monitor(model_with({})) is None


def test_the_best_classifier_is_that_of_the_highest_top_1_accuracy():
    assert default_monitor(build_cifar_resnet(10, depth=8)) == "MulticlassAccuracy"
