import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ws_algorithm.__main__ import main
from ws_algorithm.recipes.plot import plot, unique_names
from ws_algorithm.recipes.schema import RecipeError


@pytest.fixture
def runs(finished_run) -> list[str]:
    """Two folders of the same name with the metrics of a run."""
    for name in ("one", "two"):
        Path(name, "run").mkdir(parents=True)
        shutil.copy(finished_run / "metrics.jsonl", Path(name, "run"))
    return ["one/run", "two/run"]


def test_runs_become_one_picture(runs, capsys):
    assert main(["plot", *runs]) == 0

    assert capsys.readouterr().out == "curves of 2 runs: plot.png\n"
    with Image.open("plot.png") as image:
        assert image.format == "PNG" and image.width > 1000
    assert {path.name for path in Path().iterdir()} == {"one", "two", "plot.png"}


def test_one_run_and_a_place_of_ones_own(runs, capsys):
    assert main(["plot", runs[0], "--output", "one/of one.png"]) == 0

    assert capsys.readouterr().out == "curves of 1 run: one/of one.png\n"
    assert Path("one/of one.png").exists() and not Path("plot.png").exists()


def test_all_mistakes_are_listed_and_nothing_is_written(runs, capsys):
    Path("empty").mkdir()
    Path("begun").mkdir()
    Path("begun/metrics.jsonl").touch()
    Path("file").touch()
    torn = Path("one/run/metrics.jsonl")
    torn.write_text(torn.read_text()[:-5] + "\n")
    lines = len(torn.read_text().splitlines())

    assert main(["plot", "nowhere", "empty", "begun", "file", *runs, "two/../two/run", "--output", "a.pdf"]) == 2

    first, *mistakes = capsys.readouterr().err.splitlines()
    assert first == "ws-algorithm plot: 7 mistakes"
    beginnings = [
        "  `--output` (='a.pdf') must be the name of a PNG, such as a.png.",
        "  `run` (='nowhere'): there is no such folder.",
        "  `run` (='empty'): not the folder of a run: it has no metrics.jsonl.",
        "  `run` (='begun'): its metrics.jsonl has no metrics yet.",
        "  `run` (='file'): a file, not the folder of a run.",
        f"  `run` (='one/run'): one/run/metrics.jsonl: line {lines} is no JSON: ",
        "  `run` (='two/../two/run') is given twice.",
    ]
    assert [line[: len(text)] for line, text in zip(mistakes, beginnings, strict=True)] == beginnings
    assert not list(Path().glob("*.p*"))


def test_a_picture_that_cannot_be_written_is_a_mistake(runs):
    Path("folder.png").mkdir()
    for output, says in [("nowhere/a.png", "there is no folder nowhere."), ("folder.png", "")]:
        with pytest.raises(RecipeError) as caught:
            plot(runs, output)
        (mistake,) = caught.value.errors
        assert mistake.startswith(f"`--output` (={output!r}): {says}")


def test_names_are_as_short_as_they_can_be():
    paths = [Path("/x/a/run"), Path("/x/b/run"), Path("/x/b/other")]

    assert unique_names(paths[1:]) == ["run", "other"]
    assert unique_names(paths) == ["a/run", "b/run", "b/other"]
    assert unique_names([Path("/run"), Path("/run/run")]) == ["//run", "run/run"]


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(tuple), min_size=1, unique=True))
def test_names_are_unique_ends_of_their_paths(parts):
    paths = [Path("/", *part) for part in parts]

    names = unique_names(paths)

    assert len(set(names)) == len(paths)
    assert all(str(path).endswith(name.removeprefix("/")) for path, name in zip(paths, names, strict=True))
