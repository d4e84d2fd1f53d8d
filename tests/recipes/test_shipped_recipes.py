"""Every recipe that ships: it resolves, it trains, and the documentation says what its file says."""

import math
import re
from pathlib import Path

import pytest
from torch import nn

from ws_algorithm import is_weight_standardized
from ws_algorithm.recipes.catalogue import shipped_recipes
from ws_algorithm.recipes.resolve import resolve_recipe
from ws_algorithm.recipes.schema import Recipe
from ws_algorithm.recipes.train import train

from .runs import CHECKOUT, YAMLS, metric_rows

NAMES = sorted(shipped_recipes())
CLASSIFICATION, DETECTION = (
    (CHECKOUT / "docs" / page).read_text(encoding="utf-8") for page in ("classification.md", "detection.md")
)


STEPS = {False: 2, True: 1}  # by whether it is a detector


def is_of_coco(recipe: Recipe) -> bool:
    return recipe.train_dataloader["name"] == "coco"


# A detector of few regions on small images
FEW_REGIONS = ["rpn_post_nms_top_n_train=50", "rpn_post_nms_top_n_test=10", "box_batch_size_per_image=16"]
FEW_REGIONS += ["min_size=96", "max_size=128", "box_detections_per_img=5"]


def smoke_overrides(recipe: Recipe) -> list[str]:
    """Steps of two micro-batches of one random image, small where the size is free."""
    overrides = [
        "root=synthetic",
        f"max_duration={STEPS[is_of_coco(recipe)]}ba",
        "global_train_batch_size=2",
        "device_train_microbatch_size=1",
    ]
    overrides += ["global_eval_batch_size=2", "eval_subset_num_batches=1"]
    for key in ("train_dataloader", "eval_dataloader"):
        block = getattr(recipe, key)
        overrides += [f"{key}.num_workers=0"] if "num_workers" in block else []
        overrides += [f"{key}.image_size=64"] if block["name"] == "imagenet" else []
    return overrides + [f"model.{value}" for value in FEW_REGIONS if is_of_coco(recipe)]


def has_weight_standardization(name: str) -> bool:
    return "_ws" in name or name == "quickstart"


def test_all_recipes_are_found():
    # quickstart and Fashion-MNIST; ImageNet; CIFAR-10: 9 networks in 2 forms and ResNet-20 in 3; CIFAR-100: 9 in 2
    classification = 2 + 7 + (9 * 2 + 3) + 9 * 2
    # mmdetection: 4 ResNets in 3 schedules; the fork: 2 of 2; Detectron: GN in 4 forms of 2, and 4 of frozen BN
    detection = 4 * 3 + 2 * 2 + 4 * 2 + 4
    nuclei = 1
    assert len(NAMES) == len(YAMLS) == classification + detection + nuclei


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_resolves(name: str):
    recipe = resolve_recipe(name, ["root=somewhere"])

    assert recipe.train_dataloader.get("root", "somewhere") == "somewhere"
    assert ("WeightStandardization" in (recipe.algorithms or {})) == has_weight_standardization(name)
    if "frozen_bn" in name:
        assert recipe.model["norm"] == "frozen"
    elif "_gn" in name:
        assert recipe.model["norm"] == "group"
    elif "_bn" in name:
        assert recipe.model["norm"] == "batch"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_for_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Curves take a second of each; other tests draw them
    monkeypatch.setattr("ws_algorithm.recipes.train.draw_curves", lambda *arguments: None)
    recipe = resolve_recipe(name)
    overrides = smoke_overrides(recipe)

    trainer = train(name, [*overrides, f"save_folder={tmp_path / 'run'}"])

    rows = metric_rows(tmp_path / "run")
    losses = [row["loss/train/total"] for row in rows if "loss/train/total" in row]
    steps = STEPS[is_of_coco(recipe)]
    assert len(losses) == steps and all(map(math.isfinite, losses))
    assert int(trainer.state.timestamp.sample) == 2 * steps
    metric = "BoxAP" if is_of_coco(recipe) else "MulticlassAccuracy"
    assert any(0 <= row.get(f"metrics/eval/{metric}", -1) <= 1 for row in rows)
    convolutions = [module for module in trainer.state.model.modules() if isinstance(module, nn.Conv2d)]
    standardized = [conv for conv in convolutions if is_weight_standardized(conv)]
    assert bool(standardized) == has_weight_standardization(name)
    # all of them, but for the two transitions of a DenseNet, which pooling follows, three of region proposals, and the
    # last one of masks
    left_alone = {"densenet": 2, "faster_rcnn": 3, "mask_rcnn": 4}
    count = sum(count for network, count in left_alone.items() if network in name)
    assert not standardized or len(convolutions) - len(standardized) == count


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("imagenet", "cifar"))])
def test_the_documentation_has_the_published_figure(name: str):
    published = resolve_recipe(name).published or {}
    errors = [
        f"{100 * (1 - published[metric]):.2f}"
        for metric in ("MulticlassAccuracy", "Top5Accuracy")
        if published.get(metric) is not None
    ]

    (row,) = [line for line in CLASSIFICATION.splitlines() if f"`{name}`" in line and line.startswith("|")]

    assert re.findall(r"\d+\.\d\d(?= ?[|/])", row) == errors


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("coco")])
def test_the_documentation_has_the_published_precision(name: str):
    published = resolve_recipe(name).published or {}

    (row,) = [line for line in DETECTION.splitlines() if f"`{name}`" in line and line.startswith("|")]

    box, mask = (cell.strip() for cell in row.split("|")[6:8])
    assert float(box) == pytest.approx(100 * published["BoxAP"])
    assert mask == "-" if "faster" in name else float(mask) == pytest.approx(100 * published["MaskAP"])
