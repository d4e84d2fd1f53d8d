import dataclasses
from pathlib import Path

import pytest

from ws_algorithm.recipes.reading import read_recipe
from ws_algorithm.recipes.schema import (
    FIELDS,
    Recipe,
    RecipeError,
    check_batch_sizes,
    did_you_mean,
    first_line,
    nearest,
    to_yaml,
)

from .runs import YAMLS
from .texts import mistakes, read, recipe_text

REQUIRED = ["model", "train_dataloader", "max_duration", "global_train_batch_size", "optimizers"]


def read_value(key: str, value: str) -> object:
    recipe, errors = read(recipe_text(**{key: value}))
    assert errors == []
    return getattr(recipe, key)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", "5", 5),
        ("seed", "'5'", 5),
        ("max_duration", "3", 3),
        ("max_duration", "3ep", "3ep"),
        ("scale_schedule_ratio", "1", 1.0),
        ("scale_schedule_ratio", "5e-1", 0.5),
        ("download", "yes", True),
        ("progress_bar", "null", None),
        ("device_train_microbatch_size", "4", 4),
        ("device_train_microbatch_size", "auto", "auto"),
        ("device", "cpu", "cpu"),
        ("run_name", "12", "12"),
        ("load_ignore_keys", "[a, b]", ["a", "b"]),
        ("algorithms", "{EMA: {smoothing: 0.5}}", {"EMA": {"smoothing": 0.5}}),
        ("eval_dataloader", "null", None),
    ],
)
def test_values_have_the_type_of_their_field(key, value, expected):
    found = read_value(key, value)

    assert found == expected
    assert type(found) is type(expected)


def test_keys_that_are_not_given_have_their_defaults():
    recipe, errors = read(recipe_text())
    others = [field for name, field in FIELDS.items() if name not in REQUIRED]

    assert errors == []
    assert {field.name: getattr(recipe, field.name) for field in others} == {f.name: f.default for f in others}


def test_fields_without_a_default_are_the_required_ones():
    assert mistakes("") == [f"`{name}`: missing." for name in REQUIRED]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "2.5"),
        ("seed", "true"),
        ("seed", "one"),
        ("seed", "null"),
        ("max_duration", "2.5"),
        ("max_duration", "[1]"),
        ("download", "maybe"),
        ("scale_schedule_ratio", "half"),
        ("device", "cuda"),
        ("model", "cifar_resnet"),
        ("model", "null"),
        ("train_dataloader", "[digits]"),
        ("algorithms", "[EMA]"),
        ("load_ignore_keys", "a"),
        ("run_name", "[a]"),
    ],
)
def test_a_value_of_the_wrong_type_is_one_mistake_at_its_key(key, value):
    (mistake,) = mistakes(recipe_text(**{key: value}))

    assert mistake.startswith(f"`{key}` (=")
    assert mistake.endswith(".") and not mistake.endswith("..")


@pytest.mark.parametrize(
    ("key", "meant"), [("max_duratoin", "max_duration"), ("Seed", "seed"), ("optimizer", "optimizers")]
)
def test_an_unknown_key_names_the_nearest(key, meant):
    assert mistakes(recipe_text(**{meant: "", key: "1"})) == [f"`{key}`: unknown key. Did you mean `{meant}`?"]


def test_a_key_like_no_other_lists_all_there_are():
    (mistake,) = mistakes(recipe_text(zzz="1"))

    assert mistake == f"`zzz`: unknown key. Choose from: {', '.join([*FIELDS, 'base'])}."


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_key_is_one_mistake(name):
    assert mistakes(recipe_text(**{name: ""})) == [f"`{name}`: missing."]
    assert mistakes(recipe_text(**{name: "???"})) == [f"`{name}`: missing."]


def test_mistakes_of_all_kinds_are_listed_together():
    data = "{download: '${download}'}"
    text = recipe_text(model="", seed="x", sed="1", run_name="${nowhere}", eval_dataloader=data)

    found = mistakes(text, "download=perhaps", "no_equals_sign")

    assert [mistake.partition(":")[0].partition(" (")[0] for mistake in found] == [
        "override 'no_equals_sign'",
        "`run_name`",
        "`seed`",
        "`sed`",
        "`download`",
        "`model`",
    ]


def test_an_interpolation_takes_the_value_of_another_key():
    assert read_value("run_name", "${global_train_batch_size}") == "16"
    assert read(recipe_text(root="here", eval_dataloader="{root: '${root}'}"), "root=there")[0].eval_dataloader == {
        "root": "there"
    }


@pytest.mark.parametrize("value", ["${nowhere}", "${run_name}"])
def test_an_unresolved_interpolation_is_one_mistake(value):
    (mistake,) = mistakes(recipe_text(run_name=value))

    assert mistake.startswith("`run_name`: ")


def test_an_unresolved_interpolation_in_a_required_block_is_one_mistake():
    (mistake,) = mistakes(recipe_text(model="{name: cifar_resnet, depth: '${nowhere}', num_classes: 10}"))

    assert mistake.startswith("`model") and "nowhere" in mistake


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: [1", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "duplicate key seed"),
        ("seed:\t1\n\tx: 2\n", "not valid YAML"),
        ("run_name: !unknown x\n", "not valid YAML"),
        ("- seed\n", "not a recipe"),
        ("42\n", "not a recipe"),
    ],
)
def test_a_file_that_is_no_mapping_of_names_is_refused(text, says):
    with pytest.raises(RecipeError, match=says) as caught:
        read(text)

    assert len(caught.value.errors) == 1
    assert "\n" not in caught.value.errors[0]


@pytest.mark.parametrize("key", ["3", "true", "null"])
def test_a_key_that_is_no_name_is_one_mistake(key):
    (mistake,) = mistakes(recipe_text([f"{key}: 1"]))

    assert "key" in mistake


def test_an_interpolation_that_is_cut_off_is_one_mistake():
    (mistake,) = mistakes(recipe_text(root="${seed"))

    assert "${seed" in mistake


def test_a_file_that_is_no_text_is_refused():
    Path("recipe.yaml").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(RecipeError, match="recipe.yaml: 1 mistake\n  not valid YAML"):
        read_recipe(Path("recipe.yaml"))


@pytest.mark.parametrize(
    ("train", "micro", "evaluation", "world_size", "keys"),
    [
        (16, 1, 360, 1, []),
        (16, None, None, 4, []),
        (16, "auto", None, 16, []),
        (16, 4, 8, 4, []),
        (0, None, None, 1, ["global_train_batch_size"]),
        (-16, 4, None, 1, ["global_train_batch_size"]),
        (16, 3, None, 1, ["device_train_microbatch_size"]),
        (16, 8, None, 4, ["device_train_microbatch_size"]),  # four images per device
        (16, 32, None, 1, ["device_train_microbatch_size"]),
        (16, 0, None, 1, ["device_train_microbatch_size"]),
        (16, "many", None, 1, ["device_train_microbatch_size"]),
        (16, 1, 5, 2, ["global_eval_batch_size"]),
        (15, 0, 7, 2, ["global_train_batch_size", "global_eval_batch_size", "device_train_microbatch_size"]),
        (None, 4, None, 2, []),
    ],
)
def test_batch_sizes(train, micro, evaluation, world_size, keys):
    recipe = Recipe(
        global_train_batch_size=train, device_train_microbatch_size=micro, global_eval_batch_size=evaluation
    )

    found = check_batch_sizes(recipe, world_size)

    assert [mistake[1:].partition("`")[0] for mistake in found] == keys


def test_nearest_names():
    assert nearest("sgd", ["Adam", "SGD"]) == "SGD"
    assert nearest("zzz", ["Adam", "SGD"]) is None
    assert did_you_mean("SDG", ["Adam", "SGD"]) == " Did you mean `SGD`?"
    assert did_you_mean("zzz", ["Adam", "SGD"]) == " Choose from: Adam, SGD."
    assert did_you_mean("zzz", []) == ""


def test_first_line_of_an_exception():
    assert first_line(ValueError("Wrong.\n    full_key: x")) == "Wrong"
    assert first_line(ValueError()) == "ValueError"


def test_the_error_counts_its_mistakes():
    assert str(RecipeError("a.yaml", ["x"])) == "a.yaml: 1 mistake\n  x"
    assert str(RecipeError("a.yaml", ["x", "y"])) == "a.yaml: 2 mistakes\n  x\n  y"
    assert RecipeError("a.yaml", ("x", "y")).errors == ["x", "y"]


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_shipped_recipes_survive_writing_and_reading(path):
    recipe, errors = read_recipe(path)
    assert errors == []

    again, errors = read(to_yaml(recipe))

    assert errors == []
    assert again == recipe


@pytest.mark.parametrize("name", ["1e-3", "null", "yes", "12", "???", "a: b\n# c", "é", ""])
def test_strings_that_look_like_something_else_survive(name):
    recipe = dataclasses.replace(read(recipe_text())[0], model={"name": name, "depth": "8"}, max_duration="3")

    again, errors = read(to_yaml(recipe))

    assert errors == []
    assert again == recipe
