import json
import re
from pathlib import Path

import pytest

from ws_algorithm.recipes.report import read_metrics
from ws_algorithm.recipes.run_log import remove_lines_after
from ws_algorithm.recipes.train import train

from .runs import FEW, metric_rows


def line(batch: int, **metrics: float) -> str:
    return json.dumps({"epoch": batch / 3, "batch": batch, **metrics}) + "\n"


@pytest.mark.parametrize("batch", [0, 2, 3, 4, 9])
def test_lines_of_later_batches_are_removed(tmp_path, batch):
    path = tmp_path / "metrics.jsonl"
    batches = [1, 2, 3, 3, 4]  # evaluation after the third writes a line of its own
    path.write_text("".join(line(number, loss=1.5) for number in batches))

    remove_lines_after(path, batch)

    assert path.read_text() == "".join(line(number, loss=1.5) for number in batches if number <= batch)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("length", [1, 5, len(line(3, loss=1.5)) - 1])
def test_a_last_line_that_was_cut_off_is_removed(length):
    path = Path("metrics.jsonl")
    path.write_text(line(1) + line(2) + line(3, loss=1.5)[:length])

    remove_lines_after(path, 3)

    assert path.read_text() == line(1) + line(2)


def test_trimming_what_is_not_there_does_nothing(tmp_path):
    remove_lines_after(tmp_path / "metrics.jsonl", 3)

    assert list(tmp_path.iterdir()) == []


def test_each_batch_and_evaluation_has_a_line(finished_run):
    rows = metric_rows(finished_run)

    # Two epochs of three batches of 16 images, each followed by an evaluation
    assert [row["batch"] for row in rows] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert [row["epoch"] for row in rows] == [round(row["batch"] / 3, 6) for row in rows]
    assert [row["sample"] for row in rows] == [16 * row["batch"] for row in rows]
    assert ["metrics/eval/MulticlassAccuracy" in row for row in rows] == 2 * [False, False, False, True]
    assert ["loss/train/total" in row for row in rows] == 2 * [True, True, True, False]
    assert not [name for row in rows for name in row if name.startswith("time/")]


def test_seconds_are_of_training_and_never_fall(finished_run):
    seconds = [json.loads(text)["seconds"] for text in (finished_run / "metrics.jsonl").read_text().splitlines()]

    assert seconds == sorted(seconds) and seconds[0] > 0
    assert seconds[2] == seconds[3] and seconds[6] == seconds[7]  # evaluation takes none


def test_the_log_says_the_mean_loss_and_the_evaluation_of_each_epoch(finished_run):
    rows = read_metrics(finished_run / "metrics.jsonl")
    said = re.findall(
        r"ws_algorithm.recipes.run_log: (.*), \d+ images/s$", (finished_run / "log.txt").read_text(), re.M
    )

    expected = []
    for epoch in (1, 2):
        of_epoch = rows[3 * epoch - 3 : 3 * epoch]
        loss = sum(row["loss/train/total"] for row in of_epoch) / 3
        names = ("CrossEntropy", "MulticlassAccuracy", "Top5Accuracy")
        values = ", ".join(f"{name} {of_epoch[-1][f'metrics/eval/{name}']:.4f}" for name in names)
        expected.append(f"epoch {epoch}/2, batch {3 * epoch}: train loss {loss:.4f}, {values}")
    assert said == expected


def test_an_epoch_without_an_evaluation_has_no_figures_of_one(tmp_path):
    train("quickstart", [*FEW, "max_duration=4ep", "eval_interval=2ep", f"save_folder={tmp_path}"])

    said = re.findall(r"run_log: epoch (\d)/4, (.*)", (tmp_path / "log.txt").read_text())

    assert [(epoch, "MulticlassAccuracy" in line) for epoch, line in said] == [
        ("1", False),
        ("2", True),
        ("3", False),
        ("4", True),
    ]


def test_training_that_ends_inside_an_epoch_says_so(tmp_path):
    train("quickstart", [*FEW, "max_duration=4ba", f"save_folder={tmp_path}"])
    said = re.findall(r"run_log: (epoch .*?): train loss (\S+?)[, ]", (tmp_path / "log.txt").read_text())
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]

    # 4 batches of 3 per epoch; the line is about the one batch of the second epoch
    assert said[-1] == ("epoch 1.33, batch 4", f"{last['loss/train/total']:.4f}")
    assert (last["epoch"], last["batch"]) == (1.333333, 4)
