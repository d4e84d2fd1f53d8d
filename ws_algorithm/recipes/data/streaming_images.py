"""Images in shards of MosaicML Streaming."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from composer.core import DataSpec
from composer.utils import dist
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ws_algorithm.recipes.image_files import to_rgb
from ws_algorithm.recipes.image_transforms import IMAGENET_MEAN, IMAGENET_STD, photo_transform


def build_streaming_images_dataspec(
    local: str,
    *,
    batch_size: int,
    training: bool,
    seed: int = 0,
    remote: str | None = None,
    split: str | None = None,
    image: str = "x",
    label: str = "y",
    image_size: int = 224,
    resize: int = 256,
    augment: bool = True,
    num_workers: int = 0,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> DataSpec:
    """Images from MDS shards, on this machine or in an object store, with the transforms of ``image_folder``.

    A run that was interrupted goes on at the next sample. Over several processes a few images are read twice, so that
    all have the same number; with one process evaluation covers every image once.

    Args:
        local: The folder of the shards, or in which to keep those of `remote`.
        batch_size: Images per batch on this device.
        training: Whether to shuffle, to drop the last partial batch and to augment.
        seed: Decides the order of shuffled images. Default: ``0``.
        remote: Where to fetch shards, such as ``"s3://bucket/folder"``. Default: ``None``, they are in `local`.
        split: A folder in `local` and `remote`. Default: ``None``.
        image: The column of images: PIL's, JPEG or PNG, encoded or as bytes. Default: ``"x"``.
        label: The column of labels: integers. Default: ``"y"``.
        image_size: Height and width of an image in a batch. Default: ``224``.
        resize: Length of the shorter side before the center crop. Default: ``256``.
        augment: Whether training images are cropped at random sizes and places, and flipped. Default: ``True``.
        num_workers: Processes that load images. Default: ``0``.
        mean: Of each channel, of pixels from 0 to 1. Default: ImageNet's.
        std: Of each channel. Default: ImageNet's.

    Raises:
        ValueError: If mosaicml-streaming is not installed, the shards or their columns are not there, or a number is
            out of its range.

    Source: https://docs.mosaicml.com/projects/streaming.
    """
    transform = photo_transform(image_size, resize, mean, std, augment=augment and training)
    try:
        from streaming import StreamingDataset  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError(
            f'`streaming_images` needs mosaicml-streaming ({error}): pip install "ws-algorithm[streaming]"'
        ) from error
    try:
        dataset = StreamingDataset(
            local=local,
            remote=remote,
            split=split,
            batch_size=batch_size,
            shuffle=training,
            shuffle_seed=seed,
            # By default shards are read in 64 places at once, shuffled or not
            num_canonical_nodes=None if training else dist.get_world_size() // dist.get_local_world_size(),
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(f"`local` (={local!r}), `remote` (={remote!r}), `split` (={split!r}): {error}") from error
    _check_columns(dataset, image, label)
    return DataSpec(
        DataLoader(
            dataset,
            batch_size=batch_size,
            drop_last=training,
            num_workers=num_workers,
            collate_fn=_Collate(transform, image, label),
            pin_memory=torch.cuda.is_available(),
        )
    )


def _check_columns(dataset: Any, image: str, label: str) -> None:
    columns = dataset.shards[0].column_names
    for argument, name in (("image", image), ("label", label)):
        if name not in columns:
            raise ValueError(
                f"`{argument}` (={name!r}) is not a column of the shards, which have {', '.join(columns)}."
            )


class _Collate:
    """Samples to batches ``(images, labels)``; runs where the samples are read."""

    def __init__(self, transform: Callable[[Image.Image], Tensor], image: str, label: str) -> None:
        self.transform, self.image, self.label = transform, image, label
        self.image_input = transform  # a picture in RGB as one of these images

    def __call__(self, samples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        images = torch.stack([self.transform(to_rgb(_decoded(sample[self.image]))) for sample in samples])
        return images, torch.tensor([int(sample[self.label]) for sample in samples])


def _decoded(image: Image.Image | bytes) -> Image.Image:
    return Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
