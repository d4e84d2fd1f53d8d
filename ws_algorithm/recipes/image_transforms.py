"""What is done with photographs before they are a batch: crops, flips, normalization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchvision.transforms import v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def photo_transform(
    image_size: int, resize: int, mean: Sequence[float], std: Sequence[float], *, augment: bool
) -> v2.Compose:
    """The usual transform of ImageNet: a PIL image in RGB to ``(3, image_size, image_size)``, with antialiasing.

    Args:
        image_size: Height and width of the result, in pixels.
        resize: Length of the shorter side before the center crop, in pixels.
        mean: Of each channel, of pixels from 0 to 1.
        std: Of each channel.
        augment: A crop of random size and place, and a horizontal flip of every other image; else a center crop.

    Raises:
        ValueError: If a number is out of its range.
    """
    if image_size < 1:
        raise ValueError(f"`image_size` (={image_size}) must be at least 1.")
    if resize < image_size and not augment:
        raise ValueError(
            f"`resize` (={resize}) must be at least `image_size` (={image_size}), which is cropped from it."
        )
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, Sequence) or len(values) != 3 or not all(_is_number(value) for value in values):
            raise ValueError(f"`{name}` (={values!r}) must be three numbers, one for each channel.")
    if min(std) <= 0:
        raise ValueError(f"`std` (={list(std)}) must be positive.")
    crops = [v2.Resize(resize), v2.CenterCrop(image_size)]
    if augment:
        crops = [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip()]
    return v2.Compose(
        [*crops, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
