"""The plain values of a recipe: times, choices, places and what the device at hand can do."""

from __future__ import annotations

import dataclasses
import importlib.util
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from composer.core import Precision, Time, TimeUnit
from composer.distributed import DDPSyncStrategy
from composer.utils.parallelism import ParallelismConfig

from ws_algorithm.recipes.schema import Recipe, did_you_mean
from ws_algorithm.recipes.signatures import check_arguments

_CHOICES: dict[str, list[str]] = {
    "precision": [precision.value for precision in Precision],
    "ddp_sync_strategy": [strategy.value for strategy in DDPSyncStrategy],
    "python_log_level": ["debug", "info", "warning", "error", "critical"],
}
_NEEDING_A_GPU = [precision for precision in _CHOICES["precision"] if precision != Precision.FP32.value]
_DURATIONS = (TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.SAMPLE, TimeUnit.TOKEN)
_INTERVALS = (*_DURATIONS, TimeUnit.DURATION)
_TIMES = {
    "max_duration": _DURATIONS,
    "eval_interval": _INTERVALS,
    "save_interval": _INTERVALS,
    "console_log_interval": _INTERVALS,
}
_COUNTS = ("train_subset_num_batches", "eval_subset_num_batches", "save_num_checkpoints_to_keep")


def check_values(recipe: Recipe) -> list[str]:
    """The mistakes in values that stand for themselves, each a line that begins with its key."""
    checks = (_check_times, _check_choices, _check_numbers, _check_places, _check_device, _check_configs)
    return [mistake for check in checks for mistake in check(recipe)]


def _check_times(recipe: Recipe) -> Iterable[str]:
    for key, units in _TIMES.items():
        value = getattr(recipe, key)
        if value is not None and not _is_time(value, units):
            yield f"`{key}` (={value!r}) must be a positive number of epochs, or a time such as 10ep, 500ba, 20000sp."


def _is_time(value: int | str, units: tuple[TimeUnit, ...]) -> bool:
    try:
        time = Time.from_input(value, TimeUnit.EPOCH)
    except (ValueError, TypeError):
        return False
    return time.value > 0 and time.unit in units


def _check_choices(recipe: Recipe) -> Iterable[str]:
    for key, valid in _CHOICES.items():
        value = getattr(recipe, key)
        if value is not None and value.lower() not in valid:
            yield f"`{key}`: unknown value {value!r}.{did_you_mean(value, valid)}"


def _check_numbers(recipe: Recipe) -> Iterable[str]:
    for key in _COUNTS:
        if getattr(recipe, key) < 1 and getattr(recipe, key) != -1:
            reason = "With none kept, nothing could resume." if key.startswith("save_") else "None would be read."
            yield f"`{key}` (={getattr(recipe, key)}) must be at least 1, or -1 for all. {reason}"
    if recipe.num_threads is not None and recipe.num_threads < 1:
        yield f"`num_threads` (={recipe.num_threads}) must be at least 1, or null to let torch decide."
    if not 0 <= recipe.seed < 2**32:
        yield f"`seed` (={recipe.seed}) must be from 0 to 2**32 - 1."
    for key in ("scale_schedule_ratio", "dist_timeout"):
        if not getattr(recipe, key) > 0:
            yield f"`{key}` (={getattr(recipe, key)}) must be positive."


def _check_places(recipe: Recipe) -> Iterable[str]:
    if recipe.autoresume and recipe.save_overwrite:
        yield "`save_overwrite` and `autoresume` cannot both be true: one replaces a run, the other continues it."
    if recipe.run_name is not None and (recipe.run_name in ("", ".", "..") or "/" in recipe.run_name):
        yield f"`run_name` (={recipe.run_name!r}) must be a plain name; save_folder says where the run is."
    if not recipe.save_folder:
        yield "`save_folder` (='') must name a folder."
    if "://" in recipe.save_folder:
        yield (
            f"`save_folder` (={recipe.save_folder!r}) must be a local folder. To upload checkpoints as well, add the "
            "logger RemoteUploaderDownloader."
        )
    if recipe.load_path is None or "://" in recipe.load_path or recipe.autoresume:
        return
    path = Path(recipe.load_path.replace("{rank}", "0"))
    if not path.exists():
        yield f"`load_path` (={recipe.load_path!r}): there is no such file."
    elif not (zipfile.is_zipfile(path) if path.is_file() else (path / ".metadata").exists()):
        yield f"`load_path` (={recipe.load_path!r}) is not a checkpoint."


def _check_device(recipe: Recipe) -> Iterable[str]:
    available = {
        "gpu": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "tpu": importlib.util.find_spec("torch_xla") is not None,
    }
    if recipe.device is not None and not available.get(recipe.device, True):
        yield f"`device` (={recipe.device!r}): this machine has none that torch can use."
        return
    if recipe.device == "gpu" or (recipe.device is None and available["gpu"]):
        return
    if recipe.device_train_microbatch_size == "auto":
        yield "`device_train_microbatch_size` (='auto') needs a GPU; give a number of images."
    if recipe.precision is not None and recipe.precision.lower() in _NEEDING_A_GPU:
        yield f"`precision` (={recipe.precision!r}) needs a GPU: Composer computes in fp32 alone on a CPU."


def _check_configs(recipe: Recipe) -> Iterable[str]:
    parallelism = [field.name for field in dataclasses.fields(ParallelismConfig)]
    for name in recipe.parallelism_config or {}:
        if name not in parallelism:
            yield f"`parallelism_config.{name}`: unknown argument.{did_you_mean(str(name), parallelism)}"
    _, mistakes = check_arguments(torch.compile, recipe.compile_config or {}, ("model",))
    for mistake in mistakes:
        yield f"`compile_config.{mistake.name}`: {mistake.problem}.{did_you_mean(mistake.name, mistake.valid)}"
