"""Recipes that are based on others; how one file is read is in ``test_schema.py``."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ws_algorithm.__main__ import main
from ws_algorithm.recipes.catalogue import shipped_recipes
from ws_algorithm.recipes.reading import lineage, merge, read_recipe
from ws_algorithm.recipes.resolve import resolve_recipe
from ws_algorithm.recipes.schema import Recipe, RecipeError

from .texts import recipe_text


def write(**files: str) -> None:
    """Files by name, in which ``__`` stands for a folder."""
    for name, text in files.items():
        path = Path(f"{name.replace('__', '/')}.yaml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def read(name: str, *overrides: str) -> Recipe:
    recipe, errors = read_recipe(Path(f"{name}.yaml"), overrides)
    assert errors == []
    return recipe


def refusal(name: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read_recipe(Path(f"{name}.yaml"))
    (mistake,) = caught.value.errors
    return mistake


def test_what_a_file_does_not_say_is_what_its_base_says():
    write(base=recipe_text(seed="3"), own="base: base.yaml\nmodel: {depth: 14}\nmax_duration: 2ep\n")

    recipe = read("own")

    assert recipe.model == {"name": "cifar_resnet", "depth": 14, "num_classes": 10, "in_channels": 1}
    assert (recipe.seed, recipe.max_duration, recipe.optimizers) == (3, "2ep", {"name": "SGD", "lr": 0.1})


def test_a_path_is_relative_to_the_file_that_has_it():
    write(a__one=recipe_text(seed="3"), b__two="base: ../a/one.yaml\nrun_name: x\n", three="base: b/two.yaml\n")

    assert (read("three").seed, read("three").run_name) == (3, "x")
    assert lineage(Path("three.yaml")) == "three.yaml on b/two.yaml on b/../a/one.yaml"


def test_an_absolute_path_will_do():
    write(base=recipe_text(seed="3"), a__own=f"base: {Path('base.yaml').absolute()}\n")

    assert read("a/own").seed == 3


def test_a_base_may_be_a_shipped_recipe():
    write(own="base: quickstart\nseed: 5\n")

    assert resolve_recipe("own.yaml") == resolve_recipe("quickstart", ["seed=5"])


def test_a_file_beside_it_comes_before_a_shipped_recipe():
    Path("quickstart").write_text(recipe_text(seed="7"))
    write(own="base: quickstart\n")

    assert read("own").seed == 7


def test_of_several_bases_later_ones_are_merged_over_earlier_ones():
    first, second = recipe_text(seed="1", run_name="one"), "seed: 2\nnum_threads: 1\n"
    write(first=first, second=second, own="base: [first.yaml, second.yaml]\nnum_threads: 3\n")

    recipe = read("own")

    assert (recipe.seed, recipe.run_name, recipe.num_threads) == (2, "one", 3)
    assert lineage(Path("own.yaml")) == "own.yaml on first.yaml, second.yaml"


def test_two_bases_may_share_theirs():
    write(root=recipe_text(seed="1"), left="base: root.yaml\nseed: 2\n", right="base: root.yaml\nrun_name: x\n")
    write(own="base: [left.yaml, right.yaml]\n")

    assert (read("own").seed, read("own").run_name) == (1, "x")  # `right` has its base's seed
    assert lineage(Path("own.yaml")) == "own.yaml on (left.yaml on root.yaml), (right.yaml on root.yaml)"


def test_interpolations_see_the_merged_values():
    write(
        base=recipe_text(root="here", eval_dataloader="{name: x, root: '${root}'}"),
        own="base: base.yaml\nroot: there\n",
    )

    assert read("own").eval_dataloader == {"name": "x", "root": "there"}
    assert read("own", "root=elsewhere").eval_dataloader == {"name": "x", "root": "elsewhere"}


@pytest.mark.parametrize("value", ["null", "[]"])
def test_no_base_is_none(value):
    write(own=recipe_text(base=value))

    assert read("own") == read_recipe(Path("own.yaml"))[0]
    assert lineage(Path("own.yaml")) == "own.yaml"


@pytest.mark.parametrize(
    ("below", "above", "expected"),
    [
        ({"a": 1}, {"a": 2}, {"a": 2}),
        ({"a": {"x": 1, "y": 2}}, {"a": {"y": 3, "z": 4}}, {"a": {"x": 1, "y": 3, "z": 4}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": {"x": 1}}, {"a": 5}, {"a": 5}),
        ({"a": 5}, {"a": {"x": 1}}, {"a": {"x": 1}}),
        ({"a": 1, "b": 2}, {"a": None}, {"b": 2}),
        ({"a": {"x": 1, "y": 2}}, {"a": {"x": None}}, {"a": {"y": 2}}),
        ({}, {"a": None}, {"a": None}),  # a value, such as `eval_dataloader: null`
        ({"a": {"name": "n", "x": 1}}, {"a": {"name": "n", "y": 2}}, {"a": {"name": "n", "x": 1, "y": 2}}),
        ({"a": {"name": "n", "x": 1}}, {"a": {"name": "m", "y": None}}, {"a": {"name": "m", "y": None}}),
        ({"a": {"name": "n", "x": 1}}, {"a": {"y": 2}}, {"a": {"name": "n", "x": 1, "y": 2}}),
        ({"a": {"x": 1}}, {"a": {"name": "m"}}, {"a": {"x": 1, "name": "m"}}),
        ({"a": {"name": "n", "x": 1}}, {"a": {"name": None}}, {"a": {"x": 1}}),
    ],
)
def test_merging(below, above, expected):
    before = yaml.safe_dump([below, above])

    assert merge(below, above) == expected
    assert yaml.safe_dump([below, above]) == before


_VALUES = st.recursive(
    st.integers(0, 3) | st.lists(st.integers(0, 3), max_size=2),
    lambda values: st.dictionaries(st.sampled_from("abc"), values, max_size=3),
    max_leaves=8,
)
_MAPPINGS = st.dictionaries(st.sampled_from("abc"), _VALUES, max_size=3)


@given(_MAPPINGS, _MAPPINGS, _MAPPINGS)
def test_merging_is_associative_and_nothing_is_its_identity(first: Any, second: Any, third: Any):
    assert merge(first, {}) == merge({}, first) == merge(first, first) == first
    # three levels, whichever two are merged first, unless a plain value stands between two mappings
    if not _hides(first, second, third):
        assert merge(merge(first, second), third) == merge(first, merge(second, third))


def _hides(first: Any, second: Any, third: Any) -> bool:
    """Whether somewhere mappings stand above and below a value that is none."""
    if not all(isinstance(values, dict) for values in (first, second, third)):
        return isinstance(first, dict) and isinstance(third, dict)
    return any(_hides(first[key], second[key], third[key]) for key in first.keys() & second.keys() & third.keys())


def test_a_block_of_another_builder_has_none_of_the_arguments_below():
    write(own="base: quickstart\noptimizers: {name: AdamW, lr: 0.01}\n")

    assert resolve_recipe("own.yaml").optimizers == {"name": "AdamW", "lr": 0.01}


def test_null_gives_a_key_its_default_again():
    write(own="base: quickstart\nalgorithms: null\nnum_threads: null\nmodel: {in_channels: null, num_classes: null}\n")

    with pytest.raises(RecipeError) as caught:
        resolve_recipe("own.yaml")

    assert caught.value.errors == ["`model.num_classes`: missing."]
    recipe = read("own")
    assert (recipe.algorithms, recipe.num_threads) == (None, None) and "in_channels" not in recipe.model


def test_a_file_that_is_based_on_itself_is_refused():
    write(one="base: two.yaml\n", two="base: [three.yaml]\n", three="base: one.yaml\n", self="base: self.yaml\n")

    assert refusal("one") == (
        "`base` (one.yaml -> two.yaml -> three.yaml -> one.yaml): a recipe cannot be based on itself."
    )
    assert refusal("self") == "`base` (self.yaml -> self.yaml): a recipe cannot be based on itself."


def test_a_base_that_is_not_there_names_the_chain_and_what_is_close():
    write(one="base: two.yaml\n", two="base: quikstart\n", three="base: twoo.yaml\n", four="base: .\n")

    missing = "is neither a file nor the name of a shipped recipe."
    assert refusal("two") == f"`base` (='quikstart') {missing} Did you mean quickstart?"
    assert refusal("one") == f"`base` (one.yaml -> two.yaml): `base` (='quikstart') {missing} Did you mean quickstart?"
    assert refusal("three") == f"`base` (='twoo.yaml') {missing} Did you mean two.yaml?"
    assert refusal("four") == "`base` (='.') is a folder; name a YAML file in it, or a shipped recipe."


@pytest.mark.parametrize(
    ("text", "says"), [("- seed\n", "not a recipe: "), ("42\n", "not a recipe: "), ("seed: [1", "not valid YAML: ")]
)
def test_a_base_that_is_no_mapping_is_refused(text, says):
    write(one="base: two.yaml\n", two=text)

    assert refusal("one").startswith(f"`base` (one.yaml -> two.yaml): {says}")


@pytest.mark.parametrize("value", ["3", "{a: b}", "[1]", "['']", "[[two.yaml]]"])
def test_a_base_that_is_no_name_is_refused(value):
    write(own=f"base: {value}\n")

    rule = "must be the path of a recipe, the name of a shipped one, or a list of these."
    assert refusal("own") == f"`base` (={yaml.safe_load(value)!r}) {rule}"


@pytest.mark.parametrize("override", ["base=quickstart", "base[0]=quickstart", "base.x=1"])
def test_a_base_cannot_be_an_override(override):
    write(own=recipe_text())

    says = "`base` stands in a recipe's file alone. Name the recipe that is to run instead."
    assert read_recipe(Path("own.yaml"), [override])[1] == [f"override {override!r}: {says}"]


def test_mistakes_in_a_base_are_reported_as_if_they_stood_in_the_file():
    write(base=recipe_text(sede="1"), own="base: base.yaml\nmodel: {dpeth: 8}\nbsae: x\n")

    with pytest.raises(RecipeError) as caught:
        resolve_recipe("own.yaml")

    assert caught.value.errors == [
        "`sede`: unknown key. Did you mean `seed`?",
        "`bsae`: unknown key. Did you mean `base`?",
        "`model.dpeth`: unknown argument of cifar_resnet. Did you mean `depth`?",
    ]


def test_a_dry_run_says_where_a_recipe_comes_from_and_prints_it_without_base(capsys):
    write(own="base: quickstart\nseed: 5\n")
    assert main(["train", "own.yaml", "--dry-run"]) == 0

    first, text = capsys.readouterr().out.split("\n", 1)

    assert first == "# own.yaml on quickstart"
    assert "base" not in yaml.safe_load(text)
    write(printed=text)
    assert read("printed") == resolve_recipe("own.yaml")


def test_shipped_recipes_go_by_their_names():
    (name, base) = "cifar10/resnet20_gn_ws", "cifar10/resnet20_gn"

    assert lineage(shipped_recipes()[name]).startswith(f"{name} on {base}")
