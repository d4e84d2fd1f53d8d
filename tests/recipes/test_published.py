from pathlib import Path

import pytest

from ws_algorithm.recipes.evaluate import evaluate
from ws_algorithm.recipes.report import add_published
from ws_algorithm.recipes.resolve import resolve_recipe
from ws_algorithm.recipes.schema import RecipeError
from ws_algorithm.recipes.train import train

from .runs import FEW

PUBLISHED = "published={MulticlassAccuracy: 0.5, source: 'https://example.org, table 1'}"


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        (
            "{MulticlassAcuracy: 0.5}",
            ["`published.MulticlassAcuracy`: no metric of the model. Did you mean `MulticlassAccuracy`?"],
        ),
        ("{MulticlassAccuracy: high}", ["`published.MulticlassAccuracy` (='high') must be a number."]),
        ("{MulticlassAccuracy: null}", ["`published.MulticlassAccuracy` (=None) must be a number."]),
        ("{MulticlassAccuracy: true}", ["`published.MulticlassAccuracy` (=True) must be a number."]),
        ("{MulticlassAccuracy: .nan}", ["`published.MulticlassAccuracy` (=nan) must be a number."]),
        ("{MulticlassAccuracy: 1, source: 3}", ["`published.source` (=3) must be a text."]),
        ("{source: x}", ["`published` has no figure. Name a metric, or leave it out."]),
        ("{}", ["`published` has no figure. Name a metric, or leave it out."]),
        ("0.5", ["`published` (=0.5)"]),
        ("{a: b, CrossEntropy: c}", ["`published.a`: no metric of the model.", "`published.CrossEntropy` (='c')"]),
    ],
)
def test_figures_are_numbers_of_metrics_of_the_model(published, expected):
    with pytest.raises(RecipeError) as caught:
        resolve_recipe("quickstart", [f"published={published}"])

    assert len(caught.value.errors) == len(expected)
    assert all(line.startswith(text) for line, text in zip(caught.value.errors, expected, strict=True))


def test_a_model_that_cannot_be_built_hides_no_figure():
    with pytest.raises(RecipeError) as caught:
        resolve_recipe("quickstart", [PUBLISHED, "model.depth=9"])

    (mistake,) = caught.value.errors
    assert mistake.startswith("`model`")


def test_a_column_stands_last_and_only_if_there_is_a_figure():
    header, table = ("metric", "value"), [("a", "1.0000"), ("b", "2.0000")]

    assert add_published(header, [*table], {"b": 0.12345}) == (
        ("metric", "value", "published"),
        [("a", "1.0000", ""), ("b", "2.0000", "0.1235")],
    )
    assert add_published(header, [*table], {}) == (header, table)


def test_figures_stand_beside_those_of_a_run(capsys):
    train("quickstart", [*FEW, PUBLISHED, "save_folder=run"])
    trained = capsys.readouterr().out.splitlines()
    values = evaluate("run")
    evaluated = capsys.readouterr().out.splitlines()

    accuracy = f"{values['MulticlassAccuracy']:.4f}"
    assert trained[0].split() == ["metric", "last", "best", "best", "epoch", "published"]
    assert ["MulticlassAccuracy", accuracy, accuracy, "1", "0.5000"] in [line.split() for line in trained]
    assert evaluated[0].split() == ["metric", "value", "published"]
    assert ["MulticlassAccuracy", accuracy, "0.5000"] in [line.split() for line in evaluated]
    assert "published   https://example.org, table 1" in evaluated
    assert "published:" in Path("run/recipe.yaml").read_text()


def test_without_figures_there_is_no_column(finished_run, capsys):
    evaluate(str(finished_run))

    assert "published" not in capsys.readouterr().out


def test_figures_may_have_no_source(finished_run, capsys):
    evaluate(str(finished_run), ["published={MulticlassAccuracy: 1}"])

    printed = capsys.readouterr().out
    assert "1.0000" in printed and "\npublished " not in printed
