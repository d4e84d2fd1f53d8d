"""The files of a data set in COCO's layout, or what is missing of them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path

from torchvision.datasets import CocoDetection

LISTS = ("images", "annotations", "categories")


def read_coco(root: str | Path, images: str, annotations: str) -> CocoDetection:
    """Read an annotation file.

    Args:
        root: The folder of the data set.
        images: The folder of the images in it.
        annotations: The annotation file in it.

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
        with contextlib.redirect_stdout(io.StringIO()):
            source = CocoDetection(folder, str(file))
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file} cannot be read as COCO annotations ({problem}).") from error
    lacking = [name for name in LISTS if not isinstance(source.coco.dataset.get(name), list)]
    if lacking:
        raise ValueError(f"{file} has no list of {', '.join(lacking)}; COCO's format has {', '.join(LISTS)}.")
    if not source.coco.dataset["categories"]:
        raise ValueError(f"{file} has no categories.")
    return source
