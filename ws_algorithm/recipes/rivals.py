"""The ways to standardize the 2d convolutions of a model that are measured against one another.

Each turns a plain model into a contestant and keeps its ``Parameter`` objects, so that all of them start from the same
raw weights. All standardize the same layers, except Composer's, which takes every one. Libraries are imported when they
are asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ws_algorithm.functional import apply_weight_standardization, fold_weight_standardization
from ws_algorithm.inspection import inspect_convolutions

Layers = Literal["all", "normalized"]


@dataclass(frozen=True)
class Rival:
    """One way to standardize a model.

    Args:
        about: A line for readers.
        convert: Called with a plain model, to edit in place, and with which layers to take: ``"all"`` or
            ``"normalized"``, only those that a norm follows. Without the latter, all.
        formula: The name in ``FORMULAS`` of what it computes; ``None`` for no standardization.
        around: Called with the model; the context that all micro-batches of one optimizer step run in, or all batches
            of an evaluation.
        library: What must be importable; ``None`` for nothing but torch.
        evaluates_only: Whether training with it would not train a standardized model.
    """

    about: str
    convert: Callable[..., object]
    formula: str | None
    around: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext
    library: str | None = None
    evaluates_only: bool = False


class PaperConv2d(nn.Conv2d):
    """The layer that the authors published for PyTorch, operation by operation.

    Source: https://github.com/joe-siyuan-qiao/WeightStandardization.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        mean = weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
        weight = weight - mean
        std = weight.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        weight = weight / std.expand_as(weight)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def reason_against(name: str, mode: str = "train") -> str | None:
    """Why a contestant cannot take part, or ``None``.

    Args:
        name: A key of :data:`RIVALS`.
        mode: ``"train"`` or ``"eval"``.
    """
    rival = RIVALS[name]
    if rival.evaluates_only and mode == "train":
        return "what it trains is not standardized"
    if rival.library is None:
        return None
    try:
        importlib.import_module(rival.library)
    except ImportError as error:  # not there, or not made for this torch
        return f"{rival.library} cannot be imported ({error})"
    return None


def _exact(model: nn.Module, layers: Layers = "all") -> None:
    apply_weight_standardization(model, layers=layers)


def _folded(model: nn.Module, layers: Layers = "all") -> None:
    apply_weight_standardization(model, layers=layers)
    fold_weight_standardization(model)


def _once(model: nn.Module) -> AbstractContextManager[object]:
    from ws_algorithm import standardize_once

    return standardize_once(model)


def _composer(model: nn.Module, layers: Layers = "all") -> None:
    from composer.functional import apply_weight_standardization as composers

    composers(model)


def _paper(model: nn.Module, layers: Layers = "all") -> None:
    _replace_convolutions(model, PaperConv2d, layers)


def _timm(model: nn.Module, layers: Layers = "all") -> None:
    from timm.layers.std_conv import StdConv2d

    _replace_convolutions(model, StdConv2d, layers)


def _mmcv(model: nn.Module, layers: Layers = "all") -> None:
    _replace_convolutions(model, importlib.import_module("mmcv.cnn").ConvWS2d, layers)


def _replace_convolutions(model: nn.Module, layer: Callable[..., nn.Module], layers: Layers) -> None:
    taken = {record.name for record in inspect_convolutions(model, layers=layers) if record.standardized}
    for name, conv in list(model.named_modules()):
        if isinstance(conv, nn.Conv2d) and name in taken:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _layer_like(conv, layer))


def _layer_like(conv: nn.Conv2d, layer: Callable[..., nn.Module]) -> nn.Module:
    """A layer with the arguments and the ``Parameter`` objects of a convolution."""
    options = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
    with torch.device("meta"):
        new = layer(conv.in_channels, conv.out_channels, conv.kernel_size, bias=conv.bias is not None, **options)
    for name, parameter in conv.named_parameters(recurse=False):
        new.register_parameter(name, parameter)
    return new.train(conv.training)


RIVALS: dict[str, Rival] = {
    "none": Rival("no Weight Standardization", lambda model, layers="all": None, formula=None),
    "exact": Rival("ours, in every forward", _exact, formula="composer"),
    "once": Rival("ours, once per optimizer step", _exact, formula="composer", around=_once),
    "folded": Rival("ours, folded into plain weights", _folded, formula="composer", evaluates_only=True),
    "composer": Rival("Composer's built-in", _composer, formula="composer", library="composer.functional"),
    "paper": Rival("the authors' layer for PyTorch", _paper, formula="paper"),
    "timm": Rival("timm's StdConv2d", _timm, formula="timm", library="timm.layers.std_conv"),
    "mmcv": Rival("mmcv's ConvWS2d", _mmcv, formula="paper", library="mmcv.cnn"),
}
