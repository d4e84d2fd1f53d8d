"""From a data set of images to a ``DataSpec``: images in memory, their seeded order, each process's part of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from composer.core import DataSpec
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class ImagesInMemory(Dataset):
    """Images ``(N, C, H, W)`` and labels ``(N,)``.

    Args:
        images: Of any type that `normalize` takes.
        labels: Integers.
        classes: Names of the classes by label.
        augment: What is done at random with each image ``(C, H, W)``, or ``None``.
        normalize: What is done with all images of a batch at once, and so fast.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: Sequence[str],
        augment: Callable[[Tensor], Tensor] | None,
        normalize: Callable[[Tensor], Tensor],
    ) -> None:
        self.images, self.labels, self.classes = images, labels, list(classes)
        self.augment, self.normalize = augment, normalize

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images = self.images[indices]
        if self.augment is not None:
            images = torch.stack([self.augment(image) for image in images])
        return self.normalize(images), self.labels[indices]


def dataspec(dataset: Any, *, batch_size: int, training: bool, seed: int, num_workers: int = 0) -> DataSpec:
    """Batches of a data set.

    Args:
        dataset: Has a length, and images and labels by position.
        batch_size: Images per batch on this device.
        training: Whether to shuffle, anew in every epoch and the same way for the same seed, and to drop the last
            partial batch. Without, all images are read in order.
        seed: Decides the order, and what worker processes draw.
        num_workers: Processes that load images. Default: ``0``.

    Raises:
        ValueError: If `num_workers` is negative.
    """
    sampler = _SeededSampler(dataset, training, seed)
    return DataSpec(
        DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=training,
            num_workers=num_workers,  # not persistent: they would carry their random states from epoch to epoch
            collate_fn=_as_it_is if hasattr(dataset, "__getitems__") else None,
            generator=sampler.generator,
            pin_memory=torch.cuda.is_available(),
        )
    )


def unreadable_line(data: DataSpec | None) -> str | None:
    """How many items of a data set could not be read so far and up to five of their names; ``None`` if all could.

    A data set that passes over what it cannot read has the names as ``unreadable``. They are gathered from all
    processes: each of them must call this.
    """
    dataset: Any = getattr(data and data.dataloader, "dataset", None)
    names: list[str] | None = getattr(dataset, "unreadable", None)
    if names is None:
        return None
    found = sorted({name for part in dist.all_gather_object(names) for name in part})
    some = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
    return f"{len(found)} of {len(dataset)} images could not be read: {some}" if found else None


def _as_it_is(batch: Any) -> tuple[Tensor, Tensor]:
    return batch


class _SeededSampler(DistributedSampler):
    """Seeds what worker processes draw from the seed and the epoch, so that a resumed epoch is augmented as it was.

    ``generator`` is that of the ``DataLoader``, from which it seeds its workers whenever it is iterated over.
    """

    def __init__(self, dataset: Dataset, training: bool, seed: int) -> None:
        ranks = dist.get_world_size()
        super().__init__(dataset, ranks, dist.get_global_rank(), shuffle=training, seed=seed, drop_last=training)
        self.generator = torch.Generator()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.generator.manual_seed((self.seed * 1_000_003 + epoch) * self.num_replicas + self.rank)
