"""Fashion-MNIST."""

from __future__ import annotations

from typing import Any, Literal

import torch
from composer.core import DataSpec
from composer.utils import dist
from torchvision import datasets
from torchvision.transforms import v2

from ws_algorithm.recipes.loading import dataspec
from ws_algorithm.recipes.synthetic import SYNTHETIC, SyntheticImages


def build_fashion_mnist_dataspec(
    split: Literal["train", "test"],
    root: str,
    *,
    batch_size: int,
    training: bool,
    seed: int = 0,
    download: bool = False,
    augment: bool = True,
    num_workers: int = 0,
) -> DataSpec:
    """Fashion-MNIST: 70,000 gray images of 28x28 pixels in ten classes of clothing, 60,000 of them for training.

    Args:
        split: ``"train"`` or ``"test"``.
        root: The folder that holds ``FashionMNIST/raw/*-ubyte``, as ``torchvision.datasets.FashionMNIST`` wants it; or
            ``"synthetic"`` for random images.
        batch_size: Images per batch on this device.
        training: Whether to shuffle, to drop the last partial batch and to augment.
        seed: Decides the order of shuffled images. Default: ``0``.
        download: Whether to download what is missing in `root`. Default: ``False``.
        augment: Whether training images are shifted by up to two pixels and flipped at random. Default: ``True``.
        num_workers: Processes that load images. Default: ``0``.

    Raises:
        ValueError: If the data are not in `root` and `download` is off, or cannot be downloaded.

    Source: Xiao et al. 2017, https://arxiv.org/abs/1708.07747.
    """
    if root == SYNTHETIC:
        dataset: Any = SyntheticImages((1, 28, 28), datasets.FashionMNIST.classes, batch_size=batch_size, seed=seed)
    else:
        normalize = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.2860], [0.3530])]
        augmentation = [v2.RandomCrop(28, padding=2), v2.RandomHorizontalFlip()] if augment and training else []
        dataset = _read(split, root, v2.Compose(augmentation + normalize), download)
    return dataspec(dataset, batch_size=batch_size, training=training, seed=seed, num_workers=num_workers)


def _read(split: str, root: str, transform: v2.Compose, download: bool) -> datasets.FashionMNIST:
    try:
        with dist.run_local_rank_zero_first():
            dataset: Any = datasets.FashionMNIST(root, train=split == "train", transform=transform, download=download)
            # A picture in RGB as one of these images
            dataset.image_input = v2.Compose([v2.Grayscale(), v2.Resize(28), v2.CenterCrop(28), transform])
            return dataset
    except RuntimeError as error:
        if download:
            raise ValueError(f"Fashion-MNIST could not be downloaded into `root` (={root!r}): {error}") from error
        raise ValueError(
            f"`root` (={root!r}) has no Fashion-MNIST: expected {root}/FashionMNIST/raw/*-ubyte. "
            "Set download=true, or root= to the folder that has it."
        ) from error
