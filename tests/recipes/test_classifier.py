import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ws_algorithm.recipes.classifier import ImageClassifier


def classifier(num_classes: int) -> ImageClassifier:
    return ImageClassifier(nn.Identity(), num_classes)


def measured(model: ImageClassifier, *batches: tuple[Tensor, Tensor]) -> dict[str, float]:
    metrics = model.get_metrics(is_train=False)
    for batch in batches:
        for metric in metrics.values():
            model.update_metric(batch, model(batch), metric)
    return {name: metric.compute().item() for name, metric in metrics.items()}


@pytest.mark.parametrize("num_classes", [2, 5])
def test_few_classes_have_no_top_5(num_classes):
    assert list(classifier(num_classes).get_metrics(is_train=False)) == ["CrossEntropy", "MulticlassAccuracy"]


@pytest.mark.parametrize("num_classes", [6, 1000])
def test_many_classes_have_a_top_5(num_classes):
    names = list(classifier(num_classes).get_metrics(is_train=False))

    assert names == ["CrossEntropy", "MulticlassAccuracy", "Top5Accuracy"]


def test_training_has_accuracy_alone():
    assert list(classifier(10).get_metrics(is_train=True)) == ["MulticlassAccuracy"]


def test_metrics_are_shares_of_all_images():
    outputs = torch.stack([torch.arange(10.0), torch.arange(10.0), torch.arange(10.0), torch.arange(10.0).flip(0)])
    labels = torch.tensor([9, 5, 4, 0])  # at places 1, 5, 6 and 1 from the top
    first, rest = (outputs[:2], labels[:2]), (outputs[2:], labels[2:])

    found = measured(classifier(10), first, rest)

    assert found["MulticlassAccuracy"] == 2 / 4
    assert found["Top5Accuracy"] == 3 / 4
    assert found["CrossEntropy"] == pytest.approx(F.cross_entropy(outputs, labels).item())


def test_metrics_stay_apart_after_a_batch_on_which_they_agree():
    sure = (torch.eye(10)[:2], torch.tensor([0, 1]))  # both accuracies are 1
    fifth = (torch.arange(10.0).expand(2, 10), torch.tensor([5, 5]))  # 0 and 1

    found = measured(classifier(10), sure, fifth)

    assert (found["MulticlassAccuracy"], found["Top5Accuracy"]) == (0.5, 1.0)


def test_the_loss_is_cross_entropy():
    outputs, labels = torch.randn(8, 10), torch.arange(8)

    loss = classifier(10).loss(outputs, (outputs, labels))

    torch.testing.assert_close(loss, F.cross_entropy(outputs, labels))


def test_accuracy_of_each_class():
    model = classifier(4)
    metric = model.per_class_metric()
    outputs = torch.eye(4)[torch.tensor([0, 1, 1, 2, 2, 2])]

    for start in (0, 3):
        metric.update(outputs[start : start + 3], torch.tensor([0, 0, 1, 2, 2, 1])[start : start + 3])

    # of two zeros, two ones, two twos and no threes
    assert metric.compute().tolist() == [1 / 2, 1 / 2, 1.0, 0.0]
    assert model.per_class_metric() is not metric
    assert "per_class" not in " ".join(model.get_metrics(is_train=False))
