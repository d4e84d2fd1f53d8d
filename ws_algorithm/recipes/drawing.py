"""What was predicted on an image, drawn on it."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_LEAST_SIDE = 640  # pixels of the longer side: smaller images are enlarged, so that text is readable on them
_OPACITY = 0.4  # of masks
_TURN = 0.618033988749895  # the golden ratio: hues that follow one another differ

Colour = tuple[int, int, int]


def enlarged(image: Image.Image) -> Image.Image:
    """A small image a whole number of times as large, so that the longer side has 640 pixels or more."""
    factor = -(-_LEAST_SIDE // max(image.size))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.BICUBIC)


def draw_objects(image: Image.Image, boxes: Tensor, texts: Sequence[str], masks: Tensor | None = None) -> Image.Image:
    """Objects on an image, a colour each: masks and their contours, boxes, and texts on a ground of that colour.

    Boxes have a dark line around the coloured one, so that they are seen on any image. Masks lie under all boxes, boxes
    under all texts, and of two objects the first lies on top. A text is above its box where it has room there and hides
    no text before it, else at another corner.

    Args:
        image: In RGB.
        boxes: Corners ``(N, 4)``, in pixels of `image`.
        texts: Of each object, in ASCII or what PIL's own font has.
        masks: ``(N, H, W)`` of bools.

    Returns:
        A new image, enlarged as by :func:`enlarged`.
    """
    canvas = enlarged(image.convert("RGB"))
    factor = canvas.width // image.width
    colours = [_colour(number) for number in range(len(texts))]
    if masks is not None:
        canvas = _with_masks(canvas, masks.cpu().numpy(), colours, factor)
    draw = ImageDraw.Draw(canvas)
    width = max(2, max(canvas.size) // 400)
    places = [_pixels(box, factor, canvas.size) for box in boxes.tolist()]
    for place, colour in reversed(list(zip(places, colours, strict=True))):
        draw.rectangle(place, outline=(0, 0, 0), width=width + 1)
        draw.rectangle(place, outline=colour, width=width)
    _write_texts(draw, canvas.size, places, texts, colours)
    return canvas


def _pixels(box: Sequence[float], factor: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The first and last columns and rows in a box."""
    left, top, right, bottom = (round(factor * side) for side in box)
    left, top = min(max(left, 0), size[0] - 1), min(max(top, 0), size[1] - 1)
    return left, top, max(left, min(right, size[0]) - 1), max(top, min(bottom, size[1]) - 1)


def _colour(number: int) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(number * _TURN % 1, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _with_masks(canvas: Image.Image, masks: np.ndarray, colours: Sequence[Colour], factor: int) -> Image.Image:
    pixels = np.asarray(canvas, dtype=np.float32).copy()
    for small, colour in reversed(list(zip(masks, colours, strict=True))):
        mask = small.repeat(factor, axis=0).repeat(factor, axis=1)
        pixels[mask] += _OPACITY * (np.array(colour, dtype=np.float32) - pixels[mask])
        pixels[mask & ~_eroded(mask)] = colour
    return Image.fromarray(pixels.round().astype(np.uint8))


def _eroded(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask whose four neighbours are in it too; beyond the image is in it."""
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return inner


def _write_texts(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    places: Sequence[tuple[int, int, int, int]],
    texts: Sequence[str],
    colours: Sequence[Colour],
) -> None:
    font = ImageFont.load_default(max(11, max(size) // 60))
    grounds: list[tuple[float, float, float, float]] = []
    for place, text in zip(places, texts, strict=True):
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        grounds.append(_ground(place, (right - left + 4, bottom - top + 4), size, grounds))
    for ground, text, colour in reversed(list(zip(grounds, texts, colours, strict=True))):
        draw.rectangle(ground, fill=colour)
        left, top, _, _ = draw.textbbox((0, 0), text, font=font)
        ink = (0, 0, 0) if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 127 else (255, 255, 255)
        draw.text((ground[0] + 2 - left, ground[1] + 2 - top), text, fill=ink, font=font)


def _ground(
    place: tuple[int, int, int, int],
    extent: tuple[float, float],
    size: tuple[int, int],
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """Where a text goes: above its box, below it or in it, the first of these that is free, within the image."""
    (left, top, right, bottom), (width, height) = place, extent
    corners = [(left, top - height), (left, bottom + 1), (right - width, top - height), (right - width, bottom + 1)]
    corners += [(left, top), (left, bottom - height), (left, (top + bottom - height) / 2)]
    grounds = []
    for x, y in corners:
        x, y = max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))
        grounds.append((x, y, x + width - 1, y + height - 1))
    free = (ground for ground in grounds if not any(_overlap(ground, other) for other in taken))
    return next(free, grounds[0])


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]
