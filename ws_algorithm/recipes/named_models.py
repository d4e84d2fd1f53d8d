"""Models of torchvision and timm by name, without weights and, where they can be, without memory."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

SOURCES = ("torchvision", "timm")


def names_a_model(source: str) -> bool:
    """Whether a text is of the form ``torchvision:NAME`` or ``timm:NAME``."""
    return source.partition(":")[0] in SOURCES and ":" in source


def build_named_model(source: str) -> nn.Module:
    """Build a model with random weights, on the meta device unless its constructor computes with them.

    Args:
        source: ``torchvision:NAME`` or ``timm:NAME``.

    Raises:
        ValueError: If there is no such model, or timm is not installed.
    """
    library, _, name = source.partition(":")
    build = _torchvision_builder(name) if library == "torchvision" else _timm_builder(name)
    try:
        with torch.device("meta"):
            return build()
    except RuntimeError:  # it needs a number that it has computed with tensors
        return build()


def _torchvision_builder(name: str) -> Callable[[], nn.Module]:
    from torchvision import models

    _check_name("torchvision", name, models.list_models())
    builder = models.get_model_builder(name)
    parameters = inspect.signature(builder).parameters
    arguments: dict[str, Any] = {"weights": None}
    if "weights_backbone" in parameters:  # would be downloaded
        arguments["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):  # they warn about the initialization that they would choose
        arguments["init_weights"] = False
    return lambda: builder(**arguments)


def _timm_builder(name: str) -> Callable[[], nn.Module]:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ValueError('timm is not installed: pip install "ws-algorithm[timm]"') from error
    _check_name("timm", name.partition(".")[0], timm.list_models())
    return lambda: timm.create_model(name, pretrained=False)


def _check_name(library: str, name: str, names: Iterable[str]) -> None:
    names = list(names)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"{library} has no model {name!r}.{hint}")
