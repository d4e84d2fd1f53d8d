"""Images read from files when they are needed, and an account of those that cannot be read."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets import VisionDataset

log = logging.getLogger(__name__)


class DataError(ValueError):
    """The data themselves are wrong, found while they are read."""

    def in_one_line(self) -> str:
        """What was said where the data were read; what comes from a worker process has a traceback around it."""
        return " ".join(str(self).rpartition("DataError: ")[2].split())


class ImageFiles(VisionDataset):
    """Images in files, in RGB. A file that cannot be read is named once in the log and then passed over.

    The account is in shared memory, so that worker processes keep one together. Each process of a distributed run
    keeps its own, of the files that it has met.

    Args:
        folder: What `names` are relative to.
        names: Bytes, as the file system has them.
        labels: Integers ``(N,)``.
        classes: Names of the classes by label.
        transform: PIL image in RGB to ``(3, H, W)``.
        blank: What stands in evaluation for an image that cannot be read, ``(3, H, W)``, under the label of that image.
            With ``None``, as in training, the next image that can be read takes its place, with its own label.
        max_corrupt_share: The share of all images that may be unreadable, from 0 to 1.
        sizes: Heights and widths ``(N, 2)`` that the images must have; one of another size counts as unreadable.
            Default: of any size.

    Raises:
        ValueError: If `max_corrupt_share` is out of its range.
        DataError: When an image is asked for, if more are unreadable, or all of them.
    """

    def __init__(
        self,
        folder: Path,
        names: np.ndarray,
        labels: Tensor,
        classes: list[str],
        transform: Callable[[Image.Image], Tensor],
        *,
        blank: Tensor | None,
        max_corrupt_share: float,
        sizes: Tensor | None = None,
    ) -> None:
        if not 0 <= max_corrupt_share <= 1:
            raise ValueError(f"`max_corrupt_share` (={max_corrupt_share}) must be from 0 to 1.")
        super().__init__(folder, transform=transform)
        self.names, self.labels, self.classes = names, labels, classes
        self.blank, self.max_corrupt_share, self.sizes = blank, max_corrupt_share, sizes
        self.is_corrupt = torch.zeros(len(names), dtype=torch.bool).share_memory_()
        self._last_reason = ""  # of those that this process has met

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not a position among {len(self)} images")
        positions = [index] if self.blank is not None else chain(range(index, len(self)), range(index))
        for position in positions:
            image = self._read(position)
            if image is not None:
                return self.transform(image), self.labels[position]  # pyright: ignore[reportOptionalCall]
        if self.blank is None:
            raise DataError(
                f"None of the {len(self)} images in {self.root} can be read: {self._corrupt_names()}."
                f"{self._last_reason}"
            )
        return self.blank, self.labels[index]

    def image_input(self, image: Image.Image) -> Any:
        """A picture in RGB as it would come from one of these files."""
        return self.transform(image)  # pyright: ignore[reportOptionalCall]

    @property
    def unreadable(self) -> list[str]:
        """Names of the files that could not be read so far, relative to the folder, in the order of their positions."""
        return [os.path.relpath(self.path(i), self.root) for i in self.is_corrupt.nonzero().flatten().tolist()]

    def path(self, position: int) -> str:
        return os.path.join(self.root, os.fsdecode(bytes(self.names[position])))

    def _read(self, position: int) -> Image.Image | None:
        if not self.is_corrupt[position]:
            try:
                image = read_rgb(self.path(position))
                if self.sizes is not None:
                    _check_size(image, self.sizes[position])
                return image
            except Exception as error:  # decoders meet broken files with errors of many types
                self.is_corrupt[position] = True
                instead = "the next image takes its place" if self.blank is None else "it counts as a blank image"
                reason = reason_of(error)
                log.warning("%s cannot be read (%s); %s.", self.path(position), reason, instead)
                if self.sizes is not None:  # it may be whole, and of another size
                    self._last_reason = f" The last: {os.path.relpath(self.path(position), self.root)}, {reason}."
        self._check_share()
        return None

    def _check_share(self) -> None:
        count = int(self.is_corrupt.sum())
        if count > self.max_corrupt_share * len(self):
            raise DataError(
                f"{count} of {len(self)} images in {self.root} cannot be read ({100 * count / len(self):.3g} %), more "
                f"than `max_corrupt_share` (={self.max_corrupt_share}) allows: {self._corrupt_names()}."
                f"{self._last_reason} Mend or remove them, or raise max_corrupt_share."
            )

    def _corrupt_names(self) -> str:
        names = self.unreadable
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_rgb(path: str | Path) -> Image.Image:
    """Read and decode a whole image, as it is stored: EXIF orientation is not applied, as torchvision does not either.

    Raises:
        Exception: If the file is missing, no image, cut off, broken, or a decompression bomb by PIL's measure.
    """
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata, which are not used
        with Image.open(file) as image:
            return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB; of 16 bits the upper eight are kept, transparency is dropped.

    Raises:
        ValueError: If pixels are floating-point numbers other than from 0 to 255, or up to 1 alone and not all 0.
    """
    if image.mode == "F":
        _check_floats(np.asarray(image))
    if image.mode.startswith("I"):  # PIL would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _check_floats(pixels: np.ndarray) -> None:
    """Refuse what would come out black or white."""
    low, high = float(pixels.min()), float(pixels.max())
    if not (low == high == 0 or (0 <= low and 1 < high <= 255)):
        raise ValueError(f"floating-point pixels from {low:.3g} to {high:.3g} instead of 0 to 255")


def _check_size(image: Image.Image, size: Tensor) -> None:
    height, width = size.tolist()
    if image.size != (width, height):
        raise ValueError(f"{image.width}x{image.height} pixels instead of the {width}x{height} that are stated")


def reason_of(error: Exception) -> str:
    """Why a file could not be read, in the words of its error unless they tell less than ours."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or a broken one"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
