from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import DataSpec
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import datasets

from ws_algorithm.recipes import registry
from ws_algorithm.recipes.data.classification import build_fashion_mnist_dataspec

from ..runs import write_fashion_mnist

SIZES = {
    ("digits", "train"): 1437,
    ("digits", "test"): 360,
    ("fashion_mnist", "train"): 32,
    ("fashion_mnist", "test"): 16,
}
SHAPES = {"digits": (1, 8, 8), "fashion_mnist": (1, 28, 28)}


def build(name: str, split: str, *, batch_size: int = 360, training: bool = False, **options: Any) -> DataSpec:
    if name == "fashion_mnist" and not Path("data").exists():
        write_fashion_mnist(Path("data"))
    options |= {"root": "data"} if name == "fashion_mnist" else {}
    return registry.DATA[name](split, batch_size=batch_size, training=training, **options)


def batches(spec: DataSpec, epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
    spec.dataloader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # as the Trainer does
    return list(spec.dataloader)


def everything(spec: DataSpec, epoch: int = 0) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches(spec, epoch), strict=True)
    return torch.cat(images), torch.cat(labels)


def multiset(images: Tensor, labels: Tensor) -> Counter[bytes]:
    rows = torch.cat([(16 * images).round().flatten(1), labels[:, None]], dim=1).to(torch.uint8)
    return Counter(bytes(row.tolist()) for row in rows)


def digits_in(split: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Pixels from 0 to 1 and labels, before normalization."""
    dataset: Any = build("digits", split, **options).dataloader.dataset  # type: ignore[attr-defined]
    return dataset.images, dataset.labels


def test_every_data_set_is_tested():
    assert {name for name, _ in SIZES} == registry.DATA.keys()


@pytest.mark.parametrize(("name", "split"), SIZES)
def test_batches(name, split):
    size = SIZES[name, split]
    found = batches(build(name, split, batch_size=5))

    assert sum(len(labels) for _, labels in found) == size
    assert {(images.dtype, labels.dtype) for images, labels in found} == {(torch.float32, torch.int64)}
    assert {images.shape[1:] for images, _ in found} == {SHAPES[name]}
    assert {int(label) for _, labels in found for label in labels} == set(range(10))


@pytest.mark.parametrize(("name", "split"), SIZES)
def test_training_drops_the_last_partial_batch_and_evaluation_keeps_it(name, split):
    whole, rest = divmod(SIZES[name, split], 7)
    assert rest > 0

    assert [len(labels) for _, labels in batches(build(name, split, batch_size=7))] == whole * [7] + [rest]
    training = build(name, split, batch_size=7, training=True)
    assert [len(labels) for _, labels in batches(training)] == whole * [7]
    assert len(training.dataloader) == whole  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SHAPES)
def test_the_order_is_that_of_the_seed_and_the_epoch(name):
    def order(seed: int, epoch: int) -> Tensor:
        return everything(build(name, "train", batch_size=4, training=True, augment=False, seed=seed), epoch)[0]

    first = order(0, 0)

    assert torch.equal(order(0, 0), first)
    for other in (order(0, 1), order(1, 0)):
        assert not torch.equal(other, first)
    assert torch.equal(order(0, 1), order(0, 1))


@pytest.mark.parametrize("name", SHAPES)
def test_evaluation_reads_in_order_whatever_the_seed(name):
    first = everything(build(name, "test", batch_size=4, seed=0))[1]

    assert torch.equal(everything(build(name, "test", batch_size=4, seed=1), epoch=3)[1], first)


@pytest.mark.parametrize("name", SHAPES)
def test_augmentation_is_for_training_alone(name):
    def images(training: bool, augment: bool) -> Tensor:
        return everything(build(name, "train", batch_size=4, training=training, augment=augment))[0]

    assert torch.equal(images(False, True), images(False, False))
    assert not torch.equal(images(True, True), images(True, False))


@pytest.mark.parametrize("name", SHAPES)
def test_building_leaves_the_random_state_alone(name):
    state = torch.get_rng_state()
    build(name, "train", training=True)

    assert torch.equal(torch.get_rng_state(), state)


def test_digits_are_split_without_overlap_or_loss():
    parts = multiset(*digits_in("train")) + multiset(*digits_in("test"))
    pixels, labels = load_digits(return_X_y=True)

    assert parts == multiset(torch.tensor(pixels / 16), torch.tensor(labels))


def test_digits_are_split_the_same_way_for_every_seed():
    for split in ("train", "test"):
        (images, labels), (again, again_labels) = digits_in(split, seed=0), digits_in(split, seed=7, training=True)
        assert torch.equal(images, again) and torch.equal(labels, again_labels)


def test_digits_are_split_within_each_class():
    everyone = torch.cat([digits_in("train")[1], digits_in("test")[1]]).bincount()
    tested = digits_in("test")[1].bincount()

    # 360 of 1,797, which is a fifth of each class to the nearest image
    assert ((tested - everyone * 360 / 1797).abs() < 1).all()


def test_digits_are_normalized_over_the_training_images():
    train, test = digits_in("train")[0], digits_in("test")[0]
    mean, std = train.double().mean(), train.double().std()

    found = everything(build("digits", "train"))[0].double()
    torch.testing.assert_close((found.mean(), found.std()), (torch.zeros_like(mean), torch.ones_like(std)))
    torch.testing.assert_close(everything(build("digits", "test"))[0], ((test.double() - mean) / std).float())


def test_digits_are_shifted_by_a_pixel_at_most():
    torch.manual_seed(0)
    shifted = everything(build("digits", "train", batch_size=100, training=True))[0][:200]
    still = everything(build("digits", "train", batch_size=100, training=True, augment=False))[0][:200]

    background = still.min()  # a pixel of value 0, normalized
    padded = torch.nn.functional.pad(still, (1, 1, 1, 1), value=float(background))
    shifts = [padded[..., y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    matches = torch.stack([torch.isclose(shifted, shift, atol=1e-6).all(dim=(1, 2, 3)) for shift in shifts])

    assert matches.any(dim=0).all()  # each image is one of its nine shifts
    assert matches.any(dim=1).all()  # and each shift occurs


def test_fashion_mnist_is_normalized():
    dataset: Any = build("fashion_mnist", "test").dataloader.dataset  # type: ignore[attr-defined]
    expected = (dataset.data.double() / 255 - 0.2860) / 0.3530

    torch.testing.assert_close(everything(build("fashion_mnist", "test"))[0], expected[:, None].float())


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_root_without_the_data_is_named(split):
    with pytest.raises(ValueError, match=r"`root` \(='nowhere'\) has no Fashion-MNIST: .*Set download=true"):
        build_fashion_mnist_dataspec(split, "nowhere", batch_size=4, training=False)


def test_a_file_that_is_missing_is_a_missing_data_set():
    write_fashion_mnist(Path("data"))
    (Path("data/FashionMNIST/raw") / "t10k-labels-idx1-ubyte").unlink()

    with pytest.raises(ValueError, match=r"`root` \(='data'\) has no Fashion-MNIST"):
        build_fashion_mnist_dataspec("test", "data", batch_size=4, training=False)


def test_a_download_that_fails_names_the_root_and_the_cause(monkeypatch):
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("Error downloading train-images")

    monkeypatch.setattr(datasets, "FashionMNIST", fail)
    with pytest.raises(ValueError, match="`root` .*'data'.*: Error downloading train-images"):
        build_fashion_mnist_dataspec("train", "data", batch_size=4, training=True, download=True)
