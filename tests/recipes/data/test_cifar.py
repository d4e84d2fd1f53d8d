from pathlib import Path

import pytest
import torch
from torchvision import datasets
from torchvision.transforms import functional

from ws_algorithm.recipes.data.cifar import build_cifar10_dataspec, build_cifar100_dataspec

from .sources import CIFAR10_CLASSES, build, dataset_of, everything, truncate, write_cifar, write_folders

MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_pickles_are_read_as_torchvision_reads_them(name, split, monkeypatch):
    write_cifar(Path("data"), name, monkeypatch)
    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]("data", train=split == "train")

    images, labels = everything(build(name, split))

    expected = torch.stack([(functional.to_tensor(image) - MEAN) / STD for image, _ in source])
    torch.testing.assert_close(images, expected)
    assert labels.tolist() == source.targets
    assert dataset_of(build(name, split)).classes == source.classes


def test_training_images_are_crops_of_the_padded_image_or_of_its_mirror_image(monkeypatch):
    write_cifar(Path("data"), "cifar10", monkeypatch)
    found = [everything(build("cifar10", "train", batch_size=10, training=True), epoch)[0] for epoch in range(4)]
    augmented = torch.cat(found) * STD + MEAN
    still = dataset_of(build("cifar10", "train")).images / 255

    padded = torch.nn.functional.pad(still, (4, 4, 4, 4))
    crops = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # (N, 3, 9, 9, 32, 32)
    crops = torch.stack([crops, crops.flip(5)]).permute(0, 1, 3, 4, 2, 5, 6).flatten(0, 3)
    distances = torch.cdist(augmented.flatten(1), crops.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")

    assert distances.min(1).values.max() < 1e-3  # the next crop is tens away
    flips, _, rows, columns = torch.unravel_index(distances.argmin(1), (2, 30, 9, 9))
    assert flips.unique().tolist() == [0, 1]
    assert rows.unique().tolist() == columns.unique().tolist() == list(range(9))


def test_folders_of_classes_are_read_too():
    write_folders(Path("data"), CIFAR10_CLASSES, size=(32, 32), train=2, test=1)

    images, labels = everything(build("cifar10", "train"))

    files = datasets.ImageFolder("data/train")
    expected = torch.stack([(functional.to_tensor(image) - MEAN) / STD for image, _ in files])
    torch.testing.assert_close(images, expected)
    assert labels.tolist() == files.targets
    assert everything(build("cifar10", "test"))[1].tolist() == list(range(10))


def test_pickles_go_before_folders(monkeypatch):
    write_cifar(Path("data"), "cifar10", monkeypatch)
    write_folders(Path("data"), CIFAR10_CLASSES, size=(32, 32), train=1, test=1)

    assert len(everything(build("cifar10", "train"))[1]) == 30


def test_other_classes_are_refused():
    write_folders(Path("data"), [*CIFAR10_CLASSES[1:], "zebra"], size=(32, 32), train=1)

    with pytest.raises(ValueError, match=r"must have the 10 classes of CIFAR-10: airplane.* Found 10: auto.*, zebra\."):
        build("cifar10", "train")
    with pytest.raises(ValueError, match=r"must have the 100 classes of CIFAR-100\. Found 10: .*use `image_folder`"):
        build("cifar100", "train")


def test_files_that_are_not_of_cifar_are_named():
    write_folders(Path("data"), CIFAR10_CLASSES, size=(32, 32), train=1)
    write_folders(Path("other"), ["dog"], size=(32, 40), train=1)
    truncate(Path("data/train/bird/0.png"))
    Path("other/train/dog/0.png").rename("data/train/dog/0.png")

    Path("data/train/cat/0.png").write_text("no image")

    with pytest.raises(
        ValueError, match=r"3 files are not images of 32x32 pixels: .*bird/0.png \(.*; .*dog.*32x40"
    ) as raised:
        build("cifar10", "train")
    assert "data/train/cat/0.png (not an image, or a broken one); " in str(raised.value)


@pytest.mark.parametrize(("name", "title"), [("cifar10", "CIFAR-10"), ("cifar100", "CIFAR-100")])
def test_a_class_without_images_is_named_without_an_option_that_is_not_there(name, title):
    write_folders(Path("data"), CIFAR10_CLASSES, size=(32, 32), train=1)
    Path("data/train/dog/0.png").unlink()

    with pytest.raises(ValueError, match="no images of 1 of the classes: dog") as raised:
        build(name, "train")
    assert str(raised.value) == (
        "data/train has no images of 1 of the classes: dog. "
        f"{title} has images of every class; for other data, use `image_folder`."
    )


@pytest.mark.parametrize("builder", [build_cifar10_dataspec, build_cifar100_dataspec])
def test_a_root_without_the_data_is_named(builder):
    with pytest.raises(ValueError, match=r"`root` \(='nowhere'\) has no CIFAR100?, .*cifar-10.* Set download=true"):
        builder("train", "nowhere", batch_size=4, training=False)


def test_a_damaged_file_is_told_by_its_checksum(monkeypatch):
    write_cifar(Path("data"), "cifar10", monkeypatch)
    path = Path("data/cifar-10-batches-py/data_batch_3")
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    with pytest.raises(ValueError, match="no CIFAR10, or a damaged one"):
        build("cifar10", "train")


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_a_download_that_fails_names_the_root_and_the_cause(error, monkeypatch):
    def fail(self: object) -> None:
        raise error("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", fail)
    with pytest.raises(ValueError, match=r"CIFAR10 could not be downloaded into `root` \(='data'\): no route to host"):
        build_cifar10_dataspec("train", "data", batch_size=4, training=True, download=True)
