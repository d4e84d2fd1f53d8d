"""A tree of images with a folder for each class: which classes, which files, and what is wrong with the tree."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import torch
from composer.utils import dist
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LabelledFiles:
    """Images by position.

    Args:
        folder: What `names` are relative to.
        names: Bytes, as the file system has them: one array, which worker processes share, instead of many strings.
        labels: Positions in `classes`.
        classes: Names of the class folders, sorted.
    """

    folder: Path
    names: np.ndarray
    labels: Tensor
    classes: list[str]


_REMEDY = "Remove their folders, or set allow_empty_classes=true to keep their labels."


def find_labelled_files(
    root: str | Path, split: str, *, allow_empty_classes: bool = False, remedy: str = _REMEDY
) -> LabelledFiles:
    """Find the images in ``root/split/<class>/``, at any depth below the class folder.

    The classes are those of ``root/train`` for every split, so that labels agree; if there is no ``root/train``, they
    are the split's own. Hidden files and folders are left out, and files that are no images by their extension.

    Args:
        root: The folder of the data set.
        split: The name of a folder in it.
        allow_empty_classes: Whether a class of the training split may have no image. Default: ``False``.
        remedy: What to do about such a class, for the error. Default: what those do who have the option.

    Raises:
        ValueError: If the split, its class folders or all images are missing, a class is empty, or a class is not one
            of the training split.
    """
    root = Path(root).expanduser()
    folder = root / split
    classes = _classes_of(root, split)
    names: list[bytes] = []
    counts, others = [], list(_files_in(folder, deep=False))
    for name in _with_progress(classes, f"scanning {folder}"):
        before = len(names)
        for path in _files_in(folder / name):
            (names if _is_image(path) else others).append(path)
        counts.append(len(names) - before)
    if others:
        _warn(f"{folder}: files left out that are no images by name: {len(others)}. {_some(map(os.fsdecode, others))}.")
    if not names:
        raise ValueError(f"{folder} has no images in its class folders; files are images if they end in {_ENDINGS}.")
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    _check_empty(folder, empty, None if allow_empty_classes or split != "train" else remedy)
    start = len(os.fsencode(folder)) + 1
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return LabelledFiles(folder, np.array([name[start:] for name in names]), labels, classes)


_ENDINGS = ", ".join(IMG_EXTENSIONS)
_LAYOUT = "expected {root}/train/<class>/<image> and {root}/{split}/<class>/<image>"


def _classes_of(root: Path, split: str) -> list[str]:
    folder, train = root / split, root / "train"
    layout = _LAYOUT.format(root=root, split=split if split != "train" else "val")
    if not folder.is_dir():
        raise ValueError(f"`root` (={str(root)!r}) has no folder {split!r}: {layout}.")
    own = _class_folders(folder, layout)
    if split == "train":
        return own
    if not train.is_dir():
        _warn(f"{train} is not there: the {len(own)} classes are those of {folder}.")
        return own
    classes = _class_folders(train, layout)
    if unknown := sorted(set(own) - set(classes)):
        raise ValueError(
            f"{folder} has class folders that {train} lacks: {_some(unknown)}. Labels are positions "
            "among the classes of the training split; rename the folders, or add their images to it."
        )
    return classes


def _class_folders(folder: Path, layout: str) -> list[str]:
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        loose = f"; files directly in it: {len(entries)}" if entries else ""
        raise ValueError(f"{folder} has no class folders{loose}: {layout}.")
    return classes


def _check_empty(folder: Path, empty: list[str], remedy: str | None) -> None:
    """Refuse classes without images with a remedy, or, if there is none, warn of them."""
    if not empty:
        return
    message = f"{folder} has no images of {len(empty)} of the classes: {_some(empty)}."
    if remedy is not None:
        raise ValueError(f"{message} {remedy}")
    _warn(message)


def _files_in(folder: Path, deep: bool = True) -> Iterator[bytes]:
    """Paths in order of their names; those in hidden folders are not seen."""
    for parent, folders, files in os.walk(os.fsencode(folder), followlinks=True):
        folders[:] = sorted(name for name in folders if deep and not name.startswith(b"."))
        yield from (os.path.join(parent, name) for name in sorted(files))


def _is_image(path: bytes) -> bool:
    name = os.path.basename(path)
    return not name.startswith(b".") and os.fsdecode(name).lower().endswith(IMG_EXTENSIONS)


def _with_progress(classes: list[str], what: str) -> Iterator[str]:
    """A bar on a terminal, from the third second on."""
    quiet = True if dist.get_global_rank() != 0 else None  # None: quiet unless stderr is a terminal
    yield from tqdm(classes, desc=what, unit=" classes", delay=2, disable=quiet, leave=False)


def _warn(message: str) -> None:
    if dist.get_global_rank() == 0:
        log.warning(message)


def _some(names: Collection[str] | Iterator[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
