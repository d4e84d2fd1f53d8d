"""The recipes that ship with the package: where they are, what they are called, what each says of itself."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import ws_algorithm

_PACKAGE = Path(ws_algorithm.__file__).parent


def shipped_folder() -> Path:
    """The folder of the shipped recipes: inside an installed package, beside it in a checkout."""
    installed = _PACKAGE / "yamls"
    return installed if installed.is_dir() else _PACKAGE.parent / "yamls"


def shipped_recipes() -> dict[str, Path]:
    """Every shipped recipe by name, such as ``quickstart`` or ``fashion_mnist/resnet20_gn_ws``."""
    folder = shipped_folder()
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def describe(path: Path) -> str:
    """The first comment line of a recipe: what it is, in one line."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip()


def name_of(path: Path) -> str:
    """What a recipe is called: the name of a shipped one, or the path of the file."""
    folder = shipped_folder().resolve()
    if path.resolve().is_relative_to(folder):
        return path.resolve().relative_to(folder).with_suffix("").as_posix()
    return str(path)


def find_recipe(name: str, folder: Path | None = None, key: str = "recipe") -> Path:
    """The file of a recipe, given as a path to a YAML file or by the name of a shipped one.

    Args:
        name: What is given.
        folder: What a path is relative to. Default: the current folder.
        key: What the error calls `name`. Default: ``"recipe"``.

    Raises:
        ValueError: If there is neither; names what is close.
    """
    folder = Path() if folder is None else folder
    path = folder / Path(name).expanduser()
    if os.path.isfile(path):
        return path
    shipped = shipped_recipes()
    plain = name.removeprefix("yamls/").removesuffix(".yaml")
    if plain in shipped and not Path(name).expanduser().is_absolute():
        return shipped[plain]
    if os.path.isdir(path):
        raise ValueError(f"`{key}` (={name!r}) is a folder; name a YAML file in it, or a shipped recipe.")
    files = sorted(file.name for file in folder.glob("*.yaml"))
    close = difflib.get_close_matches(plain, shipped, n=3, cutoff=0.5)
    close += difflib.get_close_matches(Path(name).name, files, n=1, cutoff=0.7)
    hint = f"Did you mean {' or '.join(close)}?" if close else "`ws-algorithm recipes` lists those that ship."
    raise ValueError(f"`{key}` (={name!r}) is neither a file nor the name of a shipped recipe. {hint}")
