"""Random images in the place of a data set: to try a recipe, or to measure a network without its data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from composer.utils import dist
from torch import Tensor
from torch.utils.data import Dataset

SYNTHETIC = "synthetic"  # instead of the folder of a data set

_STREAM = 32  # images
_STEP = 1_000_003  # a prime: shares no factor with the number of places in the stream


class SyntheticImages(Dataset):
    """Random images of zero mean and unit variance, the same for the same seed, with labels in turn.

    Image ``i`` is a window into one long stream of normal numbers, drawn when the first image is asked for; an image
    costs no more than the copy into its batch. Label ``i`` is ``i`` modulo the number of classes.

    Args:
        shape: Of an image, ``(C, H, W)``.
        classes: Names of the classes.
        batch_size: Images per batch on this device. There are enough images for one batch on every device.
        seed: Decides the images.
        num_images: How many there are, or more for a full batch. Default: ``256``.
    """

    def __init__(
        self, shape: tuple[int, int, int], classes: Sequence[str], *, batch_size: int, seed: int, num_images: int = 256
    ) -> None:
        self.shape, self.classes, self.seed = shape, list(classes), seed
        self.num_images = max(num_images, batch_size * dist.get_world_size())
        self._stream: Tensor | None = None

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not a position among {len(self)} images")
        size = math.prod(self.shape)
        if self._stream is None:
            self._stream = torch.randn(_STREAM * size, generator=torch.Generator().manual_seed(self.seed))
        start = index * _STEP % ((_STREAM - 1) * size)
        return self._stream[start : start + size].view(self.shape), index % len(self.classes)
