"""Learning rates that are meant for one batch size and used with another."""

from typing import Any

import pytest
import torch

from ws_algorithm.recipes import build
from ws_algorithm.recipes.reading import read_recipe
from ws_algorithm.recipes.resolve import resolve_recipe
from ws_algorithm.recipes.schema import Recipe, RecipeError, to_yaml

GROUPS = "optimizers.param_groups=[{params: norm, lr: 0.04}, {params: bias, lr_factor: 2, weight_decay: 0}]"


def resolved(*overrides: str) -> Recipe:
    return resolve_recipe("quickstart", ["device_train_microbatch_size=1", *overrides])


def rates(recipe: Recipe) -> list[float]:
    optimizer: torch.optim.Optimizer = build.build_optimizer(recipe, build.build_model(recipe))
    return sorted({group["lr"] for group in optimizer.param_groups})


@pytest.mark.parametrize(("batch", "lr"), [(16, 0.02), (8, 0.01), (4, 0.005), (1, 0.00125), (64, 0.08)])
def test_the_rate_is_proportional_to_the_batch(batch, lr):
    recipe = resolved("lr_base_batch_size=16", "optimizers.lr=2e-2", f"global_train_batch_size={batch}")

    assert recipe.optimizers["lr"] == lr
    assert recipe.lr_base_batch_size == batch


def test_groups_follow():
    recipe = resolved("lr_base_batch_size=16", "optimizers.lr=0.02", "global_train_batch_size=8", GROUPS)

    assert rates(recipe) == [0.01, 0.02]  # of the optimizer; of norms, and twice its own for biases


def test_without_it_rates_are_taken_as_they_are():
    recipe = resolved("optimizers.lr=0.02", "global_train_batch_size=8", GROUPS)

    assert rates(recipe) == [0.02, 0.04]


def test_what_is_resolved_stays_as_it_is(tmp_path):
    recipe = resolved("lr_base_batch_size=16", "optimizers.lr=0.02", "global_train_batch_size=8", GROUPS)
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe))

    assert resolve_recipe(str(path)) == read_recipe(path)[0] == recipe
    assert resolve_recipe(str(path), ["global_train_batch_size=4"]).optimizers["lr"] == 0.005


@pytest.mark.parametrize(
    ("overrides", "key", "says"),
    [
        (["lr_base_batch_size=0"], "lr_base_batch_size", "(=0) must be the positive batch size"),
        (["lr_base_batch_size=16", "optimizers={name: AdamW}"], "lr_base_batch_size", "needs `optimizers.lr`"),
        (["lr_base_batch_size=many"], "lr_base_batch_size", "'many'"),
        (["lr_base_batch_size=8", "optimizers.lr=fast"], "optimizers.lr", "'fast'"),
        (["lr_base_batch_size=8", "optimizers.lr=-1"], "optimizers", "Invalid learning rate: -2.0"),
        (["lr_base_batch_size=8", "global_train_batch_size=0"], "global_train_batch_size", "positive multiple"),
        (["lr_base_batch_size=8", "optimizers.param_groups=bias"], "optimizers.param_groups", "must be a list"),
    ],
)
def test_mistakes(overrides: list[Any], key, says):
    with pytest.raises(RecipeError) as raised:
        resolved(*overrides)

    (mistake,) = raised.value.errors
    assert mistake.startswith(f"`{key}`") and says in mistake
