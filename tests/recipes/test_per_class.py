from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.models import ComposerClassifier
from torch import Tensor
from torchmetrics import Metric

from ws_algorithm.__main__ import main
from ws_algorithm.recipes import registry
from ws_algorithm.recipes.evaluate import evaluate
from ws_algorithm.recipes.per_class import class_names, per_class_table
from ws_algorithm.recipes.schema import RecipeError

from .texts import class_rows

# How many of the 360 test images show each digit, a fifth of scikit-learn's 178, 182, 177, 183, 181, 182, 181, 179,
# 174 and 180
OF_TEST = [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]


def test_classes_have_their_images_and_accuracies(finished_run, capsys):
    assert main(["evaluate", str(finished_run), "--per-class"]) == 0

    printed = capsys.readouterr().out
    rows = class_rows(printed)
    assert [(name, images) for name, images, _ in rows] == [(str(digit), n) for digit, n in enumerate(OF_TEST)]
    right = [round(images * accuracy) for _, images, accuracy in rows]
    assert [accuracy for *_, accuracy in rows] == [float(f"{n / m:.4f}") for n, m in zip(right, OF_TEST, strict=True)]
    assert f"MulticlassAccuracy  {sum(right) / 360:.4f}" in printed


def test_it_changes_no_other_value(finished_run):
    overrides = ["global_eval_batch_size=180"]

    assert evaluate(str(finished_run), overrides, per_class=True) == evaluate(str(finished_run), overrides)


def test_only_images_that_are_evaluated_count(finished_run, capsys):
    evaluate(str(finished_run), ["global_eval_batch_size=7", "eval_subset_num_batches=1"], per_class=True)

    printed = capsys.readouterr().out
    assert sum(int(line.split()[1]) for line in printed.splitlines() if line[:1].isdigit()) == 7
    assert any(line.split() == [str(digit), "0", "-"] for digit in range(10) for line in printed.splitlines())


class WithoutMethod(ComposerClassifier):
    pass


class Shares(Metric):
    """Accuracies of classes, without the counts of torchmetrics' own."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.zeros(10), dist_reduce_fx="sum")
        self.add_state("seen", torch.zeros(10), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, labels: Tensor) -> None:
        self.seen += torch.bincount(labels, minlength=10)
        self.right += torch.bincount(labels[outputs.argmax(1) == labels], minlength=10)

    def compute(self) -> Tensor:
        assert isinstance(self.right, Tensor) and isinstance(self.seen, Tensor)
        return self.right / self.seen


class WithShares(ComposerClassifier):
    def per_class_metric(self) -> Metric:
        return Shares()


def test_a_metric_without_counts_gives_accuracies_alone(finished_run, monkeypatch, capsys):
    evaluate(str(finished_run), per_class=True)
    expected = [accuracy for _, _, accuracy in class_rows(capsys.readouterr().out)]
    replace_models(monkeypatch, WithShares)

    evaluate(str(finished_run), per_class=True)

    lines = capsys.readouterr().out.partition("class  accuracy\n")[2].partition("\n\n")[0].splitlines()
    assert [float(line.split()[1]) for line in lines] == expected


def test_a_model_that_cannot_say_is_refused(finished_run, monkeypatch):
    replace_models(monkeypatch, WithoutMethod)

    with pytest.raises(RecipeError) as caught:
        evaluate(str(finished_run), per_class=True)

    problem = "this model does not say how to measure each class: it has no method `per_class_metric`."
    assert caught.value.errors == [f"--per-class: {problem}"]


def replace_models(monkeypatch: pytest.MonkeyPatch, model_class: type[ComposerClassifier]) -> None:
    """Let recipes build models of a class of ours around the same network."""
    original = registry.MODELS["cifar_resnet"]

    def build(**arguments: Any) -> ComposerClassifier:
        return model_class(original(**arguments).module, num_classes=arguments["num_classes"])

    monkeypatch.setitem(registry.MODELS, "cifar_resnet", build)


def data_with(classes: Any) -> Any:
    return SimpleNamespace(dataloader=SimpleNamespace(dataset=SimpleNamespace(classes=classes)))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (data_with(["cat", "dog"]), ["cat", "dog"]),
        (data_with(("cat", "dog")), ["cat", "dog"]),
        (data_with(["cat", "dog", "horse"]), ["0", "1"]),  # not those of the model
        (data_with(None), ["0", "1"]),
        (SimpleNamespace(dataloader=[]), ["0", "1"]),
        (None, ["0", "1"]),
    ],
)
def test_names_are_those_of_the_data_set_if_it_has_them(data, expected):
    assert class_names(data, 2) == expected


def test_a_class_without_images_has_no_accuracy():
    accuracies, images = torch.tensor([0.5, 0.0, 0.0]), torch.tensor([2, 1, 0])

    assert per_class_table("abc", accuracies, images) == (
        ("class", "images", "accuracy"),
        [("a", "2", "0.5000"), ("b", "1", "0.0000"), ("c", "0", "-")],
    )
