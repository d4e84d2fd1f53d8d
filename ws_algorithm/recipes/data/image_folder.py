"""ImageNet, and anyone's images in a folder for each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from composer.core import DataSpec

from ws_algorithm.recipes.class_folders import find_labelled_files
from ws_algorithm.recipes.image_files import ImageFiles
from ws_algorithm.recipes.image_transforms import IMAGENET_MEAN, IMAGENET_STD, photo_transform
from ws_algorithm.recipes.loading import dataspec
from ws_algorithm.recipes.synthetic import SYNTHETIC, SyntheticImages


def build_imagenet_dataspec(
    split: Literal["train", "val"],
    root: str,
    *,
    batch_size: int,
    training: bool,
    seed: int = 0,
    image_size: int = 224,
    resize: int = 256,
    augment: bool = True,
    num_workers: int = 0,
    max_corrupt_share: float = 0.01,
    allow_empty_classes: bool = False,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> DataSpec:
    """ImageNet (ILSVRC 2012): 1,281,167 color images for training and 50,000 for validation, in 1,000 classes.

    :func:`build_image_folder_dataspec`, but that with ``root="synthetic"`` the random images are in 1,000 classes.
    """
    if root == SYNTHETIC:
        photo_transform(image_size, resize, mean, std, augment=augment and training)  # checks these arguments
        return _synthetic(1000, image_size, batch_size, training, seed, num_workers)
    return build_image_folder_dataspec(
        split,
        root,
        batch_size=batch_size,
        training=training,
        seed=seed,
        image_size=image_size,
        resize=resize,
        augment=augment,
        num_workers=num_workers,
        max_corrupt_share=max_corrupt_share,
        allow_empty_classes=allow_empty_classes,
        mean=mean,
        std=std,
    )


def build_image_folder_dataspec(
    split: str,
    root: str,
    *,
    batch_size: int,
    training: bool,
    seed: int = 0,
    image_size: int = 224,
    resize: int = 256,
    augment: bool = True,
    num_workers: int = 0,
    max_corrupt_share: float = 0.01,
    allow_empty_classes: bool = False,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> DataSpec:
    """Images in ``root/<split>/<class>/``, in RGB; labels are positions among the sorted classes of ``root/train``.

    A file that cannot be read is named in the log once. In training the next readable image takes its place; in
    evaluation it counts as a blank image under its label.

    Args:
        split: The name of a folder in `root`: ``"train"``, ``"val"``.
        root: The folder of the data set; or ``"synthetic"`` for random images in two classes.
        batch_size: Images per batch on this device.
        training: Whether to shuffle, to drop the last partial batch and to augment.
        seed: Decides the order of shuffled images. Default: ``0``.
        image_size: Height and width of an image in a batch. Default: ``224``.
        resize: Length of the shorter side before the center crop, which is made where nothing is augmented.
            Default: ``256``.
        augment: Whether training images are cropped at random sizes and places, and flipped. Default: ``True``.
        num_workers: Processes that load images. Default: ``0``.
        max_corrupt_share: The share of the split's images that may be unreadable. Default: ``0.01``.
        allow_empty_classes: Whether a class of the training split may have no image. Default: ``False``.
        mean: Of each channel, of pixels from 0 to 1. Default: ImageNet's.
        std: Of each channel. Default: ImageNet's.

    Raises:
        ValueError: If folders, classes or images are missing or do not agree, or a number is out of its range.
        DataError: When batches are read, if too many images are unreadable.
    """
    transform = photo_transform(image_size, resize, mean, std, augment=augment and training)
    if root == SYNTHETIC:
        return _synthetic(2, image_size, batch_size, training, seed, num_workers)
    files = find_labelled_files(root, split, allow_empty_classes=allow_empty_classes)
    dataset = ImageFiles(
        files.folder,
        files.names,
        files.labels,
        files.classes,
        transform,
        blank=None if training else torch.zeros(3, image_size, image_size),
        max_corrupt_share=max_corrupt_share,
    )
    return dataspec(dataset, batch_size=batch_size, training=training, seed=seed, num_workers=num_workers)


def _synthetic(num_classes: int, image_size: int, *loading: Any) -> DataSpec:
    batch_size, training, seed, num_workers = loading
    names = [str(label) for label in range(num_classes)]
    dataset = SyntheticImages((3, image_size, image_size), names, batch_size=batch_size, seed=seed)
    return dataspec(dataset, batch_size=batch_size, training=training, seed=seed, num_workers=num_workers)
