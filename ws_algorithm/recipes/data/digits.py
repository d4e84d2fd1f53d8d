"""The handwritten digits of scikit-learn."""

from __future__ import annotations

from typing import Literal

import torch
from composer.core import DataSpec
from torchvision.transforms import v2

from ws_algorithm.recipes.loading import ImagesInMemory, dataspec


def build_digits_dataspec(
    split: Literal["train", "test"], *, batch_size: int, training: bool, seed: int = 0, augment: bool = True
) -> DataSpec:
    """The handwritten digits that ship with scikit-learn: 1,797 gray images of 8x8 pixels in ten classes.

    Four fifths (1,437) are for training and one fifth (360) for testing, drawn within each class, always the same.
    Pixels are scaled to zero mean and unit variance over the training images.

    Args:
        split: ``"train"`` or ``"test"``.
        batch_size: Images per batch on this device.
        training: Whether to shuffle, to drop the last partial batch and to augment.
        seed: Decides the order of shuffled images, not the split. Default: ``0``.
        augment: Whether training images are shifted by up to one pixel at random. Default: ``True``.

    Source: UCI Optical Recognition of Handwritten Digits, by way of ``sklearn.datasets.load_digits``.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    positions = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    train, chosen = torch.tensor(positions[0]), torch.tensor(positions[0 if split == "train" else 1])
    dataset = ImagesInMemory(
        images[chosen],
        torch.tensor(labels)[chosen],
        classes=[str(digit) for digit in range(10)],
        augment=v2.RandomCrop(8, padding=1) if augment and training else None,
        normalize=v2.Normalize([float(images[train].mean())], [float(images[train].std())]),
    )
    return dataspec(dataset, batch_size=batch_size, training=training, seed=seed)
