import pytest

from ws_algorithm.recipes.schema import to_yaml

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


DATA = "{name: x, root: '${root}', download: '${download}', more: ['${root}/more', rooted], split: {at: '${root}'}}"


@pytest.mark.parametrize("root", ["data", "./data/", "/data", "x"])
def test_a_recipe_that_was_written_still_refers_to_its_root(root):
    recipe, _ = read(recipe_text(root=root, download="true", eval_dataloader=DATA))
    written = to_yaml(recipe)

    moved, errors = read(written, "root=elsewhere", "download=false")

    expected, _ = read(recipe_text(root="elsewhere", download="false", eval_dataloader=DATA))
    assert errors == []
    assert moved == expected
    assert read(written)[0] == recipe


NOTHING = "`root` (='elsewhere'): nothing in this recipe refers to it as ${root}, so the override would change nothing."


def test_a_root_beside_roots_that_do_not_refer_to_it_is_a_mistake():
    text = recipe_text(root="data", train_dataloader="{name: x, root: data}", eval_dataloader="{name: x, root: data}")

    assert read(text)[1] == []
    assert mistakes(text, "root=elsewhere") == [
        f"{NOTHING} Override `train_dataloader.root` and `eval_dataloader.root`."
    ]


def test_a_root_for_data_that_have_none_is_told(caplog):
    text = recipe_text(root="data", train_dataloader="{name: x}", eval_dataloader="{name: x}")

    assert read(text, "root=elsewhere")[1] == []
    assert [record.getMessage() for record in caplog.records] == [f"{NOTHING} Leave it out."]
