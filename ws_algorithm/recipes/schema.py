"""The shape of a recipe: plain values to a typed :class:`Recipe`, every mistake collected.

Keys are the arguments of Composer's ``Trainer`` wherever it has one. A block that stands for an object names its class
or builder (``optimizers: {name: SGD, lr: 0.1}``); what may stand in a block is checked where names are resolved.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class RecipeError(ValueError):
    """Every mistake found in a recipe, each a line that begins with its key path."""

    def __init__(self, source: str, errors: Sequence[str]) -> None:
        count = "1 mistake" if len(errors) == 1 else f"{len(errors)} mistakes"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {error}" for error in errors)]))
        self.errors = list(errors)


@dataclass
class Recipe:
    """A run, as a YAML file describes it. Fields named as an argument of the ``Trainer`` mean what they mean there.

    Args:
        model: ``{name: <builder>, <argument>: <value>, ...}``.
        train_dataloader: ``{name: <builder>, ...}``.
        eval_dataloader: ``{name: <builder>, ...}``; ``None`` trains without evaluation.
        root: Where data sets are; for ``${root}`` in the dataloader blocks.
        download: Whether data sets may be downloaded; for ``${download}`` in the dataloader blocks.
        global_train_batch_size: Images per optimizer step, over all devices.
        device_train_microbatch_size: Images per forward and backward on one device, or ``"auto"``; ``None``: all.
        global_eval_batch_size: Images per evaluation batch, over all devices; ``None``: as in training.
        optimizers: ``{name: <class>, lr: ..., param_groups: [{params: [...], <option>: ...}, ...]}``; an option of a
            group may be ``lr_factor``.
        lr_base_batch_size: The `global_train_batch_size` for which the learning rates in `optimizers` are meant; with
            another one they are multiplied by the ratio (the linear rule). ``None``: they are taken as they are.
        schedulers: ``{name: <class>, ...}``.
        algorithms: ``{<class>: {<argument>: <value>, ...}, ...}``; ``null``: none.
        callbacks: Likewise.
        loggers: Likewise.
        num_threads: CPU threads of one operation; ``None``: as torch decides. For small images one is fastest.
        monitor: The evaluation metric that decides which checkpoint is best; ``None``: the last one of the model.
        freeze: Names of modules or parameters, or ``fnmatch`` patterns; what they select does not train.
        published: ``{<evaluation metric>: <figure>, ..., source: <text>}``, to be shown beside what is measured.
        save_folder: The one folder of the run; ``{run_name}`` in it is replaced.
    """

    model: dict[str, Any] = MISSING
    train_dataloader: dict[str, Any] = MISSING
    eval_dataloader: dict[str, Any] | None = None
    root: str | None = None
    download: bool = False
    max_duration: int | str = MISSING

    global_train_batch_size: int = MISSING
    device_train_microbatch_size: int | str | None = None
    global_eval_batch_size: int | None = None

    freeze: list[str] | None = None
    optimizers: dict[str, Any] = MISSING
    lr_base_batch_size: int | None = None
    schedulers: dict[str, Any] | None = None
    algorithms: dict[str, Any] | None = None
    callbacks: dict[str, Any] | None = None
    loggers: dict[str, Any] | None = None

    precision: str | None = None
    device: Literal["cpu", "gpu", "mps", "tpu"] | None = None
    num_threads: int | None = None
    seed: int = 0
    deterministic_mode: bool = False
    scale_schedule_ratio: float = 1.0
    step_schedulers_every_batch: bool | None = None
    train_subset_num_batches: int = -1
    eval_subset_num_batches: int = -1
    eval_interval: int | str = 1
    monitor: str | None = None
    published: dict[str, Any] | None = None

    run_name: str | None = None
    save_folder: str = "runs/{run_name}"
    save_interval: int | str = "1ep"
    save_num_checkpoints_to_keep: int = 1
    save_overwrite: bool = False
    autoresume: bool = False
    load_path: str | None = None
    load_weights_only: bool = False
    load_strict_model_weights: bool = True
    load_ignore_keys: list[str] | None = None

    progress_bar: bool | None = None
    log_to_console: bool = False
    console_log_interval: int | str = "1ep"
    python_log_level: str | None = None
    dist_timeout: float = 300.0
    ddp_sync_strategy: str | None = None
    parallelism_config: dict[str, Any] | None = None
    compile_config: dict[str, Any] | None = None


BASE = "base"  # the key that names what a file is merged over; no recipe has it once it is read
FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}
_FIELD_TYPES = get_type_hints(Recipe)
_NAMED, _MAPPING = "{name: <name>, <argument>: <value>}", "{<class>: {<argument>: <value>}}"
BLOCKS = dict.fromkeys(("model", "train_dataloader", "eval_dataloader", "optimizers", "schedulers"), _NAMED)
BLOCKS |= dict.fromkeys(("algorithms", "callbacks", "loggers"), _MAPPING)
DATA_BLOCKS = ("train_dataloader", "eval_dataloader")
REFERRED_TO = ("root", "download")  # these do nothing by themselves: the data blocks refer to them


def recipe_of(values: Mapping[Any, Any], found: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """A recipe from the plain values of its keys.

    Args:
        values: Values by key, interpolations resolved. A key that is not there has its default.
        found: Mistakes found while the values were read; no second one is reported for what is missing through them.

    Returns:
        The recipe and the mistakes found in its shape, after those in `found`. A field with a mistake has its default
        value, or is ``None``.
    """
    errors = list(found)
    recipe = Recipe(**{name: None for name, field in FIELDS.items() if field.default is MISSING})  # pyright: ignore
    reported = {error.partition("`")[2].partition("`")[0].partition(".")[0] for error in errors}
    for key, value in values.items():
        if key not in FIELDS:
            errors.append(f"`{key}`: unknown key.{did_you_mean(str(key), [*FIELDS, BASE])}")
            reported.add(nearest(str(key), FIELDS) or "")
            continue
        if key in BLOCKS and not isinstance(value, dict) and (value is not None or FIELDS[key].default is MISSING):
            errors.append(f"`{key}` (={value!r}) must be a block of `name: value` lines, such as {BLOCKS[key]}.")
            continue
        try:
            setattr(recipe, key, _typed(key, value))
        except OmegaConfBaseException as error:
            errors.append(f"`{key}` (={value!r}): {first_line(error)}.")
    for name, field in FIELDS.items():
        if field.default is MISSING and name not in values and name not in reported:
            errors.append(f"`{name}`: missing.")
    return recipe, errors


def check_batch_sizes(recipe: Recipe, world_size: int) -> list[str]:
    """The mistakes in a recipe's batch sizes: each must be positive and divide evenly.

    Args:
        recipe: Sizes that are ``None`` are not checked.
        world_size: Number of processes, one per device.
    """
    errors = []
    for key in ("global_train_batch_size", "global_eval_batch_size"):
        size = getattr(recipe, key)
        if size is not None and (size < 1 or size % world_size):
            errors.append(f"`{key}` (={size}) must be a positive multiple of the number of processes ({world_size}).")
    microbatch, batch = recipe.device_train_microbatch_size, recipe.global_train_batch_size
    if microbatch is None or microbatch == "auto":
        return errors
    if not isinstance(microbatch, int) or microbatch < 1:
        errors.append(
            f"`device_train_microbatch_size` (={microbatch!r}) must be a positive number of images or 'auto'."
        )
    elif batch is not None and batch > 0 and batch % world_size == 0 and (batch // world_size) % microbatch:
        errors.append(
            f"`device_train_microbatch_size` (={microbatch}) must divide the batch of one device, which is "
            f"{batch // world_size} (`global_train_batch_size` {batch} over {world_size} processes)."
        )
    return errors


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML that reads back to the same recipe.

    Its data blocks say ``${root}`` and ``${download}`` again, so that overrides of these do what they do elsewhere.
    """
    values: dict[str, Any] = with_data_root(recipe, "${root}")
    for key in DATA_BLOCKS:
        block = values.get(key, getattr(recipe, key))
        if isinstance(block, dict) and block.get("download") is recipe.download:
            values[key] = block | {"download": "${download}"}
    return OmegaConf.to_yaml(OmegaConf.structured(dataclasses.replace(recipe, **values)))


def with_data_root(recipe: Recipe, root: str) -> dict[str, Any]:
    """The data blocks of a recipe by key, with `root` in all places that are its own ``root`` or below it."""
    own = recipe.root

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: inner if key == "name" else replaced(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [replaced(inner) for inner in value]
        below = own if own and own.endswith("/") else f"{own}/"
        if own and isinstance(value, str) and (value == own or value.startswith(below)):
            return root + value[len(own) :]
        return value

    blocks = {key: getattr(recipe, key) for key in DATA_BLOCKS}
    return {key: replaced(block) for key, block in blocks.items() if isinstance(block, dict)}


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that `name` was probably meant to be."""
    names = {candidate.lower(): candidate for candidate in valid}
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.55)
    return names[close[0]] if close else None


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`` Did you mean `x`?`` with the nearest valid name, or else all there is to choose from."""
    valid = list(valid)
    close = nearest(name, valid)
    if close is not None:
        return f" Did you mean `{close}`?"
    return f" Choose from: {', '.join(valid)}." if valid else ""


def first_line(error: Exception) -> str:
    """What an exception says, without the context lines that OmegaConf appends."""
    text = str(error).strip().partition("\n")[0]
    return text.rstrip(".") or type(error).__name__


def in_one_line(error: Exception) -> str:
    """All that an exception says, up to 1,000 characters, without its line breaks."""
    return " ".join(str(error).split())[:1000]


def _typed(key: str, value: Any) -> Any:
    """`value` as the type of a field of :class:`Recipe`. Raises ``OmegaConfBaseException`` if it is none."""
    field_type = _FIELD_TYPES[key]
    single = dataclasses.make_dataclass("Recipe", [(key, field_type)])
    return OmegaConf.to_container(OmegaConf.structured(single(value)))[key]  # pyright: ignore
