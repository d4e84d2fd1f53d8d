"""Export: a finished run, or a recipe and a checkpoint, in; a file of its network, folded, for others out."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import DataSpec
from composer.utils import dist
from torch import Tensor, nn

from ws_algorithm.folding import folded_copy
from ws_algorithm.functional import is_weight_standardized
from ws_algorithm.recipes import build, run_folder
from ws_algorithm.recipes.artifacts import (
    FORMATS,
    GraphFormat,
    WeightsFormat,
    check_installed,
    largest_difference,
    loaded_into_a_copy,
)
from ws_algorithm.recipes.closing import close_trainer
from ws_algorithm.recipes.image_files import DataError
from ws_algorithm.recipes.loaded_run import (
    TrainedRecipe,
    begin_processes,
    checkpoint_of,
    evaluation_scope,
    evaluation_weights,
    find_trained,
    load_trained,
)
from ws_algorithm.recipes.schema import RecipeError, in_one_line
from ws_algorithm.rescaling import Rescaler
from ws_algorithm.state_dicts import plain_state_dict

TOLERANCE = 1e-5
MAX_IMAGES = 4
RAW_WEIGHT = "parametrizations.weight.original"

Inputs = Tensor | list[Tensor]


def export(
    source: str,
    overrides: Sequence[str] = (),
    *,
    file_format: str,
    output: str | None = None,
    plain: bool = False,
) -> Path:
    """Write the network of a checkpoint, its standardization folded, into a file that needs nothing of this package.

    Before the file gets its name it is read again, and what it computes for the first images of the evaluation data is
    compared with what the trained, not folded network computes, on the CPU in the precision of its weights. The
    checkpoint is that which ``evaluate`` takes; with EMA or SWA the weights are those that it evaluates.

    Args:
        source: The folder of a run; or a recipe, with the checkpoint as ``load_path``.
        overrides: ``key=value`` lines.
        file_format: ``state_dict`` (``torch.save``) or ``safetensors``: the weights by the names that the network of
            the recipe has; ``onnx``, ``torch_export`` or ``torchscript``: the network itself, for any number of images.
        output: The new file. Default: ``exported`` with the format's suffix in the folder of the run, where it replaces
            that of an earlier export.
        plain: Whether to write raw weights instead of folded ones, for training to go on elsewhere; not for formats of
            the network itself. Default: ``False``.

    Returns:
        The file.

    Raises:
        RecipeError: If the recipe has mistakes, no evaluation data or no checkpoint, the format needs a package that is
            not installed or is not possible for the network, `output` cannot be written, `plain` is asked of weights
            with gain and shift, or the outputs differ by more than ``1e-5`` of the largest and more than four times
            what rounding changes: the difference between the trained network and itself in double precision. Nothing
            has been written then.
    """
    trained = find_trained(source, overrides)
    begin_processes(trained.recipe)
    path, errors = _place_of(trained, file_format, output, plain)
    if trained.recipe.eval_dataloader is None:
        errors.append("`eval_dataloader`: missing; its first images are needed to compare outputs.")
    checkpoint = checkpoint_of(trained, "export", errors)
    assert path is not None, "without a place there is an error"
    data = build.build_data(trained.source, trained.recipe, "eval_dataloader", training=False)
    assert data is not None
    inputs = _first_inputs(trained, data)
    if isinstance(inputs, list) and isinstance(FORMATS[file_format], GraphFormat):
        raise _refusal(
            trained,
            f"`--format` (={file_format!r}): this network takes lists of images of any size, and what it finds depends "
            "on them; such a network can be exported as state_dict or safetensors.",
        )
    with build.cpu_threads(trained.recipe), torch.no_grad():
        trainer, model = _load(trained, checkpoint)
        network = _evaluated_network(trainer, model, data)
        close_trainer(trainer)
        if plain and any(isinstance(part, Rescaler) for part in network.modules()):
            raise _refusal(
                trained,
                "`--plain`: the weights of this network have gain and shift (formula affine or scaled), without which "
                "the raw weights are another network. Leave `--plain` out to write the weights that it computes with.",
            )
        with evaluation_scope(network):
            difference = _write_checked(trained, network, inputs, file_format, path, plain)
    _report(file_format, path, inputs, difference, checkpoint)
    return path


def _place_of(
    trained: TrainedRecipe, file_format: str, output: str | None, plain: bool
) -> tuple[Path | None, list[str]]:
    """Where the file goes, if that is possible, and every mistake in what was asked for."""
    if file_format not in FORMATS:
        return None, [f"`--format` (={file_format!r}) must be one of {', '.join(FORMATS)}."]
    chosen, errors = FORMATS[file_format], []
    if plain and isinstance(chosen, GraphFormat):
        errors.append(f"`--plain`: {file_format} is the network itself, folded. Use state_dict or safetensors.")
    if dist.get_world_size() > 1:
        errors.append("one process writes the file: start one.")
    try:
        check_installed(file_format)
    except ValueError as error:
        errors.append(f"`--format` (={file_format!r}): {error}")
    if output is not None:
        path = Path(output).expanduser()
        if path.exists():
            errors.append(f"`--output` (={output!r}): is there already. Name another file, or remove it first.")
    elif trained.folder is not None:
        path = trained.folder / f"{run_folder.EXPORTED}{'.raw' if plain else ''}{chosen.suffix}"
    else:
        return None, [*errors, "`--output`: missing. Name the file to write; a recipe has no folder for it."]
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        errors.append(f"`--output` (={str(path)!r}): its folder is not there or cannot be written to.")
    return path, errors


def _first_inputs(trained: TrainedRecipe, data: DataSpec) -> Inputs:
    """The first images, two or more of a tensor: exporters take a batch of one for a rule."""
    try:
        batch: Any = next(iter(data.dataloader))
    except DataError as error:
        raise _refusal(trained, error.in_one_line()) from error
    images = batch[0]
    if not isinstance(images, Tensor):
        return [image.cpu() for image in images][:MAX_IMAGES]
    images = images[:MAX_IMAGES].cpu()
    return torch.cat([images, images]) if len(images) == 1 else images


def _load(trained: TrainedRecipe, checkpoint: str) -> tuple[Trainer, Any]:
    try:
        return load_trained(trained, checkpoint)
    except RecipeError as error:
        if "WeightStandardization" in (trained.recipe.algorithms or {}) or f".{RAW_WEIGHT}" not in str(error):
            raise
        raise _refusal(
            trained,
            f"`algorithms` (={json.dumps(trained.recipe.algorithms)}): without WeightStandardization, with which the "
            f"checkpoint {checkpoint!r} was trained. Leave `algorithms` as the recipe of the run has it.",
        ) from error


def _evaluated_network(trainer: Trainer, model: Any, data: DataSpec) -> nn.Module:
    """A copy of the network on the CPU, with the weights that algorithms such as EMA keep for evaluations."""
    with evaluation_weights(trainer, data, "export"):
        return copy.deepcopy(model.module).cpu().eval()


def _write_checked(
    trained: TrainedRecipe, network: nn.Module, inputs: Inputs, file_format: str, path: Path, plain: bool
) -> float:
    """Write the file, compare what it computes, and only then give it its name; return the largest difference."""
    partial, chosen = path.with_name(f"{path.name}.partial"), FORMATS[file_format]
    try:
        if isinstance(chosen, WeightsFormat):
            difference = _write_weights(network, inputs, chosen, partial, plain)
        else:
            assert isinstance(inputs, Tensor)
            difference = _write_graph(network, inputs, chosen, partial)
        if not difference <= TOLERANCE and not difference <= 4 * _rounding(network, inputs):
            raise ValueError(
                f"what the file computes differs from the trained network by {difference:.1e} of the largest output, "
                f"more than {TOLERANCE:.0e} and than rounding explains; it was removed. Export in another format."
            )
        os.replace(partial, path)
    except Exception as error:  # exporters raise anything
        raise _refusal(trained, f"`--format` (={file_format!r}): {in_one_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)
    return difference


def _write_weights(network: nn.Module, inputs: Inputs, chosen: WeightsFormat, partial: Path, plain: bool) -> float:
    standardized = is_weight_standardized(network)
    target = folded_copy(network) if standardized and not plain else network
    state = plain_state_dict(network) if standardized and plain else target.state_dict()
    partial.write_bytes(chosen.write(state))
    read = loaded_into_a_copy(target, chosen.read(partial))
    return largest_difference(read(inputs), network(inputs))


def _write_graph(network: nn.Module, images: Tensor, chosen: GraphFormat, partial: Path) -> float:
    folded = folded_copy(network) if is_weight_standardized(network) else network
    partial.write_bytes(chosen.write(folded, images))
    function = chosen.read(partial)
    parts = (images, images[:1])
    return largest_difference([function(part) for part in parts], [network(part) for part in parts])


def _rounding(network: nn.Module, inputs: Inputs) -> float:
    """How much the outputs of a network differ from those in double precision, for no other reason than rounding."""
    if isinstance(inputs, list):
        return 0.0  # what is found may be something else
    return largest_difference(network(inputs), copy.deepcopy(network).double()(inputs.double()))


def _report(file_format: str, path: Path, inputs: Inputs, difference: float, checkpoint: str) -> None:
    shapes = [tuple(image.shape) for image in inputs] if isinstance(inputs, list) else tuple(inputs.shape)
    print(f"format      {file_format}")
    print(f"file        {path} ({path.stat().st_size / 2**20:.2f} MiB)")
    print(f"input       {shapes}{', or any other number of images' if isinstance(inputs, Tensor) else ''}")
    print(f"difference  {difference:.1e} of the largest output, from the trained network")
    print(f"checkpoint  {checkpoint}")


def _refusal(trained: TrainedRecipe, message: str) -> RecipeError:
    return RecipeError(trained.source, [message])
