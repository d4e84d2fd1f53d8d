"""What only shows when a run begins is a mistake like any other, and costs nothing that was there."""

from pathlib import Path

import pytest
import torch

from ws_algorithm.recipes.evaluate import evaluate
from ws_algorithm.recipes.schema import RecipeError
from ws_algorithm.recipes.train import train

from .runs import FEW


@pytest.mark.parametrize("change", ["model.width=32", "algorithms=null"])
def test_a_run_that_cannot_go_on_keeps_its_recipe(change):
    train("quickstart", [*FEW, "save_folder=run"])
    recipe, result = Path("run/recipe.yaml").read_text(), evaluate("run")

    with pytest.raises(RecipeError, match="the Trainer refuses it: .*log.txt") as raised:
        train("quickstart", [*FEW, "save_folder=run", "autoresume=true", "max_duration=2ep", change])

    assert "Traceback" in Path("run/log.txt").read_text() and raised.value.__cause__ is not None
    assert Path("run/recipe.yaml").read_text() == recipe
    assert evaluate("run") == result


def test_a_folder_that_cannot_be_made_is_a_mistake():
    Path("file").touch()

    with pytest.raises(RecipeError, match=r"`save_folder` \(='file/run'\) cannot be made"):
        train("quickstart", [*FEW, "save_folder=file/run"])


def test_surgery_of_other_algorithms_comes_before_ours():
    blurred = "algorithms={WeightStandardization: {}, BlurPool: {replace_convs: true, min_channels: 1}}"
    train("quickstart", [*FEW, blurred, "save_folder=run"])

    weights = torch.load("run/best.pt", weights_only=False)["state"]["model"]
    assert sum(key.endswith("parametrizations.weight.original") for key in weights) == 9
    assert not any(key.endswith("conv.weight") for key in weights)
