"""Image classification data: each builder returns a ``DataSpec`` of batches ``(images, labels)``.

Images are float tensors ``(N, C, H, W)``, labels integers ``(N,)``. With ``training``, images are shuffled anew in
every epoch, the same way for the same seed, and the last partial batch is dropped; without, all are read in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from composer.core import DataSpec
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import datasets
from torchvision.transforms import v2

Split = Literal["train", "test"]


def build_digits_dataspec(
    split: Split, *, batch_size: int, training: bool, seed: int = 0, augment: bool = True
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
    transform = v2.Compose(
        [
            *([v2.RandomCrop(8, padding=1)] if augment and training else []),
            v2.Normalize([float(images[train].mean())], [float(images[train].std())]),
        ]
    )
    dataset = _ImagesInMemory(images[chosen], torch.tensor(labels)[chosen], transform)
    return DataSpec(_dataloader(dataset, training, batch_size, seed, num_workers=0))


def build_fashion_mnist_dataspec(
    split: Split,
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
        root: The folder that holds ``FashionMNIST/raw/*-ubyte``, as ``torchvision.datasets.FashionMNIST`` wants it.
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
    normalize = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.2860], [0.3530])]
    augmentation = [v2.RandomCrop(28, padding=2), v2.RandomHorizontalFlip()] if augment and training else []
    try:
        with dist.run_local_rank_zero_first():
            dataset = datasets.FashionMNIST(
                root, train=split == "train", transform=v2.Compose(augmentation + normalize), download=download
            )
    except RuntimeError as error:
        if download:
            raise ValueError(f"Fashion-MNIST could not be downloaded into `root` (={root!r}): {error}") from error
        raise ValueError(
            f"`root` (={root!r}) has no Fashion-MNIST: expected {root}/FashionMNIST/raw/*-ubyte. "
            "Set download=true, or root= to the folder that has it."
        ) from error
    return DataSpec(_dataloader(dataset, training, batch_size, seed, num_workers))


class _ImagesInMemory(Dataset):
    """Images ``(N, C, H, W)`` and labels ``(N,)`` with a transform of one image ``(C, H, W)``."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.labels[index]


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


def _dataloader(dataset: Dataset, training: bool, batch_size: int, seed: int, num_workers: int) -> DataLoader:
    sampler = _SeededSampler(dataset, training, seed)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=training,
        num_workers=num_workers,  # not persistent: they would carry their random states from epoch to epoch
        generator=sampler.generator,
        pin_memory=torch.cuda.is_available(),
    )
