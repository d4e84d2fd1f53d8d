"""Random pictures of rectangles and ellipses with their boxes and masks, to try a detector without its data."""

from __future__ import annotations

import colorsys
from typing import Any

import torch
from composer.utils import dist
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

_MOST = 4  # objects in an image


class SyntheticObjects(Dataset):
    """Rectangles and ellipses before a gray background with noise, the same for the same seed.

    Even labels are rectangles and odd ones ellipses; the colour tells the label too. Later objects hide earlier ones:
    masks are what is seen, boxes are the extent of the masks, and an object of which nothing is seen is left out.
    Every second image is wide and the others tall, by 4 to 3.

    Args:
        image_size: Length of the longer side in pixels.
        num_classes: How many kinds of objects there are.
        batch_size: Images per batch on this device. There are enough images for one batch on every device.
        seed: Decides the images.
        masks: Whether targets have masks.
        transforms: What is done with an image ``(3, H, W)`` of bytes and its target.
        num_images: How many there are, or more for a full batch. Default: ``256``.

    Raises:
        ValueError: If `image_size` or `num_classes` is too small.
    """

    def __init__(
        self,
        image_size: int,
        num_classes: int,
        *,
        batch_size: int,
        seed: int,
        masks: bool,
        transforms: Any,
        num_images: int = 256,
    ) -> None:
        if image_size < 16:
            raise ValueError(f"`synthetic_image_size` (={image_size}) must be at least 16 pixels.")
        if num_classes < 1:
            raise ValueError(f"`synthetic_num_classes` (={num_classes}) must be at least 1.")
        self.long, self.short, self.seed, self.masks, self.transforms = (
            image_size,
            image_size * 3 // 4,
            seed,
            masks,
            transforms,
        )
        self.classes = [_name(label) for label in range(1, num_classes + 1)]
        self.category_ids = list(range(1, num_classes + 1))
        self.num_outputs = num_classes + 1
        self.num_classes_argument = "synthetic_num_classes"
        positions = torch.arange(max(num_images, batch_size * dist.get_world_size()))
        wide, tall = torch.tensor([self.short, self.long]), torch.tensor([self.long, self.short])
        self.sizes = torch.where(positions[:, None] % 2 == 0, wide, tall)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not a position among {len(self)} images")
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        height, width = self.sizes[index].tolist()
        image = torch.randint(64, 128, (1, height, width), generator=generator).expand(3, -1, -1).clone()
        owner = torch.zeros(height, width, dtype=torch.int64)
        count = int(torch.randint(1, _MOST + 1, (), generator=generator))
        labels = torch.randint(1, len(self.classes) + 1, (count,), generator=generator)
        for number, label in enumerate(labels.tolist(), 1):
            shape = _shape(label % 2 == 1, height, width, generator)
            owner[shape] = number
            image[:, shape] = self._colour(label)[:, None]
        seen = [number for number in range(1, count + 1) if (owner == number).any()]
        masks = torch.stack([owner == number for number in seen])
        target = self._target(index, masks, labels[[number - 1 for number in seen]])
        return self.transforms(tv_tensors.Image(image.to(torch.uint8)), target)

    def image_input(self, image: Image.Image) -> Tensor:
        """A picture in RGB as one of these images."""
        return self.transforms(image)

    def _target(self, index: int, masks: Tensor, labels: Tensor) -> dict[str, Any]:
        corners = [(xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) for ys, xs in (m.nonzero().T for m in masks)]
        boxes = torch.tensor(corners, dtype=torch.float32)
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(masks.shape[1:])),  # pyright: ignore
            "labels": labels,
            "image_id": index,
            "area": masks.flatten(1).sum(1).float(),
            "iscrowd": torch.zeros_like(labels),
        }
        return target | ({"masks": tv_tensors.Mask(masks.to(torch.uint8))} if self.masks else {})

    def _colour(self, label: int) -> Tensor:
        hue = (label - 1) / len(self.classes)
        return torch.tensor(colorsys.hsv_to_rgb(hue, 1.0, 1.0)).mul(255).long()


def _name(label: int) -> str:
    return f"{'ellipse' if label % 2 else 'rectangle'} {label}"


def _shape(is_ellipse: bool, height: int, width: int, generator: torch.Generator) -> Tensor:
    """The pixels ``(H, W)`` of a shape of a sixth to half of each side, whole within the image."""
    sides = torch.tensor([height, width])
    extent = (sides * (1 / 6 + torch.rand(2, generator=generator) / 3)).long()
    start = ((sides - extent + 1) * torch.rand(2, generator=generator)).long()
    ys, xs = torch.arange(height)[:, None], torch.arange(width)[None, :]
    if not is_ellipse:
        (top, left), (bottom, right) = start, start + extent
        return (ys >= top) & (ys < bottom) & (xs >= left) & (xs < right)
    middle = start + (extent - 1) / 2
    return ((ys - middle[0]) / (extent[0] / 2)) ** 2 + ((xs - middle[1]) / (extent[1] / 2)) ** 2 <= 1
