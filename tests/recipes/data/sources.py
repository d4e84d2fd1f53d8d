"""Every data set of the registry in a few images, written into the current folder, and its batches."""

import hashlib
import itertools
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer.core import DataSpec
from PIL import Image
from torch import Tensor
from torchvision import datasets

from ws_algorithm.recipes import registry

from ..runs import write_fashion_mnist


@dataclass(frozen=True)
class Source:
    """What a small copy of a data set has, by its name in the registry."""

    shape: tuple[int, int, int]
    train: int
    test: int
    num_classes: int
    test_split: str = "test"

    def size(self, split: str) -> int:
        return self.train if split == "train" else self.test


SOURCES = {
    "cifar10": Source((3, 32, 32), 30, 20, 10),
    "cifar100": Source((3, 32, 32), 200, 100, 100),
    "digits": Source((1, 8, 8), 1437, 360, 10),
    "fashion_mnist": Source((1, 28, 28), 32, 16, 10),
    "image_folder": Source((3, 16, 16), 24, 9, 3, "val"),
    "imagenet": Source((3, 16, 16), 24, 9, 3, "val"),
    "synthetic_images": Source((3, 16, 16), 30, 30, 5),
}
CLASSES = ["ant", "bee", "cow"]
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def build(name: str, split: str, *, batch_size: int = 360, training: bool = False, **options: Any) -> DataSpec:
    """A data set of `SOURCES`, written first if it is not there."""
    builder = registry.DATA[name]
    if name == "synthetic_images":
        small: dict[str, Any] = {"image_size": 16, "num_classes": 5, "num_images": 30}
        return builder(**small | options, batch_size=batch_size, training=training)
    if name == "fashion_mnist" and not Path("data").exists():
        write_fashion_mnist(Path("data"))
    if name in ("imagenet", "image_folder"):
        if not Path("data").exists():
            write_folders(Path("data"), CLASSES, train=8, val=3)
        options = {"image_size": 16, "resize": 18} | options
    options = options if name == "digits" else {"root": "data"} | options
    return builder(split, batch_size=batch_size, training=training, **options)


def batches(spec: DataSpec, epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
    spec.dataloader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # as the Trainer does
    return list(spec.dataloader)


def everything(spec: DataSpec, epoch: int = 0) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches(spec, epoch), strict=True)
    return torch.cat(images), torch.cat(labels)


def dataset_of(spec: DataSpec) -> Any:
    return spec.dataloader.dataset  # type: ignore[attr-defined]


def random_image(seed: int, height: int = 20, width: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def write_folders(root: Path, classes: Sequence[str], *, size: tuple[int, int] = (20, 24), **splits: int) -> None:
    """PNG files ``root/<split>/<class>/<number>.png``, as many of each class as the split says."""
    seed = 0
    for split, images in splits.items():
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(images):
                random_image(seed, *size).save(root / split / name / f"{number}.png")
                seed += 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random images in the pickles that torchvision reads, with checksums of these files in the place of the true."""
    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    size = SOURCES[name]
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    generator, label = np.random.default_rng(0), itertools.cycle(range(size.num_classes))

    def dump(file: str, content: dict[str, Any]) -> str:
        (folder / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    def images(count: int) -> dict[str, Any]:
        pixels = generator.integers(0, 256, (count, 3072)).astype(np.uint8)
        labels = [next(label) for _ in range(count)]
        return {"data": pixels, "labels" if name == "cifar10" else "fine_labels": labels}

    for part, count in (("train_list", size.train // len(source.train_list)), ("test_list", size.test)):
        monkeypatch.setattr(source, part, [[file, dump(file, images(count))] for file, _ in getattr(source, part)])
    names = CIFAR10_CLASSES if name == "cifar10" else [f"class {i:02}" for i in range(100)]
    checksum = dump(source.meta["filename"], {source.meta["key"]: names})
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": checksum})
