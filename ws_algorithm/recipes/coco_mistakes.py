"""What is wrong in COCO annotations, entry by entry, and what is left without it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

Entry = Mapping[str, Any]

THIN = 0.01  # pixels: a side that may be nothing once it is rounded to float32
HUGE = 1e18  # whose square is still a number of float32
FLAT = 1e-9  # as a share of a polygon's width times height: points this near to its diagonal are on it


class GoodEntries(NamedTuple):
    """Entries of an annotation file that are well-formed."""

    images: list[Entry]
    annotations: list[Entry]
    categories: list[Entry]


class Mistakes:
    """Malformed entries of a file by kind: how many, and the first five."""

    def __init__(self) -> None:
        self.of_kind: dict[str, list[str]] = defaultdict(list)

    def __len__(self) -> int:
        return sum(map(len, self.of_kind.values()))

    def __str__(self) -> str:
        return "; ".join(f"{kind}: {len(names)} ({_some(names)})" for kind, names in self.of_kind.items())


def sort_out(content: Mapping[str, Any], folder: Path, *, masks: bool) -> tuple[GoodEntries, Mistakes]:
    """Part the entries of an annotation file into good and malformed ones.

    Args:
        content: Of the file: ``images``, ``annotations`` and ``categories``.
        folder: Of the images.
        masks: Whether segmentations are looked at too.

    Returns:
        The good entries, and the mistakes. Annotations on a malformed image are left out and are no mistakes of their
        own.
    """
    mistakes = Mistakes()
    categories = _good(content["categories"], "category", mistakes, lambda category: None)
    has_file = _file_finder(folder)
    images = _good(content["images"], "image", mistakes, lambda image: _mistake_in_image(image, has_file))
    listed = {_hashable(image.get("id")) for image in content["images"] if isinstance(image, dict)} - {None}

    def mistake_in(annotation: Entry) -> str | None:
        number = _hashable(annotation.get("image_id"))
        image = images.get(number)
        if image is None:
            return None if number in listed else "annotation on an image that is not listed"
        return _mistake_in_annotation(annotation, image, categories, masks)

    annotations = _good(content["annotations"], "annotation", mistakes, mistake_in)
    on_good_images = [a for a in annotations.values() if _hashable(a.get("image_id")) in images]
    return GoodEntries(list(images.values()), on_good_images, list(categories.values())), mistakes


def _good(
    entries: list[Any], what: str, mistakes: Mistakes, mistake_in: Callable[[Entry], str | None]
) -> dict[Any, Entry]:
    """The good entries of a list by id. The first of several with one id is the good one."""
    good: dict[Any, Entry] = {}
    seen = set()
    for position, entry in enumerate(entries):
        number = entry.get("id") if isinstance(entry, dict) else None
        if not _is_integer(number):
            mistakes.of_kind[f"{what} whose id is no integer of 64 bits"].append(f"position {position}")
            continue
        if number in seen:
            mistakes.of_kind[f"{what} with the id of another"].append(str(number))
        elif (kind := mistake_in(entry)) is not None:
            mistakes.of_kind[kind].append(str(entry.get("file_name", number)))
        else:
            good[number] = entry
        seen.add(number)
    return good


def _mistake_in_image(image: Entry, has_file: Callable[[str], bool]) -> str | None:
    name, sides = image.get("file_name"), (image.get("width"), image.get("height"))
    if not isinstance(name, str) or not all(_is_integer(side) and side > 0 for side in sides):
        return "image without file_name, or without width and height in pixels"
    return None if has_file(name) else "missing image file"


def _mistake_in_annotation(annotation: Entry, image: Entry, categories: Collection[int], masks: bool) -> str | None:
    if _hashable(annotation.get("category_id")) not in categories:
        return "unknown category"
    if annotation.get("iscrowd") not in (None, 0, 1):
        return "iscrowd that is not 0 or 1"
    area = annotation.get("area")
    if area is not None and not (_are_numbers([area]) and area >= 0):
        return "area that is no number from 0 on"
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
        return _mistake_in_polygons(segmentation, image["width"], image["height"])
    if not isinstance(segmentation, dict):
        return "no segmentation"
    height, width = image["height"], image["width"]
    runs = _runs(segmentation.get("counts"))
    good = segmentation.get("size") == [height, width] and runs and min(runs) >= 0 and sum(runs) == height * width
    if not good:
        return "run lengths that do not fill the image"
    return None if any(runs[1::2]) else "segmentation without area"


def _mistake_in_polygons(polygons: list[Any], width: int, height: int) -> str | None:
    if not polygons:
        return "empty segmentation"
    if not all(_is_polygon(polygon) for polygon in polygons):
        return "polygon of fewer than three points, or of an odd count of numbers"
    # pycocotools needs memory for every pixel of an outline, wherever it is
    if not all(_is_near(polygon[::2], width) and _is_near(polygon[1::2], height) for polygon in polygons):
        return "polygon more than a width or height outside its image"
    with_area = [polygon for polygon in polygons if _has_area(polygon[::2], polygon[1::2])]
    if not with_area:
        return "segmentation without area"
    seen = any(_reaches(polygon[::2], width) and _reaches(polygon[1::2], height) for polygon in with_area)
    return None if seen else "segmentation outside its image"


def _is_near(places: list[float], side: int) -> bool:
    return -side <= min(places) and max(places) <= 2 * side


def _reaches(places: list[float], side: int) -> bool:
    return max(places) > 0 and min(places) < side


def _has_area(xs: list[float], ys: list[float]) -> bool:
    """Whether points are not all on one line: it would be one diagonal of their bounding box."""
    left, top, width, height = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    tolerance = FLAT * width * height
    down = ((x - left) * height - (y - top) * width for x, y in zip(xs, ys, strict=True))
    up = ((x - left) * height - (top + height - y) * width for x, y in zip(xs, ys, strict=True))
    return any(abs(off) > tolerance for off in down) and any(abs(off) > tolerance for off in up)


def _is_polygon(points: Any) -> bool:
    return isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0 and _are_numbers(points)


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and abs(value) <= HUGE for value in values)


def _is_integer(value: Any) -> TypeGuard[int]:
    return type(value) is int and -(2**63) <= value < 2**63


def _hashable(value: Any) -> Any:
    """What may be looked up among ids; lists and objects are none."""
    return value if isinstance(value, Hashable) else None


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
