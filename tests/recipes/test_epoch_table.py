from pathlib import Path

import pytest
from composer.core import Callback, Event, State
from composer.loggers import Logger
from hypothesis import given
from hypothesis import strategies as st

from ws_algorithm.recipes import registry
from ws_algorithm.recipes.epoch_table import epoch_figures
from ws_algorithm.recipes.report import read_metrics
from ws_algorithm.recipes.train import train

from .runs import FEW

HEADER = "Learning Rate\tTrain Loss\tValid Loss\tTrain Acc.\tValid Acc."

# Three epochs of five batches
LONG = [*FEW, "max_duration=3ep", "train_subset_num_batches=5"]


def figures_of(folder: Path) -> list[list[float]]:
    header, *lines = (folder / "epochs.tsv").read_text().splitlines()
    assert header == HEADER
    assert all(len(cell.partition(".")[2]) == 6 for line in lines for cell in line.split("\t"))
    return [[float(cell) for cell in line.split("\t")] for line in lines]


def batch(number: int, of: int, **named: float) -> dict[str, float]:
    keys = {"loss": "loss/train/total", "accuracy": "metrics/train/Accuracy", "lr": "lr-SGD/group0"}
    values = {"loss": 1.0, "accuracy": 0.5, "lr": 0.1, **named}
    return {"epoch": round(number / of, 6), "batch": number} | {keys[name]: value for name, value in values.items()}


def evaluation(number: int, of: int, loss: float, accuracy: float) -> dict[str, float]:
    values = {"metrics/eval/CrossEntropy": loss, "metrics/eval/Accuracy": accuracy, "metrics/eval/Top5Accuracy": 1.0}
    return {"epoch": round(number / of, 6), "batch": number} | values


def test_an_epoch_has_the_means_of_its_batches_and_its_last_evaluation():
    lines = [
        batch(1, 2, loss=4.0, accuracy=0.25, lr=0.5),
        evaluation(1, 2, 9.0, 0.0),
        batch(2, 2, loss=2.0, accuracy=0.75, lr=0.25),
        evaluation(2, 2, 3.0, 0.125),
        batch(3, 2, loss=1.0, accuracy=1.0, lr=0.125),  # an epoch that is not evaluated
        batch(4, 2),
        batch(5, 2, loss=0.5, accuracy=1.0, lr=0.0625),  # one that ends early
        evaluation(5, 2, 0.25, 0.75),
    ]

    assert list(epoch_figures(lines)) == [(0.25, 3.0, 3.0, 50.0, 12.5), (0.0625, 0.5, 0.25, 100.0, 75.0)]


@given(batches=st.integers(1, 40), epochs=st.integers(1, 4))
def test_batches_are_those_of_their_epoch(batches, epochs):
    lines = []
    for number in range(1, batches * epochs + 1):
        epoch = (number - 1) // batches
        lines.append(batch(number, batches, loss=float(epoch)))
        lines += [evaluation(number, batches, 1.0, 1.0)] if number % batches == 0 else []

    assert [figures[1] for figures in epoch_figures(lines)] == [float(epoch) for epoch in range(epochs)]


@pytest.mark.parametrize(
    "without", ["loss/train/total", "metrics/train/Accuracy", "lr-SGD/group0", "metrics/eval/CrossEntropy"]
)
def test_without_one_of_the_five_there_is_no_line(without):
    lines = [batch(1, 1), evaluation(1, 1, 1.0, 1.0)]

    assert list(epoch_figures([{n: v for n, v in line.items() if n != without} for line in lines])) == []


def test_the_rate_is_that_of_what_no_group_selects():
    lines = [batch(1, 1, lr=0.2) | {"lr-SGD/group1": 0.1}, evaluation(1, 1, 1.0, 1.0)]

    assert [figures[0] for figures in epoch_figures(lines)] == [0.1]


def test_a_run_has_a_line_per_epoch(finished_run):
    rows = read_metrics(finished_run / "metrics.jsonl")

    found = figures_of(finished_run)

    assert len(found) == 2
    for number, line in enumerate(found):
        of_epoch = rows[3 * number : 3 * number + 3]  # three batches
        assert line == pytest.approx(
            [
                of_epoch[-1]["lr-SGD/group0"],
                sum(row["loss/train/total"] for row in of_epoch) / 3,
                of_epoch[-1]["metrics/eval/CrossEntropy"],
                100 * sum(row["metrics/train/MulticlassAccuracy"] for row in of_epoch) / 3,
                100 * of_epoch[-1]["metrics/eval/MulticlassAccuracy"],
            ],
            abs=1e-6,
        )


class Interrupt(Callback):
    """Stops a run at an event of a batch."""

    def __init__(self, event: str, batch: int) -> None:
        self.event, self.batch = event, batch

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event.value == self.event and int(state.timestamp.batch) >= self.batch:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    train("quickstart", [*LONG, f"save_folder={folder}"])
    return folder


@pytest.mark.parametrize(
    ("event", "batch", "lines"),
    [("batch_end", 2, None), ("before_backward", 7, 1), ("eval_end", 10, 1), ("epoch_checkpoint", 10, 2)],
)
def test_after_an_interruption_it_is_that_of_a_whole_run(event, batch, lines, uninterrupted, monkeypatch):
    monkeypatch.setitem(registry.CALLBACKS, "Interrupt", Interrupt)
    run = [*LONG, "save_folder=run"]

    with pytest.raises(KeyboardInterrupt):
        train("quickstart", [*run, f"callbacks.Interrupt={{event: {event}, batch: {batch}}}"])
    interrupted = figures_of(Path("run")) if Path("run/epochs.tsv").exists() else None
    train("quickstart", [*run, "autoresume=true"])

    assert (None if interrupted is None else len(interrupted)) == lines
    assert Path("run/epochs.tsv").read_text() == (uninterrupted / "epochs.tsv").read_text()


def test_lines_of_an_epoch_that_comes_again_are_removed(uninterrupted, monkeypatch):
    monkeypatch.setitem(registry.CALLBACKS, "Interrupt", Interrupt)
    run = [*LONG, "save_interval=3ep", "save_folder=run"]  # nothing to resume from
    with pytest.raises(KeyboardInterrupt):
        train("quickstart", [*run, "callbacks.Interrupt={event: batch_end, batch: 11}"])
    assert len(figures_of(Path("run"))) == 2

    with pytest.raises(KeyboardInterrupt):
        train("quickstart", [*run, "autoresume=true", "callbacks.Interrupt={event: batch_end, batch: 1}"])

    assert not Path("run/epochs.tsv").exists()


def test_a_run_without_evaluation_has_no_table():
    train("quickstart", [*FEW, "eval_dataloader=null", "monitor=null", "save_folder=run"])

    assert Path("run/metrics.jsonl").exists() and not Path("run/epochs.tsv").exists()
