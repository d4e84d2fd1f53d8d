"""Recipes written out in a test, and what is wrong with them; tables that were printed."""

from collections.abc import Sequence
from pathlib import Path

from ws_algorithm.recipes.reading import read_recipe
from ws_algorithm.recipes.schema import Recipe, RecipeError


def recipe_text(lines: Sequence[str] = (), **replaced: str) -> str:
    """A recipe without mistakes, with values of keys `replaced` (``""`` leaves a key out), and more `lines`."""
    values = {
        "model": "{name: cifar_resnet, depth: 8, num_classes: 10, in_channels: 1}",
        "train_dataloader": "{name: digits, split: train}",
        "max_duration": "1ep",
        "global_train_batch_size": "16",
        "optimizers": "{name: SGD, lr: 0.1}",
        **replaced,
    }
    return "\n".join([*(f"{key}: {value}" for key, value in values.items() if value), *lines]) + "\n"


def read(text: str, *overrides: str) -> tuple[Recipe, list[str]]:
    path = Path("recipe.yaml")
    path.write_text(text, encoding="utf-8")
    return read_recipe(path, overrides)


def mistakes(text: str, *overrides: str) -> list[str]:
    try:
        return read(text, *overrides)[1]
    except RecipeError as error:
        return error.errors


def class_rows(printed: str) -> list[tuple[str, int, float]]:
    """The table of classes in what `evaluate` printed: name, images, accuracy."""
    _, _, table = printed.partition("class  images  accuracy\n")
    rows = [line.split() for line in table.partition("\n\n")[0].splitlines()]
    return [(name, int(images), float(accuracy)) for name, images, accuracy in rows]
