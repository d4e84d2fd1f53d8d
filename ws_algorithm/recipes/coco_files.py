"""The files of a data set in COCO's layout, or what is missing of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

LISTS = ("images", "annotations", "categories")


def read_coco(root: str | Path, images: str, annotations: str) -> dict[str, Any]:
    """Read an annotation file.

    Args:
        root: The folder of the data set.
        images: The folder of the images in it.
        annotations: The annotation file in it.

    Returns:
        Its content, in which ``images``, ``annotations`` and ``categories`` are lists. Their entries may be anything.

    Raises:
        ValueError: If pycocotools, the folder or the file is missing, or the file is no COCO annotations.
    """
    if importlib.util.find_spec("pycocotools") is None:
        raise ValueError('annotations in COCO\'s format need pycocotools: pip install "ws-algorithm[detection]".')
    root = Path(root).expanduser()
    folder, file = root / images, root / annotations
    missing = [f"folder {images}" * (not folder.is_dir()), f"file {annotations}" * (not file.is_file())]
    if any(missing):
        raise ValueError(
            f"`root` (={str(root)!r}) has no {' and no '.join(filter(None, missing))}: "
            f"expected {folder}/<image> and {file}."
        )
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as COCO annotations ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} cannot be read as COCO annotations (it is no object with {', '.join(LISTS)}).")
    lacking = [name for name in LISTS if not isinstance(content.get(name), list)]
    if lacking:
        raise ValueError(f"{file} has no list of {', '.join(lacking)}; COCO's format has {', '.join(LISTS)}.")
    if not content["categories"]:
        raise ValueError(f"{file} has no categories.")
    return content
