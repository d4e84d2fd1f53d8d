"""From a data set of images to a ``DataSpec``: images in memory, their seeded order, each process's part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from composer.core import DataSpec
from composer.utils import dist
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import v2


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

    def image_input(self, image: Image.Image) -> Tensor:
        """A picture in RGB as one of these images: its centre, resized, in gray if they are."""
        channels, height, width = self.images.shape[1:]
        gray = [v2.Grayscale()] if channels == 1 else []
        crop = [v2.Resize(max(height, width)), v2.CenterCrop((height, width)), v2.PILToTensor()]
        scale = [v2.ToDtype(torch.float32, scale=True)] if self.images.is_floating_point() else []
        return self.normalize(v2.Compose([*gray, *crop, *scale])(image))


Order = Callable[[torch.Generator], Tensor]


def dataspec(
    dataset: Any,
    *,
    batch_size: int,
    training: bool,
    seed: int,
    num_workers: int = 0,
    order: Order | None = None,
    collate: Callable[[Any], Any] | None = None,
    **batch_format: Any,
) -> DataSpec:
    """Batches of a data set.

    Args:
        dataset: Has a length, and images and labels by position.
        batch_size: Images per batch on this device.
        training: Whether to shuffle, anew in every epoch and the same way for the same seed, and to drop the last
            partial batch. Without, all images are read in order.
        seed: Decides the order, and what worker processes draw.
        num_workers: Processes that load images. Default: ``0``.
        order: Positions in the order of an epoch in training, decided by the generator. The images of a step follow one
            another in it, those of each device too, however many devices there are. Default: any order.
        collate: The samples of a batch to a batch. Default: tensors are stacked.
        batch_format: How a ``DataSpec`` splits batches and counts what is in them, if they are no tensors.

    Raises:
        ValueError: If `num_workers` is negative.
    """
    sampler = _SeededSampler(dataset, training, seed)
    if order is not None and training:
        sampler = _OrderedSampler(dataset, seed, order, batch_size)
    if collate is None and hasattr(dataset, "__getitems__"):
        collate = _as_it_is
    return DataSpec(
        DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=training,
            num_workers=num_workers,  # not persistent: they would carry their random states from epoch to epoch
            collate_fn=collate,
            generator=sampler.generator,
            pin_memory=torch.cuda.is_available(),
        ),
        **batch_format,
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


class _OrderedSampler(_SeededSampler):
    """Positions in an order of our own: each step takes the next ones, and each process its run of them."""

    def __init__(self, dataset: Dataset, seed: int, order: Order, batch_size: int) -> None:
        super().__init__(dataset, True, seed)
        self.order, self.batch_size = order, batch_size

    def __iter__(self) -> Iterator[int]:
        order = self.order(torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch))
        steps = order[: len(self) // self.batch_size * self.batch_size * self.num_replicas]
        return iter(steps.view(-1, self.num_replicas, self.batch_size)[:, self.rank].flatten().tolist())
