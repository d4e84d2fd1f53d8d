from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ws_algorithm.recipes import curves
from ws_algorithm.recipes.curves import draw_curves, draw_runs

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


def colours_of(path) -> int:
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 200
    return len(np.unique(pixels.reshape(-1, 3), axis=0))


def width_of(path) -> int:
    with Image.open(path) as image:
        return image.width


def test_curves_are_a_picture(tmp_path):
    draw_curves(two_epochs(), tmp_path / "curves.png", "two epochs")

    assert colours_of(tmp_path / "curves.png") > 10
    assert list(tmp_path.iterdir()) == [tmp_path / "curves.png"]


def test_each_metric_has_a_panel(tmp_path):
    without = [{name: value for name, value in row.items() if name not in (ACCURACY, ERROR)} for row in two_epochs()]
    draw_curves(two_epochs(), tmp_path / "four.png", "loss, accuracy, error, learning rate")
    draw_curves(without, tmp_path / "two.png", "loss, learning rate")

    assert width_of(tmp_path / "four.png") == 2 * width_of(tmp_path / "two.png")


def test_more_than_four_panels_stand_in_lines(tmp_path):
    more = [row | {f"metrics/eval/{name}": 0.5 for name in "abc" if ACCURACY in row} for row in two_epochs()]
    draw_curves(two_epochs(), tmp_path / "four.png", "loss, accuracy, error, learning rate")
    draw_curves(more, tmp_path / "seven.png", "and three metrics")

    assert width_of(tmp_path / "seven.png") == width_of(tmp_path / "four.png")


def test_curves_of_many_batches_are_smoothed(tmp_path):
    rows = [{"epoch": batch / 100, "batch": batch, LOSS: 1 + (-1.0) ** batch} for batch in range(1, 201)]
    draw_curves(rows, tmp_path / "curves.png", "two hundred batches")

    assert colours_of(tmp_path / "curves.png") > 10


def test_curves_without_rows_are_drawn_too(tmp_path):
    draw_curves([], tmp_path / "curves.png", "nothing yet")

    assert colours_of(tmp_path / "curves.png") > 1


def test_a_run_leaves_a_picture_of_itself(finished_run):
    assert colours_of(finished_run / "curves.png") > 10


def panels_drawn(monkeypatch, runs, path):
    """What `draw_runs` draws: by panel, the curves' points and colours."""
    found = {}
    figure = curves._figure

    def keep(panels, *arguments, **options):
        found.update(panels)
        return figure(panels, *arguments, **options)

    monkeypatch.setattr(curves, "_figure", keep)
    draw_runs(runs, path)
    return {label: [(curve.points, curve.colour) for curve in panel] for label, panel in found.items()}


def test_runs_share_panels_and_accuracies_become_errors(tmp_path, monkeypatch):
    first = two_epochs()
    second = [{name: value for name, value in row.items() if name != ERROR} for row in two_epochs()[:2]]

    drawn = panels_drawn(monkeypatch, {"first": first, "second": second}, tmp_path / "curves.png")

    assert list(drawn) == ["train loss", "error (1 - Accuracy)", "Error", "learning rate"]
    assert drawn["train loss"] == [
        ([(0.5, 4.0), (1.0, 3.0), (1.5, 2.0), (2.0, 1.0)], "C0"),
        ([(0.5, 4.0), (1.0, 3.0)], "C1"),
    ]
    assert drawn["error (1 - Accuracy)"] == [([(1.0, 0.25), (2.0, 0.5)], "C0"), ([(1.0, 0.25)], "C1")]
    assert drawn["Error"] == [([(1.0, 0.3), (2.0, 0.2)], "C0")]
    assert [colour for _, colour in drawn["learning rate"]] == ["C0", "C0", "C1", "C1"]  # two groups each
    assert colours_of(tmp_path / "curves.png") > 20


@pytest.mark.parametrize("count", [1, 10, 11, 25])
def test_each_run_has_a_colour_of_its_own(tmp_path, monkeypatch, count):
    runs = {str(run): two_epochs() for run in range(count)}

    drawn = panels_drawn(monkeypatch, runs, tmp_path / "curves.png")

    assert len({str(colour) for _, colour in drawn["train loss"]}) == count


def test_a_file_is_a_png_whatever_it_is_called(tmp_path):
    draw_runs({"run": two_epochs()}, Path(tmp_path / "curves.PNG"))

    assert colours_of(tmp_path / "curves.PNG") > 10
