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
CLASSIFICATION = (CHECKOUT / "docs" / "classification.md").read_text(encoding="utf-8")


def smoke_overrides(recipe: Recipe) -> list[str]:
    """Two steps of two micro-batches of one random image, small where the size is free."""
    overrides = ["root=synthetic", "max_duration=2ba", "global_train_batch_size=2", "device_train_microbatch_size=1"]
    overrides += ["global_eval_batch_size=2", "eval_subset_num_batches=1"]
    for key in ("train_dataloader", "eval_dataloader"):
        block = getattr(recipe, key)
        overrides += [f"{key}.num_workers=0"] if "num_workers" in block else []
        overrides += [f"{key}.image_size=64"] if block["name"] == "imagenet" else []
    return overrides


def test_all_recipes_are_found():
    # quickstart and Fashion-MNIST; ImageNet; CIFAR-10: 9 networks in 2 forms and ResNet-20 in 3; CIFAR-100: 9 in 2
    assert len(NAMES) == len(YAMLS) == 2 + 7 + (9 * 2 + 3) + 9 * 2


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_resolves(name: str):
    recipe = resolve_recipe(name, ["root=somewhere"])

    assert recipe.train_dataloader.get("root", "somewhere") == "somewhere"
    assert ("WeightStandardization" in (recipe.algorithms or {})) == (name.endswith("_ws") or name == "quickstart")
    if name.endswith(("_gn", "_gn_ws")):
        assert recipe.model["norm"] == "group"
    if name.endswith(("_bn", "_bn_ws")):
        assert recipe.model["norm"] == "batch"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_for_two_steps(name: str, tmp_path: Path):
    overrides = smoke_overrides(resolve_recipe(name))

    trainer = train(name, [*overrides, f"save_folder={tmp_path / 'run'}"])

    rows = metric_rows(tmp_path / "run")
    losses = [row["loss/train/total"] for row in rows if "loss/train/total" in row]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert int(trainer.state.timestamp.sample) == 4
    assert any(0 <= row.get("metrics/eval/MulticlassAccuracy", -1) <= 1 for row in rows)
    convolutions = [module for module in trainer.state.model.modules() if isinstance(module, nn.Conv2d)]
    standardized = [conv for conv in convolutions if is_weight_standardized(conv)]
    assert bool(standardized) == (name.endswith("_ws") or name == "quickstart")
    # all of them, but for the two transitions of a DenseNet, which pooling follows
    assert not standardized or len(convolutions) - len(standardized) == (2 if "densenet" in name else 0)


@pytest.mark.parametrize("name", [name for name in NAMES if "/" in name and not name.startswith("fashion")])
def test_the_documentation_has_the_published_figure(name: str):
    published = resolve_recipe(name).published or {}
    errors = [
        f"{100 * (1 - published[metric]):.2f}"
        for metric in ("MulticlassAccuracy", "Top5Accuracy")
        if published.get(metric) is not None
    ]

    (row,) = [line for line in CLASSIFICATION.splitlines() if f"`{name}`" in line and line.startswith("|")]

    assert re.findall(r"\d+\.\d\d(?= ?[|/])", row) == errors
