"""What the verb says of how weights were trained: the recipe beside them, as a base of others, and its formula."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sources import detectron

from ws_algorithm import ConvertedCheckpoint
from ws_algorithm.__main__ import main
from ws_algorithm.checkpoints.sources import IMAGENET
from ws_algorithm.checkpoints.targets import target_shapes
from ws_algorithm.recipes.convert import recipe_of

RESNET = ("--to", "torchvision", "--model", "resnet50")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> int:
    return main(["convert", *arguments])


def fork_weights(model: str) -> dict[str, torch.Tensor]:
    """A Mask R-CNN as the authors' fork names it."""
    places = {"backbone.body.conv1.": "backbone.body.stem.conv1.", "backbone.body.bn1.": "backbone.body.stem.bn1."}
    places |= {"rpn.head.conv.0.0.": "rpn.head.conv.", "roi_heads.box_head.5.": "roi_heads.box.feature_extractor.fc6."}
    for i in range(4):
        places |= {
            f"backbone.fpn.{kind}_blocks.{i}.": f"backbone.fpn.fpn_{kind}{i + 1}." for kind in ("inner", "layer")
        }
        for j in range(2):
            places[f"roi_heads.box_head.{i}.{j}."] = f"roi_heads.box.feature_extractor.xconvs.{3 * i + j}."
        places[f"roi_heads.mask_head.{i}."] = f"roi_heads.mask.feature_extractor.mask_fcn{i + 1}."
    places |= {f"roi_heads.{kind}_predictor.": f"roi_heads.{kind}.predictor." for kind in ("box", "mask")}
    weights = {}
    for name, shape in target_shapes(model, 81).items():
        start = next((start for start in places if name.startswith(start)), None)
        theirs = f"{places[start]}{name.removeprefix(start)}" if start else name
        weights[f"module.{theirs}"] = torch.zeros(()).expand(shape)
    return weights


def test_a_detector_brings_the_options_that_it_was_trained_with(capsys):
    torch.save({"model": fork_weights("mask_rcnn_resnet50"), "iteration": 1}, "model_final.pth")

    assert run("model_final.pth", "mask.pth", "--to", "torchvision", "--model", "mask_rcnn_resnet50") == 0

    blocks = yaml.safe_load(Path("mask.yaml").read_text())
    assert blocks["model"]["name"] == "mask_rcnn" and blocks["model"]["arch"] == "resnet50"
    assert blocks["model"]["image_format"] == "bgr255" and blocks["model"]["roi_align_sampling_ratio"] == 2
    assert blocks["algorithms"] == {"WeightStandardization": {"layers": "normalized", "formula": "paper"}}
    assert "RGB from 0 to 255, mean [122.7717, 115.9465, 102.9801]" in capsys.readouterr().out


def test_the_algorithm_is_that_of_the_weights():
    seen = IMAGENET
    given = {"fc.weight": torch.zeros(1)}, "composer", "resnet50"
    none = ConvertedCheckpoint(*given, None, seen, {"norm": "group"})
    some = ConvertedCheckpoint(*given, "composer", seen, {"norm": "group"}, ("conv1", "layer1.0.conv1"))

    assert (recipe_of(none, Path("w.pth")) or {}).keys() == {"model"}
    algorithms = (recipe_of(some, Path("w.pth")) or {})["algorithms"]
    which = {"layers": "all", "include": ["module.conv1", "module.layer1.0.conv1"]}
    assert algorithms == {"WeightStandardization": {**which, "formula": "composer"}}


def composer_file(path: str, *, of_trainer: bool) -> None:
    """A ResNet-18 whose last convolution Composer's algorithm has left alone."""
    weights = {}
    for name, shape in target_shapes("resnet18", 1000).items():
        raw = len(shape) == 4 and name != "layer4.1.conv2.weight"
        weights[
            f"module.{name.removesuffix('.weight')}.parametrizations.weight.original" if raw else f"module.{name}"
        ] = torch.zeros(()).expand(shape)
    torch.save({"state": {"model": weights}} if of_trainer else weights, path)


def dry_run(capsys: pytest.CaptureFixture[str], *overrides: str) -> Any:
    """The resolved `mine.yaml`, or its mistakes."""
    capsys.readouterr()
    done = main(["train", "mine.yaml", "--dry-run", *overrides]) == 0
    printed = capsys.readouterr()
    return yaml.safe_load(printed.out) if done else printed.err


def test_the_recipe_of_a_network_that_is_standardized_in_part_is_a_base_that_resolves(capsys):
    composer_file("ep90.pt", of_trainer=True)
    assert run("ep90.pt", "part.pth", "--to", "torchvision", "--model", "resnet18") == 0
    Path("mine.yaml").write_text("base: [imagenet/resnet50_gn_ws, part.yaml]\nroot: synthetic\n")

    block = dry_run(capsys)["algorithms"]["WeightStandardization"]

    assert len(block["include"]) == 20 - 1 and "module.layer4.1.conv2" not in block["include"]
    assert "with module.layer4.1.conv2, which were not" in dry_run(
        capsys, "algorithms={WeightStandardization: {layers: normalized}}"
    )


@pytest.mark.parametrize(
    ("of_trainer", "given", "warned"), [(True, (), False), (False, (), True), (False, ("--formula", "paper"), False)]
)
def test_names_that_do_not_tell_the_formula_are_warned_of(caplog, of_trainer, given, warned):
    composer_file("w.pt", of_trainer=of_trainer)

    assert run("w.pt", "out.pth", "--to", "torchvision", "--model", "resnet18", *given) == 0

    assert ("Formula 'composer' is assumed: w.pt does not say" in caplog.text) == warned
    formula = torch.load("out.pth", weights_only=True)["ws_algorithm"]["formula"]
    assert formula == ("paper" if given else "composer")


@pytest.mark.parametrize("key", ["config", "cfg"])
def test_a_config_without_standardization_needs_a_formula(capsys, key):
    weights = {name: torch.zeros(()).expand(shape) for name, shape in target_shapes("resnet50", 1000).items()}
    torch.save({"meta": {key: "norm_cfg = dict(type='GN')"}, "state_dict": weights}, "gn.pth")

    assert run("gn.pth", "out.pth", *RESNET) == 2
    assert "`--formula` must be given: 'weight_standardization' is trained with 'paper'" in capsys.readouterr().err
    assert not Path("out.pth").exists()
    assert run("gn.pth", "out.pth", *RESNET, "--formula", "none") == 0

    assert "algorithms" not in yaml.safe_load(Path("out.yaml").read_text())


def test_the_recipe_of_weights_of_other_images_has_the_mean_and_std_of_the_data(capsys):
    blobs = {name: torch.zeros(()).expand(shape) for name, shape in detectron.classifier_shapes(50)}
    torch.save(blobs, "R-50-GN.pth")
    assert run("R-50-GN.pth", "gn.pth", *RESNET) == 0
    Path("mine.yaml").write_text("base: [imagenet/resnet50_gn, gn.yaml]\nroot: synthetic\n")

    data = dry_run(capsys)["train_dataloader"]

    assert data["mean"] == pytest.approx([122.7717 / 255, 115.9465 / 255, 102.9801 / 255], rel=1e-5)
    assert data["std"] == pytest.approx([1 / 255] * 3, rel=1e-5)


def test_the_recipe_of_a_detector_is_a_base_that_resolves(capsys):
    torch.save({"model": fork_weights("mask_rcnn_resnet50")}, "model_final.pth")
    run("model_final.pth", "mask.pth", "--to", "torchvision", "--model", "mask_rcnn_resnet50")
    capsys.readouterr()
    Path("mine.yaml").write_text("base: [coco/mask_rcnn_r50_gn_ws_2x, mask.yaml]\nroot: synthetic\n")

    assert main(["train", "mine.yaml", "--dry-run"]) == 0

    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert (model["image_format"], model["roi_align_aligned"], model["frozen_stages"]) == ("bgr255", False, 1)
    printed = dry_run(capsys, "model.roi_align_sampling_ratio=0", "model.rounded_anchors=false")
    assert "2 mistakes" in printed and "Set model.roi_align_sampling_ratio=2." in printed
    assert "`model.rounded_anchors` (=False) must be True: `model.pretrained` (=" in printed
    rules = dry_run(capsys, "algorithms.WeightStandardization.layers=all")
    assert "trained with: with module.rpn.head.conv.0.0, module.rpn.head.cls_logits, module.rpn.head.bbox_pred" in rules
