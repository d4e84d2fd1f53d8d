"""COCO, and anyone's objects in COCO's layout."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from composer.core import DataSpec
from composer.utils import dist
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ws_algorithm.recipes.aspect_ratios import grouped_order, is_tall
from ws_algorithm.recipes.coco_files import read_coco
from ws_algorithm.recipes.coco_mistakes import sort_out
from ws_algorithm.recipes.image_files import ImageFiles
from ws_algorithm.recipes.image_lists import collate, count_images, split_batch
from ws_algorithm.recipes.loading import dataspec
from ws_algorithm.recipes.object_targets import object_targets
from ws_algorithm.recipes.synthetic import SYNTHETIC
from ws_algorithm.recipes.synthetic_objects import SyntheticObjects

log = logging.getLogger(__name__)


def build_coco_dataspec(
    split: str,
    root: str,
    *,
    batch_size: int,
    training: bool,
    seed: int = 0,
    masks: bool = True,
    images: str | None = None,
    annotations: str | None = None,
    flip: float = 0.5,
    group_size: int | None = None,
    malformed: Literal["error", "skip"] = "error",
    num_workers: int = 0,
    max_corrupt_share: float = 0.01,
    synthetic_image_size: int = 128,
    synthetic_num_classes: int = 80,
) -> DataSpec:
    """Images ``root/<split>2017/`` and their objects in ``root/annotations/instances_<split>2017.json``.

    A batch is a list of images ``(3, H, W)``, in RGB from 0 to 1 and as large as their files, and a list of targets;
    see :func:`~ws_algorithm.recipes.object_targets.object_targets`. The model resizes, normalizes and pads. Labels are
    1 to C in the order of category ids, whatever gaps these have; 0 is the background.

    In training, images without objects and crowds are left out, boxes are clipped to their image, and images and
    objects are flipped. In evaluation, everything is as the file has it, crowds too.

    Args:
        split: ``"train"``, ``"val"``, or whatever the names of folder and file begin with.
        root: The folder of the data set; or ``"synthetic"`` for rectangles and ellipses.
        batch_size: Images per batch on this device.
        training: Whether to shuffle, to drop the last partial batch and to augment.
        seed: Decides the order of shuffled images. Default: ``0``.
        masks: Whether targets have masks. Default: ``True``.
        images: The folder of the images, relative to `root`. Default: ``"<split>2017"``.
        annotations: The annotation file, relative to `root`. Default: ``"annotations/instances_<split>2017.json"``.
        flip: How probable it is that a training image is mirrored. Default: ``0.5``.
        group_size: How many training images that follow one another are all wide or all tall, so that they need little
            padding; 1 for any order. Default: `batch_size`.
        malformed: Whether malformed entries of the file are an ``"error"`` or are left out and counted (``"skip"``).
            Default: ``"error"``.
        num_workers: Processes that load images. Default: ``0``.
        max_corrupt_share: The share of the images that may be unreadable, or of another size than the file says.
            Default: ``0.01``.
        synthetic_image_size: Longer side of a synthetic image, in pixels. Default: ``128``.
        synthetic_num_classes: Kinds of synthetic objects. Default: ``80``.

    Raises:
        ValueError: If folder or file are missing, the file is no COCO annotations or has malformed entries, no image is
            left, or a number is out of its range; when batches are read, if too many images are unreadable.
    """
    group_size = batch_size if group_size is None else group_size
    if group_size < 1 or batch_size % group_size:
        raise ValueError(f"`group_size` (={group_size}) must divide the batch of one device, which is {batch_size}.")
    if not 0 <= flip <= 1:
        raise ValueError(f"`flip` (={flip}) must be from 0 to 1.")
    transforms = _transforms(flip if training else 0.0, clip=training)
    if root == SYNTHETIC:
        dataset: Any = SyntheticObjects(
            synthetic_image_size,
            synthetic_num_classes,
            batch_size=batch_size,
            seed=seed,
            masks=masks,
            transforms=transforms,
        )
    else:
        names = images or f"{split}2017", annotations or f"annotations/instances_{split}2017.json"
        dataset = _read_objects(root, *names, training, masks, malformed, transforms, max_corrupt_share)
    return dataspec(
        dataset,
        batch_size=batch_size,
        training=training,
        seed=seed,
        num_workers=num_workers,
        order=partial(grouped_order, is_tall(dataset.sizes), group_size),
        collate=collate,
        split_batch=split_batch,
        get_num_samples_in_batch=count_images,
    )


class CocoObjects(Dataset):
    """Images of an annotation file with their objects.

    Args:
        folder: Of the images.
        images: Their entries in the file.
        annotations: The entries of their objects, in the same order.
        categories: The entries of the categories.
        masks: Whether targets have masks.
        transforms: What is done with a PIL image and its target.
        training: Whether the next image stands for one that cannot be read, or else a black one.
        max_corrupt_share: The share of the images that may be unreadable.
    """

    def __init__(
        self,
        folder: Path,
        images: Sequence[Mapping[str, Any]],
        annotations: Sequence[Sequence[Mapping[str, Any]]],
        categories: Sequence[Mapping[str, Any]],
        *,
        masks: bool,
        transforms: Any,
        training: bool,
        max_corrupt_share: float,
    ) -> None:
        categories = sorted(categories, key=lambda category: category["id"])
        self.classes = [str(category.get("name", category["id"])) for category in categories]
        self.category_ids = [category["id"] for category in categories]
        self.num_outputs = len(categories) + 1  # with the background
        self.sizes = torch.tensor([(image["height"], image["width"]) for image in images])
        self.image_ids = torch.tensor([image["id"] for image in images])
        self.masks, self.transforms = masks, transforms
        self._label_of = {number: label for label, number in enumerate(self.category_ids, 1)}
        self._pickled = _Pickled(annotations)
        self._files = ImageFiles(
            folder,
            np.array([os.fsencode(image["file_name"]) for image in images]),
            torch.arange(len(images)),
            self.classes,
            _as_it_is,
            blank=None if training else torch.zeros(3, 1, 1),
            max_corrupt_share=max_corrupt_share,
            sizes=self.sizes,
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image, position = self._files[index]
        height, width = self.sizes[position].tolist()
        if image is self._files.blank:
            image = tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8))
        number = int(self.image_ids[position])
        known = self._pickled[int(position)]
        target = object_targets(known, number, (height, width), self._label_of, masks=self.masks)
        return self.transforms(image, target)

    def image_input(self, image: Image.Image) -> Tensor:
        """A picture in RGB as one of these images."""
        return self.transforms(image)


def _as_it_is(image: Any) -> Any:
    return image


class _Pickled:
    """Values in one array of bytes: worker processes share it, where many objects would be copied into each."""

    def __init__(self, values: Sequence[Any]) -> None:
        pickled = [pickle.dumps(value) for value in values]
        self._ends = torch.tensor([0, *accumulate(map(len, pickled))])
        self._bytes = np.frombuffer(b"".join(pickled), dtype=np.uint8)

    def __getitem__(self, position: int) -> Any:
        return pickle.loads(self._bytes[self._ends[position] : self._ends[position + 1]].tobytes())


def _read_objects(
    root: str,
    image_folder: str,
    annotation_file: str,
    training: bool,
    masks: bool,
    malformed: str,
    transforms: Any,
    max_corrupt_share: float,
) -> CocoObjects:
    folder, file = (Path(root).expanduser() / name for name in (image_folder, annotation_file))
    good, mistakes = sort_out(read_coco(root, image_folder, annotation_file), folder, masks=masks)
    if mistakes:
        message = f"{file}: malformed entries%s: {len(mistakes)}. {mistakes}."
        if malformed == "error":
            raise ValueError(f"{message % ''} Mend them, or set malformed=skip to leave them out.")
        if dist.get_global_rank() == 0:
            log.warning("%s", message % " left out")
    if not good.categories:
        raise ValueError(f"{file} has no well-formed category.")
    needed = ("bbox", "category_id", "area", *(["segmentation"] if masks else []))
    of_image: dict[int, list[Any]] = {image["id"]: [] for image in good.images}
    for annotation in good.annotations:
        crowd = int(annotation.get("iscrowd") or 0)
        if not (training and crowd):
            entry = {key: annotation[key] for key in needed if key in annotation} | {"iscrowd": crowd}
            of_image[annotation["image_id"]].append(entry)
    in_order = sorted(good.images, key=lambda image: image["id"])
    kept = [image for image in in_order if of_image[image["id"]] or not training]
    if not kept:
        raise ValueError(f"{file} has no image{' with objects other than crowds' if training else ''}.")
    return CocoObjects(
        folder,
        kept,
        [of_image[image["id"]] for image in kept],
        good.categories,
        masks=masks,
        transforms=transforms,
        training=training,
        max_corrupt_share=max_corrupt_share,
    )


def _transforms(flip: float, *, clip: bool) -> v2.Compose:
    return v2.Compose(
        [
            v2.ToImage(),
            *([v2.ClampBoundingBoxes()] if clip else []),
            *([v2.RandomHorizontalFlip(flip)] if flip else []),
            v2.ToDtype(torch.float32, scale=True),
            v2.ToPureTensor(),
        ]
    )
