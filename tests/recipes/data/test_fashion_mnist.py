from pathlib import Path

import pytest
import torch
from torchvision import datasets

from ws_algorithm.recipes.data.fashion_mnist import build_fashion_mnist_dataspec

from ..runs import write_fashion_mnist
from .sources import build, dataset_of, everything


def test_fashion_mnist_is_normalized():
    expected = (dataset_of(build("fashion_mnist", "test")).data.double() / 255 - 0.2860) / 0.3530

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
