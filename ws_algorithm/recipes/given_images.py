"""Images that a user names: files, folders and patterns to files that can be read."""

from __future__ import annotations

import glob
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from ws_algorithm.recipes.image_files import reason_of, to_rgb


def find_images(names: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files by name, each once, in the order in which they are named; those of a folder or a pattern sorted.

    Args:
        names: Files; folders, of which all files with the ending of an image are meant, not those in their folders; or
            patterns such as ``"photos/*.jpg"``.

    Returns:
        The files, all of which are images that can be read, and a line for each mistake.
    """
    found: dict[Path, Path] = {}
    errors = []
    for name in names:
        try:
            paths = _files_of(name)
        except ValueError as error:
            errors.append(f"`image` (={name!r}): {error}")
            continue
        found |= {path.resolve(): path for path in paths if path.resolve() not in found}
    for path in found.values():
        try:
            read_upright(path)
        except Exception as error:  # decoders meet broken files with errors of many types
            errors.append(f"`image` (={str(path)!r}) cannot be read: {reason_of(error)}. Mend it or leave it out.")
    return list(found.values()), errors


def read_upright(path: Path) -> Image.Image:
    """Read an image of any mode in RGB, turned as its EXIF orientation says.

    Raises:
        Exception: If it cannot be read, of many types.
    """
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata
        with Image.open(file) as image:
            return to_rgb(ImageOps.exif_transpose(image))


def _files_of(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        files = sorted(child for child in path.iterdir() if child.is_file() and child.suffix.lower() in endings)
        if not files:
            raise ValueError("a folder without images.")
        return files
    if path.exists():
        return [path]
    files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
    if not files:
        raise ValueError("no file matches." if glob.has_magic(str(path)) else "there is no such file.")
    return files
