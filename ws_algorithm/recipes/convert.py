"""Convert: a file of published weights in; one that recipes load, and a recipe's blocks for it, out."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ws_algorithm.checkpoints.conversion import ConvertedCheckpoint, convert_checkpoint
from ws_algorithm.checkpoints.reading import PublishedFile, read_published
from ws_algorithm.checkpoints.sources import IMAGENET
from ws_algorithm.checkpoints.targets import MODELS
from ws_algorithm.formula import Formula
from ws_algorithm.recipes.origins import mean_and_std
from ws_algorithm.recipes.pretrained import input_difference
from ws_algorithm.recipes.schema import RecipeError

log = logging.getLogger(__name__)

LIBRARIES = ("torchvision", "timm")
_NETWORK = "module"  # what the model of a recipe calls its network
# The builder that a recipe names for each kind of model
BUILDERS = {"classifier": "imagenet_resnet", "faster_rcnn": "faster_rcnn", "mask_rcnn": "mask_rcnn"}


def convert(
    checkpoint: str,
    output: str,
    *,
    to: str,
    model: str,
    source: str | None = None,
    formula: str | None = None,
    overwrite: bool = False,
) -> ConvertedCheckpoint:
    """Convert a file of published weights, write it and its recipe, and print what it is.

    `output` is written by ``torch.save``: ``{"state_dict": ..., "ws_algorithm": {"source", "model", "formula",
    "image_input", "options", "include"}}``, in plain values that ``weights_only=True`` reads. Beside it, with the
    suffix ``.yaml``, is a recipe to be used as a ``base``: the model with these weights and the options that they were
    trained with, ``WeightStandardization`` by their formula, and for a classifier the mean and standard deviation of
    the data where they are not ImageNet's. Networks that no recipe builds get none. Files appear
    whole or not at all.

    Args:
        checkpoint: The published file; see :func:`~ws_algorithm.checkpoints.reading.read_checkpoint`.
        output: The file to write.
        to: The library whose names the weights get: ``"torchvision"``, or ``"timm"`` for ``resnetv2_*_bit``.
        model: The model that the weights are for; see :func:`~ws_algorithm.checkpoints.conversion.convert_checkpoint`.
        source: Where the weights are from. Default: ``None``, by their names.
        formula: What they were trained with, a name in ``FORMULAS`` or ``"none"``, where it is not that of the source.
            Default: ``None``, that of the source.
        overwrite: Whether files that are there may be replaced. Default: ``False``.

    Returns:
        What was written.

    Raises:
        RecipeError: If an argument is wrong, the file is refused or does not fit the model, the config in it has no
            Weight Standardization and `formula` is not given, or nothing can be written.
    """
    place = Path(output).expanduser()
    recipe = place.with_suffix(".yaml")
    mistakes = [
        *_mistakes_in_target(to, model),
        *_mistakes_in_output(place, model, Path(checkpoint).expanduser(), overwrite),
    ]
    if mistakes:
        raise RecipeError("ws-algorithm convert", mistakes)
    try:
        read = read_published(Path(checkpoint).expanduser())
        converted = convert_checkpoint(read.weights, source, model=model, formula=formula)
        if formula is None:
            _check_formula(converted, read, checkpoint)
        blocks = recipe_of(converted, place)
        writers: dict[Path, Callable[[Path], object]] = {place: lambda path: torch.save(content_of(converted), path)}
        if blocks is not None:
            text = f"{_header(converted, checkpoint)}\n{OmegaConf.to_yaml(OmegaConf.create(blocks))}"
            writers[recipe] = lambda path: path.write_text(text, encoding="utf-8")
        _write_whole(writers)
    except (ValueError, OSError) as error:
        raise RecipeError("ws-algorithm convert", [str(error)]) from error
    _print(converted, list(writers))
    return converted


def content_of(converted: ConvertedCheckpoint) -> dict[str, Any]:
    """What the file holds: tensors, strings, numbers, lists and dictionaries."""
    formula, image_input = converted.formula, dataclasses.asdict(converted.image_input)
    about = {
        "source": converted.source,
        "model": converted.model,
        "formula": dataclasses.asdict(formula) if isinstance(formula, Formula) else formula,
        "image_input": {name: list(v) if isinstance(v, tuple) else v for name, v in image_input.items()},
        "options": converted.options,
        "include": None if converted.include is None else list(converted.include),
    }
    return {"state_dict": converted.state_dict, "ws_algorithm": about}


def recipe_of(converted: ConvertedCheckpoint, place: Path) -> dict[str, Any] | None:
    """The blocks of a recipe for the converted weights, ``None`` if no recipe builds their model."""
    kind, arch = MODELS[converted.model]
    if kind not in BUILDERS:
        return None
    model: dict[str, Any] = {"name": BUILDERS[kind], "arch": arch, **converted.options}
    if kind == "classifier" and "fc.weight" not in converted.state_dict:
        model = {"arch": arch, "norm": converted.options["norm"]}  # a backbone, of whatever model a recipe names
    blocks: dict[str, Any] = {"model": {**model, "pretrained": str(place.resolve())}}
    if converted.formula is not None:
        which: dict[str, Any] = {"layers": "normalized"}
        if converted.include is not None:
            which = {"layers": "all", "include": [f"{_NETWORK}.{name}" for name in converted.include]}
        blocks["algorithms"] = {"WeightStandardization": {**which, "formula": converted.formula}}
    if model.get("name") == BUILDERS["classifier"] and input_difference(converted.image_input, IMAGENET) is not None:
        mean, std = mean_and_std(converted.image_input)
        blocks |= {key: {"mean": mean, "std": std} for key in ("train_dataloader", "eval_dataloader")}
    return blocks


def _check_formula(converted: ConvertedCheckpoint, read: PublishedFile, checkpoint: str) -> None:
    """Refuse the formula of a source that its file contradicts, and warn of one that is only likely."""
    if converted.formula is not None and read.config is not None and "ConvWS" not in read.config:
        raise ValueError(
            f"`--formula` must be given: {converted.source!r} is trained with {converted.formula!r}, and the config in "
            f"{checkpoint} has no ConvWS. Give `--formula none` if the weights were trained without standardization, "
            f"`--formula {converted.formula}` if with it."
        )
    if converted.source == "composer" and not read.of_trainer:
        log.warning(
            "Formula 'composer' is assumed: %s does not say which it is, and networks of this package have the same "
            "names under other formulas. Give `--formula` if it was another.",
            checkpoint,
        )


def _mistakes_in_target(to: str, model: str) -> Sequence[str]:
    if to not in LIBRARIES:
        return [f"`--to` (={to!r}) must be one of {', '.join(LIBRARIES)}."]
    if model not in MODELS:
        return [f"`--model` (={model!r}) must be one of {', '.join(MODELS)}."]
    library = "timm" if MODELS[model][0] == "bit" else "torchvision"
    return [] if to == library else [f"`--to` (={to!r}) must be {library!r}, which `--model` {model!r} is of."]


def _mistakes_in_output(place: Path, model: str, checkpoint: Path, overwrite: bool) -> Sequence[str]:
    given = f"`OUT` (={str(place)!r})"
    recipe = place.with_suffix(".yaml")
    if place == recipe:
        return [f"{given} is the name of its recipe; name the weights, such as {place.with_suffix('.pth')}."]
    if not place.parent.is_dir():
        return [f"{given}: there is no folder {place.parent}."]
    if place.exists() and checkpoint.exists() and place.samefile(checkpoint):
        return [f"{given} is the file that is to be converted; name another."]
    has_recipe = model in MODELS and MODELS[model][0] in BUILDERS
    there = [path for path in ((place, recipe) if has_recipe else (place,)) if path.exists()]
    if any(path.is_dir() for path in there):
        return [f"{given}: {next(path for path in there if path.is_dir())} is a folder."]
    if there and not overwrite:
        return [f"{given}: {' and '.join(map(str, there))} would be replaced. Give `--overwrite` if that is meant."]
    return []


def _write_whole(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files under other names, and give them their own once all are whole."""
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in writers}
    try:
        for path, write in writers.items():
            write(parts[path])
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _header(converted: ConvertedCheckpoint, checkpoint: str) -> str:
    return (
        f"# {converted.model} with converted weights of {converted.source}, from {Path(checkpoint).name}\n#\n"
        "# Written by `ws-algorithm convert`, to be the last base of a recipe. Weights, formula and options belong\n"
        "# together: with others the network computes something else than what was published.\n"
    )


def _print(converted: ConvertedCheckpoint, written: Sequence[Path]) -> None:
    seen = converted.image_input
    scaled = "0 to 1" if seen.scale == 1 else f"0 to {seen.scale:g}"
    lines = {
        "source": converted.source,
        "model": converted.model,
        "formula": converted.formula or "none: the network is not standardized",
        "images": f"{seen.channels.upper()} from {scaled}, mean {list(seen.mean)}, std {list(seen.std)}",
        "tensors": len(converted.state_dict),
        "weights": written[0],
        "recipe": written[1] if len(written) > 1 else "none: no recipe builds this model",
    }
    for name, value in lines.items():
        print(f"{name:8} {value}")
