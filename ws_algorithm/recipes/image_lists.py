"""Batches of images of different sizes: a list of images and a list of what is known of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

Batch = tuple[list[Tensor], list[dict[str, Any]]]


def collate(samples: Sequence[tuple[Tensor, dict[str, Any]]]) -> Batch:
    """Images and targets in two lists."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def split_batch(batch: Batch, size: int | float) -> list[Batch]:
    """Micro-batches of `size` images, the last one of what is left; unlike Composer's own, without a warning then."""
    images, targets = batch
    starts = range(0, len(images), int(size))
    return [(images[start : start + int(size)], targets[start : start + int(size)]) for start in starts]


def count_images(batch: Batch) -> int:
    """Images in a batch; Composer would count the channels of the first."""
    return len(batch[0])
