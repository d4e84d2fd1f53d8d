"""What is wrong in COCO annotations, entry by entry, and what is left without it."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

Entry = Mapping[str, Any]

THIN = 0.01  # pixels: a side that may be nothing once it is rounded to float32


class Mistakes:
    """Malformed entries of a file by kind: how many, and the first five."""

    def __init__(self) -> None:
        self.of_kind: dict[str, list[str]] = defaultdict(list)

    def __len__(self) -> int:
        return sum(map(len, self.of_kind.values()))

    def __str__(self) -> str:
        return "; ".join(f"{kind}: {len(names)} ({_some(names)})" for kind, names in self.of_kind.items())


def sort_out(content: Mapping[str, Any], folder: Path, *, masks: bool) -> tuple[list[Entry], list[Entry], Mistakes]:
    """Part the entries of an annotation file into good and malformed ones.

    Args:
        content: Of the file: ``images``, ``annotations`` and ``categories``.
        folder: Of the images.
        masks: Whether segmentations are looked at too.

    Returns:
        The good images; the good annotations on them; the mistakes. Annotations on a malformed image are left out and
        are no mistakes of their own.
    """
    mistakes = Mistakes()
    categories = _good(content["categories"], "category", mistakes, lambda category: None)
    has_file = _file_finder(folder)
    images = _good(content["images"], "image", mistakes, lambda image: _mistake_in_image(image, has_file))
    listed = {image.get("id") for image in content["images"]}

    def mistake_in(annotation: Entry) -> str | None:
        image = images.get(annotation["image_id"])
        if image is None:
            return None if annotation["image_id"] in listed else "annotation on an image that is not listed"
        return _mistake_in_annotation(annotation, image, categories, masks)

    annotations = _good(content["annotations"], "annotation", mistakes, mistake_in)
    return list(images.values()), [a for a in annotations.values() if a["image_id"] in images], mistakes


def _good(
    entries: list[Entry], what: str, mistakes: Mistakes, mistake_in: Callable[[Entry], str | None]
) -> dict[int, Entry]:
    """The good entries of a list by id. The first of several with one id is the good one."""
    good: dict[int, Entry] = {}
    seen = set()
    for position, entry in enumerate(entries):
        number = entry.get("id")
        if not isinstance(number, int):
            mistakes.of_kind[f"{what} whose id is no integer"].append(f"position {position}")
        elif number in seen:
            mistakes.of_kind[f"{what} with the id of another"].append(str(number))
        elif (kind := mistake_in(entry)) is not None:
            mistakes.of_kind[kind].append(str(entry.get("file_name", number)))
        else:
            good[number] = entry
        seen.add(number)
    return good


def _mistake_in_image(image: Entry, has_file: Callable[[str], bool]) -> str | None:
    name, sides = image.get("file_name"), (image.get("width"), image.get("height"))
    if not isinstance(name, str) or not all(isinstance(side, int) and side > 0 for side in sides):
        return "image without file_name, or without width and height in pixels"
    return None if has_file(name) else "missing image file"


def _mistake_in_annotation(annotation: Entry, image: Entry, categories: Collection[int], masks: bool) -> str | None:
    if annotation.get("category_id") not in categories:
        return "unknown category"
    kind = _mistake_in_box(annotation.get("bbox"), image)
    if kind is None and masks:
        kind = _mistake_in_segmentation(annotation.get("segmentation"), image)
    return kind


def _mistake_in_box(box: Any, image: Entry) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
        return "box that is no [x, y, width, height]"
    x, y, width, height = box
    if min(width, height) < THIN:
        return "box without area"
    seen_width = min(x + width, image["width"]) - max(x, 0)
    seen_height = min(y + height, image["height"]) - max(y, 0)
    return "box outside its image" if min(seen_width, seen_height) < THIN else None


def _mistake_in_segmentation(segmentation: Any, image: Entry) -> str | None:
    if isinstance(segmentation, list):
        good = segmentation and all(_is_polygon(polygon) for polygon in segmentation)
        return None if good else "polygon of fewer than three points, or of an odd count of numbers"
    if not isinstance(segmentation, dict):
        return "no segmentation"
    height, width = image["height"], image["width"]
    runs = _runs(segmentation.get("counts"))
    good = segmentation.get("size") == [height, width] and runs and min(runs) >= 0 and sum(runs) == height * width
    return None if good else "run lengths that do not fill the image"


def _is_polygon(points: Any) -> bool:
    return isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0 and _are_numbers(points)


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _runs(counts: Any) -> list[int]:
    """Run lengths, decompressed if need be; none if they are no run lengths.

    COCO's compression: groups of five bits, lowest first, as characters from ``0`` on; bit 6 says that another one
    follows, and the highest bit of the last one is the sign. From the fourth on, lengths are differences to the last
    but one.
    """
    if isinstance(counts, list):
        return counts if all(isinstance(count, int) for count in counts) else []
    runs: list[int] = []
    value = shift = 0
    for character in counts if isinstance(counts, str) else "":
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return []
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return [] if shift else runs


def _file_finder(folder: Path) -> Callable[[str], bool]:
    """Whether a file is in `folder`; each folder is listed once, which is faster than to ask for each file."""

    @cache
    def names_in(parent: str) -> set[str]:
        return set(os.listdir(parent)) if os.path.isdir(parent) else set()

    def has(name: str) -> bool:
        parent, base = os.path.split(folder / name)
        return base in names_in(parent)

    return has


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
