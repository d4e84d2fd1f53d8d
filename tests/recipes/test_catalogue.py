from pathlib import Path

import pytest

from ws_algorithm.recipes import catalogue
from ws_algorithm.recipes.catalogue import describe, find_recipe, shipped_folder, shipped_recipes

from .runs import CHECKOUT, YAMLS


def test_a_checkout_ships_what_is_in_its_folder():
    assert shipped_folder() == CHECKOUT / "yamls"
    assert sorted(shipped_recipes().values()) == YAMLS


def test_names_are_paths_below_the_folder_without_the_ending():
    assert {CHECKOUT / "yamls" / f"{name}.yaml": path for name, path in shipped_recipes().items()} == {
        path: path for path in YAMLS
    }


def test_an_installed_package_ships_what_is_inside_it(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "ws_algorithm"
    inside, beside = package / "yamls" / "a" / "b.yaml", package.parent / "yamls" / "c.yaml"
    for path in (inside, beside):
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.setattr(catalogue, "_PACKAGE", package)

    assert shipped_recipes() == {"a/b": inside}


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_shipped_recipes_open_with_what_they_are(path):
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]

    assert first == f"# {describe(path)}"
    assert describe(path) and second == "#"
    name = path.relative_to(shipped_folder()).with_suffix("").as_posix()
    assert any(f"{command} train {name}" in path.read_text() for command in ("ws-algorithm", "ws_algorithm"))


def test_a_description_is_the_first_comment():
    Path("recipe.yaml").write_text("#  What it is, briefly  \n# more\nseed: 1\n")

    assert describe(Path("recipe.yaml")) == "What it is, briefly"


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "yamls/quickstart", "yamls/quickstart.yaml"])
def test_shipped_recipes_are_found_by_name_from_anywhere(name):
    assert find_recipe(name) == shipped_folder() / "quickstart.yaml"


def test_a_file_is_found_by_path(tmp_path, monkeypatch):
    own = tmp_path / "own.yaml"
    own.touch()
    monkeypatch.setenv("HOME", str(tmp_path))

    assert find_recipe("own.yaml") == Path("own.yaml")
    assert find_recipe(str(own)) == own
    assert find_recipe("~/own.yaml") == own


def test_a_file_of_ones_own_goes_before_a_shipped_recipe():
    Path("quickstart").touch()

    assert find_recipe("quickstart") == Path("quickstart")


def test_a_folder_does_not_hide_a_shipped_recipe():
    Path("quickstart").mkdir()

    assert find_recipe("quickstart") == shipped_folder() / "quickstart.yaml"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("quikstart", "neither a file nor .* Did you mean quickstart?"),
        ("fashion_mnist/resnet20", "Did you mean fashion_mnist/resnet20_gn_ws?"),
        ("zzz", "`ws-algorithm recipes` lists those that ship"),
        ("/quickstart", "neither a file nor"),
        (".", "is a folder; name a YAML file in it"),
    ],
)
def test_a_name_that_is_nothing_is_refused(name, says):
    with pytest.raises(ValueError, match=says) as caught:
        find_recipe(name)

    assert f"`recipe` (={name!r})" in str(caught.value)
