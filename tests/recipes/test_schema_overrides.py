import pytest

from .texts import mistakes, read, recipe_text


def test_overrides_are_applied_in_order():
    text = recipe_text(eval_dataloader="{name: digits, split: test}")

    recipe, errors = read(
        text, "seed=1", "seed=2", "model.depth=14", "algorithms.EMA.smoothing=0.5", "eval_dataloader=null"
    )

    assert errors == []
    assert (recipe.seed, recipe.eval_dataloader, recipe.algorithms) == (2, None, {"EMA": {"smoothing": 0.5}})
    assert recipe.model == {"name": "cifar_resnet", "depth": 14, "num_classes": 10, "in_channels": 1}


def test_a_mapping_replaces_the_whole_block():
    assert read(recipe_text(), "optimizers={name: Adam}")[0].optimizers == {"name": "Adam"}


def test_an_override_reaches_into_a_list():
    text = recipe_text(optimizers="{name: SGD, lr: 0.1, param_groups: [{params: bias, lr: 0.1}, {params: norm}]}")
    recipe, errors = read(text, "optimizers.param_groups[0].lr=0.2")

    assert errors == []
    assert recipe.optimizers["param_groups"] == [{"params": "bias", "lr": 0.2}, {"params": "norm"}]


def test_an_override_may_refer_to_another_key():
    recipe, errors = read(recipe_text(root="here"), "train_dataloader.root=${root}")

    assert errors == []
    assert recipe.train_dataloader["root"] == "here"


@pytest.mark.parametrize("override", ["seed", "=1", "", "seed=[", "optimizers.param_groups[0].lr={"])
def test_a_bad_override_is_one_mistake_that_quotes_it(override):
    (mistake,) = mistakes(recipe_text(), override)

    assert mistake.startswith(f"override {override!r}: ")


def test_an_unknown_override_names_the_nearest():
    assert mistakes(recipe_text(), "sede=1") == ["`sede`: unknown key. Did you mean `seed`?"]
