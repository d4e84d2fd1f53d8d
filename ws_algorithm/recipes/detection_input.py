"""Images of any size to one batch of normalized ones, and predictions back to the size of each image."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from ws_algorithm.checkpoints.sources import ImageInput

ImageFormat = Literal["rgb", "bgr255"]

_MEAN = {"rgb": [0.485, 0.456, 0.406], "bgr255": [102.9801, 115.9465, 122.7717]}
_STD = {"rgb": [0.229, 0.224, 0.225], "bgr255": [1.0, 1.0, 1.0]}


def image_input(image_format: ImageFormat) -> ImageInput:
    """What a network sees of an image in a format.

    Raises:
        ValueError: If :class:`DetectionInput` knows no such format.
    """
    if image_format not in get_args(ImageFormat):
        raise ValueError(f"`image_format` (={image_format!r}) must be 'rgb' or 'bgr255'.")
    mean, std = (tuple(values[image_format]) for values in (_MEAN, _STD))
    channels, scale = ("rgb", 1.0) if image_format == "rgb" else ("bgr", 255.0)
    return ImageInput(channels, scale, mean, std)  # pyright: ignore[reportArgumentType]


class DetectionInput(GeneralizedRCNNTransform):
    """Normalizes and resizes images and targets, and pads a batch with zeros, to the right and below.

    Args:
        min_size: What the shorter side becomes, in pixels, unless the longer one would exceed `max_size`.
        max_size: The longest that the longer side becomes.
        image_format: What the network sees of images in RGB from 0 to 1: ``"rgb"``, with ImageNet's mean and standard
            deviation; ``"bgr255"``, as Detectron: BGR from 0 to 255 with the mean 102.9801, 115.9465, 122.7717.

    Padded heights and widths are multiples of 32. A shorter side of less than a pixel, at the longest that the longer
    one becomes, is a pixel.

    Raises:
        ValueError: If `image_format` is not one of these.
    """

    def __init__(self, min_size: int, max_size: int, image_format: ImageFormat) -> None:
        seen = image_input(image_format)
        super().__init__(min_size, max_size, list(seen.mean), list(seen.std), size_divisible=32)
        self.image_format = image_format

    def normalize(self, image: Tensor) -> Tensor:
        return super().normalize(image if self.image_format == "rgb" else 255 * image.flip(0))

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        sides = image.shape[-2:]
        shrinkage = self.max_size / max(sides)
        if min(sides) * shrinkage >= 1:
            return super().resize(image, target)
        size = [max(1, int(side * shrinkage)) for side in sides]
        image = interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
        if target is None:
            return image, None
        target = target | {"boxes": resize_boxes(target["boxes"], list(sides), size)}
        if "masks" in target:
            target["masks"] = interpolate(target["masks"][:, None].float(), size=size)[:, 0].byte()
        return image, target
