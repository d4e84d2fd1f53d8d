"""CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from composer.core import DataSpec
from composer.utils import dist
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2
from tqdm import tqdm

from ws_algorithm.recipes.class_folders import LabelledFiles, find_labelled_files
from ws_algorithm.recipes.image_files import read_rgb, reason_of
from ws_algorithm.recipes.loading import ImagesInMemory, dataspec
from ws_algorithm.recipes.synthetic import SYNTHETIC, SyntheticImages

Split = Literal["train", "test"]

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

# Of CIFAR-10; CIFAR-100 is given the same, as in https://github.com/joe-siyuan-qiao/pytorch-classification
_MEAN = [0.4914, 0.4822, 0.4465]
_STD = [0.2023, 0.1994, 0.2010]


def build_cifar10_dataspec(
    split: Split,
    root: str,
    *,
    batch_size: int,
    training: bool,
    seed: int = 0,
    download: bool = False,
    augment: bool = True,
    num_workers: int = 0,
) -> DataSpec:
    """CIFAR-10: 60,000 color images of 32x32 pixels in ten classes, 50,000 of them for training.

    All images are read into memory at the start. Normalization is that of the reference recipes.

    Args:
        split: ``"train"`` or ``"test"``.
        root: The folder that holds ``cifar-10-batches-py``, as ``torchvision.datasets.CIFAR10`` wants it; or
            ``train/<class>/<image>`` and ``test/<class>/<image>``; or ``"synthetic"`` for random images.
        batch_size: Images per batch on this device.
        training: Whether to shuffle, to drop the last partial batch and to augment.
        seed: Decides the order of shuffled images. Default: ``0``.
        download: Whether to download what is missing in `root`. Default: ``False``.
        augment: Whether training images are padded by four pixels, cropped at random and flipped at random.
            Default: ``True``.
        num_workers: Processes that prepare batches. Default: ``0``.

    Raises:
        ValueError: If the data are not in `root` and `download` is off, cannot be downloaded, or are not CIFAR's.

    Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html.
    """
    if root == SYNTHETIC:
        dataset: Any = SyntheticImages((3, 32, 32), CIFAR10_CLASSES, batch_size=batch_size, seed=seed)
    else:
        dataset = _dataset(datasets.CIFAR10, 10, split, root, download, augment and training)
    return dataspec(dataset, batch_size=batch_size, training=training, seed=seed, num_workers=num_workers)


def build_cifar100_dataspec(
    split: Split,
    root: str,
    *,
    batch_size: int,
    training: bool,
    seed: int = 0,
    download: bool = False,
    augment: bool = True,
    num_workers: int = 0,
) -> DataSpec:
    """CIFAR-100: as :func:`build_cifar10_dataspec`, in a hundred classes and from ``cifar-100-python``."""
    if root == SYNTHETIC:
        names = [str(label) for label in range(100)]
        dataset: Any = SyntheticImages((3, 32, 32), names, batch_size=batch_size, seed=seed)
    else:
        dataset = _dataset(datasets.CIFAR100, 100, split, root, download, augment and training)
    return dataspec(dataset, batch_size=batch_size, training=training, seed=seed, num_workers=num_workers)


def _dataset(
    source: type[datasets.CIFAR10], num_classes: int, split: Split, root: str, download: bool, augment: bool
) -> ImagesInMemory:
    folder = Path(root).expanduser()
    if (folder / "train").is_dir() and not (folder / source.base_folder).is_dir():
        images, labels, classes = _read_folders(num_classes, split, folder)
    else:
        images, labels, classes = _read_pickles(source, split, root, download)
    crop = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)])
    return ImagesInMemory(images, labels, classes, crop if augment else None, normalize)


def _read_pickles(
    source: type[datasets.CIFAR10], split: Split, root: str, download: bool
) -> tuple[Tensor, Tensor, list[str]]:
    name = source.__name__
    try:
        with dist.run_local_rank_zero_first():
            data = source(root, train=split == "train", download=download)
    except (RuntimeError, OSError) as error:
        if download:
            raise ValueError(f"{name} could not be downloaded into `root` (={root!r}): {error}") from error
        raise ValueError(
            f"`root` (={root!r}) has no {name}, or a damaged one: expected {root}/{source.base_folder}/* with the "
            f"published checksums, or {root}/train/<class>/<image> and {root}/test/<class>/<image>. Set download=true, "
            "or root= to the folder that has it."
        ) from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(data.targets), list(data.classes)


def _read_folders(num_classes: int, split: Split, root: Path) -> tuple[Tensor, Tensor, list[str]]:
    remedy = f"CIFAR-{num_classes} has images of every class; for other data, use `image_folder`."
    files = find_labelled_files(root, split, remedy=remedy)
    expected = CIFAR10_CLASSES if num_classes == 10 else None
    if len(files.classes) != num_classes or expected not in (None, files.classes):
        found = ", ".join(files.classes[:10]) + (", ..." if len(files.classes) > 10 else "")
        names = f": {', '.join(expected)}" if expected else ""
        raise ValueError(
            f"{files.folder} must have the {num_classes} classes of CIFAR-{num_classes}{names}. Found "
            f"{len(files.classes)}: {found}. For other data, use `image_folder`."
        )
    return _read_images(files), files.labels, files.classes


def _read_images(files: LabelledFiles) -> Tensor:
    images = torch.empty(len(files.names), 3, 32, 32, dtype=torch.uint8)
    problems = []
    quiet = True if dist.get_global_rank() != 0 else None  # None: quiet unless stderr is a terminal
    paths = [os.path.join(files.folder, os.fsdecode(name)) for name in files.names]
    progress = tqdm(paths, desc=f"reading {files.folder}", unit=" images", delay=2, disable=quiet, leave=False)
    for position, path in enumerate(progress):
        try:
            pixels = np.array(read_rgb(path))
        except Exception as error:  # decoders meet broken files with errors of many types
            problems.append(f"{path} ({reason_of(error)})")
            continue
        if pixels.shape == (32, 32, 3):
            images[position] = torch.from_numpy(pixels).permute(2, 0, 1)
        else:
            problems.append(f"{path} ({pixels.shape[0]}x{pixels.shape[1]} pixels)")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{len(problems)} files are not images of 32x32 pixels: {'; '.join(problems[:5])}{more}.")
    return images
