"""Weights that say how they were trained, against recipes that standardize otherwise or give them other images."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from ws_algorithm.__main__ import main
from ws_algorithm.recipes import build
from ws_algorithm.recipes.build import build_data
from ws_algorithm.recipes.evaluate import evaluate
from ws_algorithm.recipes.models.imagenet_resnet import build_imagenet_resnet
from ws_algorithm.recipes.origins import function_that_changes, image_difference
from ws_algorithm.recipes.pretrained import Origin, input_difference, read_origin
from ws_algorithm.recipes.resolve import resolve_recipe
from ws_algorithm.recipes.schema import Recipe, RecipeError
from ws_algorithm.recipes.train import train

from .converted_files import DETECTRON, IMAGENET, write_converted
from .runs import FEW, is_same, load_weights

PATH = "converted.pth"
PRETRAINED = f"model.pretrained={PATH}"
WITHOUT = "algorithms=null"
NO_FORMULA = "algorithms={WeightStandardization: {layers: normalized}}"


def weights_of(recipe: Recipe) -> dict[str, Tensor]:
    return build.build_model(recipe).get_submodule("module").state_dict()


def write_quickstart(formula: Any = "paper", image_input: Any = IMAGENET) -> None:
    write_converted(PATH, weights_of(resolve_recipe("quickstart")), formula, image_input)


def formula_of(*overrides: str) -> Any:
    algorithms = resolve_recipe("quickstart", [PRETRAINED, *overrides]).algorithms or {}
    return algorithms["WeightStandardization"].get("formula")


def mistakes(*overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        resolve_recipe("quickstart", [PRETRAINED, *overrides])
    return caught.value.errors


def test_a_recipe_without_a_formula_takes_that_of_the_weights():
    write_quickstart("paper")

    assert formula_of(NO_FORMULA) == formula_of(f"{NO_FORMULA[:-2]}, formula: paper}}}}") == "paper"


def test_names_of_the_same_formula_are_the_same():
    write_quickstart("bit")

    assert formula_of(f"{NO_FORMULA[:-2]}, formula: composer}}}}") == "composer"  # both: eps 1e-10 in the root, biased


def test_another_formula_and_none_are_mistakes_in_a_dry_run_too(capsys):
    write_quickstart("paper")

    assert main(["train", "quickstart", "--dry-run", PRETRAINED, f"{NO_FORMULA[:-2]}, formula: timm}}}}"]) == 2
    assert mistakes(f"{NO_FORMULA[:-2]}, formula: timm}}}}") == [
        "`algorithms.WeightStandardization.formula` (='timm') must be 'paper': `model.pretrained` (='converted.pth') "
        "was trained with that. Leave it out, and it is taken from there."
    ]
    assert "must be 'paper'" in capsys.readouterr().err
    (mistake,) = mistakes(WITHOUT)
    assert mistake.startswith("`algorithms`: `model.pretrained` (='converted.pth') was trained with Weight Standardiz")
    assert "`WeightStandardization: {layers: normalized, formula: paper}`" in mistake


@pytest.mark.parametrize("rule", ["exclude: module.conv1", "n_last_layers_ignore: 1", "include: '*.conv1'"])
def test_leaving_out_what_was_standardized_in_training_is_a_mistake(rule):
    write_quickstart("paper")

    (mistake,) = mistakes(f"{NO_FORMULA[:-2]}, {rule}}}}}")

    assert mistake.startswith(
        "`algorithms.WeightStandardization`: these rules choose other convolutions than `model.pretrained` "
        "(='converted.pth') was trained with: without module."
    )
    assert mistake.endswith("which were. Give `layers: normalized`, and no other rules for these.")


def test_the_convolutions_that_a_file_names_are_those_to_standardize():
    weights = weights_of(resolve_recipe("quickstart"))
    names = [name.removesuffix(".weight") for name, tensor in weights.items() if tensor.ndim == 4]
    write_converted(PATH, weights, "paper", include=names[1:])
    included = ", ".join(f"module.{name}" for name in names[1:])

    assert f"with module.{names[0]}, which were not standardized then. Give the `include`" in mistakes(NO_FORMULA)[0]
    assert formula_of(f"algorithms={{WeightStandardization: {{include: [{included}]}}}}") == "paper"


def test_convolutions_of_a_classifier_are_looked_for_in_the_detector_around_it():
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build_imagenet_resnet("resnet50").module.state_dict().items()}
    write_converted(PATH, {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()})
    rules = "algorithms.WeightStandardization"

    def resolve(rule: str) -> None:
        resolve_recipe("coco/faster_rcnn_r50_gn_ws_1x", [PRETRAINED, rule, "model.image_format=rgb"])

    resolve(f"{rules}.layers=all")  # which takes those of the proposals too, of which the file says nothing
    with pytest.raises(RecipeError, match="without module.backbone.body.layer1.0.conv2, module.backbone.body.layer1.1"):
        resolve(f"{rules}.exclude='*.conv2'")


def test_weights_without_it_change_their_function_under_every_formula_but_one():
    write_quickstart(None)
    recipe = resolve_recipe("quickstart", [PRETRAINED, NO_FORMULA])

    assert (recipe.algorithms or {})["WeightStandardization"].get("formula") is None
    assert "formula='affine' keeps it" in (function_that_changes(recipe) or "")
    assert function_that_changes(resolve_recipe("quickstart", [PRETRAINED, WITHOUT])) is None
    recipe.algorithms = {"WeightStandardization": {"formula": "affine"}}
    assert function_that_changes(recipe) is None
    assert function_that_changes(resolve_recipe("quickstart")) is None  # nothing is loaded


def test_a_run_with_converted_weights_says_so_and_goes_on_without_the_file(caplog):
    write_quickstart(None, DETECTRON)
    with caplog.at_level(logging.INFO, "ws_algorithm"), pytest.raises(RecipeError, match="expect three channels"):
        train("quickstart", [*FEW, PRETRAINED])
    write_quickstart("paper", DETECTRON)
    arguments = [*FEW, PRETRAINED, NO_FORMULA, "save_folder=run", "save_interval=1ba"]
    arguments += ["train_dataloader={name: synthetic_images, image_size: 8, num_classes: 10, in_channels: 1}"]
    arguments += ["eval_dataloader=${train_dataloader}"]

    with caplog.at_level(logging.INFO, "ws_algorithm"):
        train("quickstart", [*arguments, "max_duration=1ba"])
    assert "weights of weight_standardization, trained with Weight Standardization, formula 'paper'" in caplog.text
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line for line in warnings if "pretrained" in line] == [
        "Whether the images of `train_dataloader` and `eval_dataloader` are what the weights of `model.pretrained` "
        "expect is not known."
    ]
    assert "formula: paper" in Path("run/recipe.yaml").read_text()

    train("quickstart", [*arguments, "max_duration=2ba", "save_folder=whole"])
    Path(PATH).unlink()
    with pytest.raises(RecipeError, match="must be a file, and there is none"):
        train("quickstart", [*arguments, "max_duration=2ba", "save_folder=new", "autoresume=true"])
    resumed = train("quickstart", [*arguments, "max_duration=2ba", "autoresume=true"])

    assert int(resumed.state.timestamp.batch) == 2
    assert is_same(load_weights(Path("run/latest-rank0.pt")), load_weights(Path("whole/latest-rank0.pt")))
    assert "formula: paper" in Path("run/recipe.yaml").read_text()
    assert evaluate("run")


def test_what_weights_are_is_read_or_refused():
    write_quickstart("timm", DETECTRON)
    origin = read_origin(PATH)

    assert origin is not None and (origin.source, origin.formula) == ("weight_standardization", "timm")
    assert origin.image_input.mean == (122.7717, 115.9465, 102.9801)
    write_quickstart({"eps": 1e-5, "eps_inside_root": False, "unbiased": True})
    assert formula_of(NO_FORMULA) == "paper"  # a convolution's std with Bessel's correction, plus 1e-5
    nameless = {"eps": 0.5, "eps_inside_root": True, "unbiased": True}
    unlike = {**IMAGENET, "channels": "rbg"}
    for image_input, formula in (
        (None, "paper"),
        ({"channels": "rgb"}, None),
        (unlike, "paper"),
        (IMAGENET, "papre"),
        (IMAGENET, nameless),
    ):
        write_quickstart(formula, image_input)
        with pytest.raises(ValueError, match="'ws_algorithm' in it does not .* Convert the weights again"):
            read_origin(PATH)
        assert len(mistakes()) == 1


def origin_with(image_input: dict[str, Any]) -> Origin:
    write_converted(PATH, {"weight": torch.ones(1)}, "paper", image_input)
    origin = read_origin(PATH)
    assert origin is not None
    return origin


def test_conventions_that_are_the_same_numbers_fit():
    # mmdetection's, of pixels from 0 to 255, is ImageNet's: 0.485 * 255 = 123.675 and 0.229 * 255 = 58.395
    theirs = {"channels": "rgb", "scale": 255.0, "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
    backwards = {"channels": "bgr", "scale": 255.0, "mean": [103.53, 116.28, 123.675], "std": [57.375, 57.12, 58.395]}
    ours = origin_with(IMAGENET).image_input

    assert input_difference(origin_with(theirs).image_input, ours) is None
    assert input_difference(origin_with(backwards).image_input, ours) is None
    assert input_difference(origin_with(DETECTRON).image_input, ours) == (
        "expect RGB from 0 to 255, mean 122.772, 115.947, 102.98, standard deviation 1, 1, 1; the network sees RGB "
        "from 0 to 1, mean 0.485, 0.456, 0.406, standard deviation 0.229, 0.224, 0.225"
    )


@pytest.mark.parametrize(("std", "fits"), [([0.229, 0.224, 0.225], True), ([0.5, 0.5, 0.5], False)])
def test_the_data_say_by_a_black_and_a_white_picture_what_they_do(std, fits):
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(16),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], std),
        ]
    )

    difference = image_difference(origin_with(IMAGENET), transform)

    assert (difference is None) == fits
    if difference is not None:
        assert difference.endswith(
            "the network sees RGB from 0 to 1, mean 0.485, 0.456, 0.406, standard deviation 0.5, 0.5, 0.5"
        )


def test_images_that_weights_do_not_expect_are_a_mistake_in_the_data():
    for label in ("cat", "dog"):
        for split in ("train", "val"):
            Path("images", split, label).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(Path("images", split, label, "0.png"))
    half = {"channels": "rgb", "scale": 1.0, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    recipe = resolve_recipe("imagenet/resnet50_gn_ws", ["root=images"])
    recipe.model = {"name": "cifar_resnet", "num_classes": 2, "depth": 8, "width": 8}
    weights = weights_of(recipe)
    write_converted(PATH, weights, "paper", half)
    recipe.model["pretrained"] = PATH
    recipe.global_train_batch_size, recipe.global_eval_batch_size = 2, 2
    recipe.train_dataloader = {"name": "image_folder", "root": "images", "split": "train", "image_size": 32}
    data = build_data("recipe", recipe, "train_dataloader", training=True)

    with pytest.raises(RecipeError, match="`train_dataloader`: the weights of `model.pretrained` expect RGB .* 0.5, 0"):
        build.check_images("recipe", recipe, data, None)
    write_converted(PATH, weights, "paper", DETECTRON)
    with pytest.raises(RecipeError) as caught:
        build.check_images("recipe", recipe, data, None)
    fix = re.search(r"Set train_dataloader.mean=(\[.*?\]) train_dataloader.std=(\[.*?\])\.", str(caught.value))
    assert fix is not None
    recipe.train_dataloader |= {"name": "imagenet", "mean": json.loads(fix[1]), "std": json.loads(fix[2])}
    build.check_images("recipe", recipe, build_data("recipe", recipe, "train_dataloader", training=True), None)
    recipe.train_dataloader = {"name": "image_folder", "root": "images", "split": "train", "image_size": 32}
    write_converted(PATH, weights, "paper", IMAGENET)
    build.check_images("recipe", recipe, data, None)
