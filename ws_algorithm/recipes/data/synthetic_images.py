"""Random images of any shape."""

from __future__ import annotations

from composer.core import DataSpec

from ws_algorithm.recipes.loading import dataspec
from ws_algorithm.recipes.synthetic import SyntheticImages


def build_synthetic_images_dataspec(
    image_size: int,
    num_classes: int,
    *,
    batch_size: int,
    training: bool,
    seed: int = 0,
    in_channels: int = 3,
    num_images: int = 256,
    num_workers: int = 0,
) -> DataSpec:
    """Random images with labels in turn, the same for the same seed, in training and in evaluation.

    Args:
        image_size: Height and width, in pixels.
        num_classes: Number of classes.
        batch_size: Images per batch on this device.
        training: Whether to shuffle and to drop the last partial batch.
        seed: Decides the images and their order. Default: ``0``.
        in_channels: Channels of an image. Default: ``3``.
        num_images: Images, or more for one full batch on every device. Default: ``256``.
        num_workers: Processes that load images. Default: ``0``.

    Raises:
        ValueError: If a number is not positive.
    """
    numbers = {"image_size": image_size, "num_classes": num_classes, "in_channels": in_channels}
    for name, value in (numbers | {"num_images": num_images}).items():
        if value < 1:
            raise ValueError(f"`{name}` (={value}) must be at least 1.")
    names = [str(label) for label in range(num_classes)]
    shape = (in_channels, image_size, image_size)
    dataset = SyntheticImages(shape, names, batch_size=batch_size, seed=seed, num_images=num_images)
    return dataspec(dataset, batch_size=batch_size, training=training, seed=seed, num_workers=num_workers)
