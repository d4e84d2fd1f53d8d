import json

import pytest

from ws_algorithm.recipes.report import format_table, images_per_second, is_accuracy, read_metrics, summary_table

LOSS = "loss/train/total"
ACCURACY = "metrics/eval/Accuracy"
ERROR = "metrics/eval/Error"


def two_epochs() -> list[dict[str, float]]:
    """Two batches of 8 images per epoch, an evaluation after each epoch."""
    losses, accuracies, errors = [4.0, 3.0, 2.0, 1.0], {2: 0.75, 4: 0.5}, {2: 0.3, 4: 0.2}
    rows = []
    for batch in range(1, 5):
        row = {"epoch": batch / 2, "batch": batch, "sample": 8 * batch, "seconds": 0.5 * batch}
        row |= {LOSS: losses[batch - 1], "lr-SGD/group0": 0.1 / batch, "lr-SGD/group1": 0.2 / batch}
        rows.append(row | ({ACCURACY: accuracies[batch], ERROR: errors[batch]} if batch in accuracies else {}))
    return rows


def test_lines_of_one_batch_are_merged_and_later_ones_win(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"batch": 1, "epoch": 0.5, LOSS: 2.0},
        {"batch": 2, "epoch": 1.0, LOSS: 1.0, "a": 1},
        {"batch": 2, "epoch": 1.0, ACCURACY: 0.5, "a": 2},
        {"batch": 1, "epoch": 0.5, LOSS: 3.0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert read_metrics(path) == [
        {"batch": 1, "epoch": 0.5, LOSS: 3.0},
        {"batch": 2, "epoch": 1.0, LOSS: 1.0, ACCURACY: 0.5, "a": 2},
    ]


def test_a_file_without_lines_has_no_rows(tmp_path):
    (tmp_path / "metrics.jsonl").touch()

    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_the_summary_has_the_last_the_best_and_when():
    # the loss is the mean of the last epoch: (2.0 + 1.0) / 2
    assert summary_table(two_epochs(), {"Accuracy": True, "Error": False}) == [
        ("train loss", "1.5000", "", ""),
        ("Accuracy", "0.5000", "0.7500", "1"),
        ("Error", "0.2000", "0.2000", "2"),
    ]


@pytest.mark.parametrize("known", [{}, {"Accuracy": None}, {"Accuracy": False}])
def test_unless_it_is_known_lower_is_better(known):
    assert summary_table(two_epochs(), known)[1] == ("Accuracy", "0.5000", "0.5000", "2")


def test_of_equal_values_the_first_is_the_best():
    rows = [{"epoch": epoch / 2, "batch": epoch, ACCURACY: 0.5} for epoch in (1, 2, 3)]

    assert summary_table(rows, {"Accuracy": True}) == [("Accuracy", "0.5000", "0.5000", "0.5")]


def test_the_summary_of_part_of_an_epoch_has_its_loss():
    rows = [{"epoch": 0.25, "batch": 1, LOSS: 2.0}, {"epoch": 0.5, "batch": 2, LOSS: 4.0}]

    assert summary_table(rows, {}) == [("train loss", "3.0000", "", "")]
    assert summary_table([], {}) == []


@pytest.mark.parametrize("last", range(5, 11))
def test_the_loss_is_the_mean_of_as_many_batches_as_an_epoch_has(last):
    rows = [{"epoch": batch / 5, "batch": batch, LOSS: 2.0**batch} for batch in range(1, last + 1)]

    expected = sum(2.0**batch for batch in range(last - 4, last + 1)) / 5
    assert summary_table(rows, {})[0][1] == f"{expected:.4f}"


def test_images_per_second_are_those_of_the_whole_run():
    assert images_per_second(two_epochs()) == 8 * 4 / (0.5 * 4)
    assert images_per_second([]) is None
    assert images_per_second([{"sample": 8, "seconds": 0.0}]) is None


def test_a_table_has_aligned_columns():
    table = format_table(("metric", "value"), [("a", "1.0"), ("longer name", "100.25")])

    assert table.splitlines() == [
        "metric        value",
        "a               1.0",
        "longer name  100.25",
    ]
    assert format_table(("metric", "last", "best"), [("a", "1", "")]).splitlines()[1] == "a          1"


@pytest.mark.parametrize("line", ['{"batch": 2, "epo', "", "no json", "[1]", "7", '{"batch": 2}', '{"epoch": 2}'])
def test_a_line_that_is_none_of_a_run_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"batch": 1, "epoch": 0.5}}\n{line}\n')

    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is "):
        read_metrics(path)


def test_bytes_that_are_no_text_are_a_line_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n")

    with pytest.raises(ValueError, match="line 1 is no JSON"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_accuracies_are_known_by_their_names():
    names = ["MulticlassAccuracy", "Top5Accuracy", "CrossEntropy", "MeanAveragePrecision", "AccuracyLoss"]

    assert [name for name in names if is_accuracy(name)] == ["MulticlassAccuracy", "Top5Accuracy"]


def test_a_last_line_that_is_being_written_does_not_count(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 0.5, "batch": 1, "loss/train/total": 2.0}\n{"epoch": 1.0, "batch": 2, "loss/tr')

    assert read_metrics(path) == [{"epoch": 0.5, "batch": 1, "loss/train/total": 2.0}]
