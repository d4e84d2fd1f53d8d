"""``predict``: a run and pictures to drawings or tables."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ws_algorithm import apply_weight_standardization
from ws_algorithm.__main__ import main
from ws_algorithm.recipes.data.digits import build_digits_dataspec
from ws_algorithm.recipes.drawing import enlarged
from ws_algorithm.recipes.models.cifar_resnet import build_cifar_resnet
from ws_algorithm.recipes.predict import predict, split_arguments
from ws_algorithm.recipes.schema import RecipeError
from ws_algorithm.recipes.train import train

from .painted import OBJECTS, SCORES, paint
from .runs import FEW, load_state, load_weights


def save_painted(path: str, objects: dict | None = None) -> Image.Image:
    image = paint(OBJECTS[31] if objects is None else objects)
    image.save(path)
    return image


def save_digit(path: str, number: int = 0) -> torch.Tensor:
    """A picture of eight bits of a digit of scikit-learn, and the digit from 0 to 1 ``(1, 8, 8)``."""
    pixels = (load_digits(return_X_y=True)[0][number].reshape(8, 8) / 16 * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return torch.tensor(pixels / 255, dtype=torch.float32)[None]


def normalized(digit: torch.Tensor) -> torch.Tensor:
    """By mean and standard deviation of all training images."""
    dataset: Any = build_digits_dataspec("train", batch_size=16, training=False).dataloader
    images = dataset.dataset.images
    return (digit - images.mean()) / images.std()


def test_a_box_is_drawn_where_it_is_and_nowhere_else(painted_run, capsys):
    # one object, label 1: 20 wide and 12 high at (10, 20); masks are drawn too
    image = save_painted("one.png", {1: (10, 20, 20, 12)})

    (found,) = predict(str(painted_run), ["one.png"]).values()

    assert found["boxes"].tolist() == [[10, 20, 30, 32]] and found["labels"].tolist() == [1]
    drawn = np.asarray(Image.open("predictions/one.png"), dtype=int)
    plain = np.asarray(enlarged(image), dtype=int)
    assert drawn.shape == plain.shape == (480, 640, 3)  # ten times as large
    differs = (drawn != plain).any(axis=2)
    edge = np.zeros_like(differs)
    edge[200:320, 100:300] = True
    inside = np.zeros_like(differs)
    inside[203:317, 103:297] = True
    assert differs[edge & ~inside].all()
    # besides the object there is a text above it, of one colour with its box
    rows, columns = (differs & ~edge).nonzero()
    assert len(rows) and rows.max() == 199 and rows.min() > 170 and columns.min() == 100 and columns.max() < 250
    assert (drawn[rows.min(), 100] == drawn[200, 200]).all()
    assert capsys.readouterr().out.splitlines()[0] == "one.png: 1 object (1 three), predictions/one.png"


def test_scores_below_the_threshold_are_left_out(painted_run, capsys):
    save_painted("three.png")

    def found(threshold: float | None) -> list[float]:
        (prediction,) = predict(str(painted_run), ["three.png"], score_threshold=threshold).values()
        return prediction["scores"].tolist()

    best, last, middle = torch.tensor(SCORES).tolist()
    assert found(None) == [best, middle, last]
    assert found(0.65) == [best, middle]
    assert found(0.95) == []
    assert "three.png: 0 objects, predictions/three-3.png" in capsys.readouterr().out


def test_pictures_of_one_name_get_numbers(painted_run):
    Path("a").mkdir()
    Path("out").mkdir()
    Path("out/x.png").write_text("mine")
    for name in ("x.png", "x.bmp", "a/x.png"):
        save_painted(name)

    predict(str(painted_run), ["x.png", "x.bmp", "a"], output="out")

    assert sorted(path.name for path in Path("out").iterdir()) == ["x-2.png", "x-3.png", "x-4.png", "x.png"]
    assert Path("out/x.png").read_text() == "mine"


def test_the_table_of_a_classifier_is_softmax_of_its_outputs(finished_run, capsys):
    digit = save_digit("digit.png")
    model = build_cifar_resnet(10, depth=8, width=16, in_channels=1, norm="group")
    apply_weight_standardization(model)
    model.load_state_dict(load_weights(finished_run / "best.pt"))
    with torch.no_grad():
        outputs = model.eval().module(normalized(digit)[None])[0]
    expected = outputs.exp() / outputs.exp().sum()

    (found,) = predict(str(finished_run), ["digit.png"]).values()

    torch.testing.assert_close(found["probabilities"], expected)
    best = expected.argsort(descending=True)[:5].tolist()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"digit.png: {best[0]}" and lines[1].split() == ["class", "probability"]
    assert [line.split()[0] for line in lines[2:7]] == [str(label) for label in best]
    assert [float(line.split()[1]) for line in lines[2:7]] == pytest.approx(expected[best].tolist(), abs=5.1e-5)
    assert not Path("predictions").exists()


def test_averaged_weights_predict_as_they_are_evaluated():
    train("quickstart", [*FEW, "algorithms={EMA: {half_life: 10ba}}", "save_folder=run"])
    digit = save_digit("digit.png")
    state = load_state(Path("run/best.pt"))
    averages = dict(state["algorithms"])["EMA"]["ema_model"]["named_parameters_dict"]
    model = build_cifar_resnet(10, depth=8, width=16, in_channels=1, norm="group")

    def probabilities(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            return model.eval().module(normalized(digit)[None]).softmax(1)[0]

    (found,) = predict("run", ["digit.png"]).values()

    torch.testing.assert_close(found["probabilities"], probabilities(averages))
    assert not torch.allclose(found["probabilities"], probabilities(state["model"]))


def test_a_table_is_written_nowhere_and_that_is_said(finished_run, caplog):
    save_digit("digit.png")

    predict(str(finished_run), ["digit.png"], output="out")

    assert "nothing was written; this model gives tables" in caplog.text and not Path("out").exists()


def test_all_mistakes_are_found_before_the_model_runs(painted_run):
    save_painted("good.png")
    Path("bad.png").write_text("no image")
    Path("empty").mkdir()
    Path("file").write_text("")

    with pytest.raises(RecipeError) as caught:
        images = ["good.png", "nowhere.png", "no*.png", "empty", "bad.png"]
        predict(str(painted_run), images, output="file", score_threshold=1.5)

    assert caught.value.errors == [
        "`image` (='nowhere.png'): there is no such file.",
        "`image` (='no*.png'): no file matches.",
        "`image` (='empty'): a folder without images.",
        "`image` (='bad.png') cannot be read: not an image, or a broken one. Mend it or leave it out.",
        "`--score-threshold` (=1.5) must be from 0 to 1.",
        "`--output` (='file') is a file. Name a folder.",
    ]
    assert not Path("predictions").exists()


def test_a_threshold_for_a_classifier_is_refused(finished_run):
    save_digit("digit.png")

    with pytest.raises(RecipeError, match="--score-threshold: this model has none"):
        predict(str(finished_run), ["digit.png"], score_threshold=0.5)


def test_data_that_have_no_pictures_are_refused(finished_run):
    save_digit("digit.png")
    random = "eval_dataloader={name: synthetic_images, image_size: 8, num_classes: 10, in_channels: 1}"

    with pytest.raises(RecipeError, match="`eval_dataloader`: these data do not say how a picture becomes an input"):
        predict(str(finished_run), ["digit.png"], [random])


def test_a_run_without_a_checkpoint_and_a_folder_that_is_none(painted_run):
    save_painted("x.png")
    Path("run").mkdir()
    shutil.copy(painted_run / "recipe.yaml", "run")

    with pytest.raises(RecipeError, match=r"`run` \(='run'\) has no checkpoint"):
        predict("run", ["x.png"])
    with pytest.raises(RecipeError, match=r"Name the checkpoint to predict with, or the folder of a run"):
        predict(str(painted_run.parent / "painted.yaml"), ["x.png"])
    with pytest.raises(RecipeError, match="is a folder"):
        predict(str(painted_run.parent), ["x.png"])


def test_the_command_takes_images_and_overrides_in_any_order(painted_run, capsys):
    save_painted("x.png")
    save_painted("b=c.png")

    arguments = [
        "predict",
        str(painted_run),
        "seed=1",
        "x.png",
        "--score-threshold",
        "0.8",
        "--output",
        "out",
        "b=c.png",
    ]
    assert main(arguments) == 0

    assert sorted(path.name for path in Path("out").iterdir()) == ["b=c.png", "x.png"]
    assert "x.png: 1 object (1 three), out/x.png" in capsys.readouterr().out
    assert split_arguments(["a/k=v.png", "model.nrom=batch", "b=c.png"]) == (
        ["a/k=v.png", "b=c.png"],
        ["model.nrom=batch"],
    )
    assert main(["predict", str(painted_run), "x.png", "model.nmu_classes=4"]) == 2
    assert "unknown argument of painted. Did you mean `num_classes`?" in capsys.readouterr().err
