"""The batch norms of a model, and which of them another layer can stand in for."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ws_algorithm.layers import has_forward_of_torch, is_normalization
from ws_algorithm.patterns import check_that_all_match, names_of, reason_by_patterns
from ws_algorithm.torch_internals import is_optimized_module

# torchvision's; detectron2, DETR and others have copies under the same name
_FROZEN = "FrozenBatchNorm2d"


@dataclass(frozen=True)
class FoundBatchNorm:
    """A batch norm of a model and whether it is to be replaced.

    Args:
        name: Its first qualified name (``""`` for the model itself).
        module: The layer.
        skipped_because: The rule of the user by which it is left alone; ``None`` if the rules admit it.
        obstacle: Why no other layer can stand in for it; ``None`` if one can.
    """

    name: str
    module: nn.Module
    skipped_because: str | None
    obstacle: str | None

    @property
    def is_frozen(self) -> bool:
        """Whether its scale and shift are buffers, not parameters."""
        return not isinstance(self.module, _BatchNorm)

    @property
    def is_lazy(self) -> bool:
        """Whether its number of channels is not known yet."""
        return isinstance(self.module, LazyModuleMixin)

    @property
    def channels(self) -> int:
        layer: Any = self.module
        return layer.weight.numel() if self.is_frozen else layer.num_features

    @property
    def reason(self) -> str | None:
        """Why it is left alone; ``None`` if it is not."""
        return self.skipped_because or self.obstacle

    def __str__(self) -> str:
        return self.name or "(the model itself)"


def find_batch_norms(module: nn.Module, include: Any = None, exclude: Any = None) -> list[FoundBatchNorm]:
    """Find the batch norms of a model, each once, in the order of their definition.

    Patterns speak of all normalization layers, so that they still match once the batch norms are replaced.

    Args:
        module: Any model; it is not changed.
        include: Checked patterns; only layers that one of them matches are to be replaced. ``None`` for no such rule.
        exclude: The same; layers that one of them matches are not.

    Raises:
        ValueError: If a pattern matches no normalization layer.
    """
    norms = (layer for layer in module.modules() if is_batch_norm(layer) or is_normalization(layer))
    names = names_of(module, norms)
    for argument, patterns in (("include", include), ("exclude", exclude)):
        check_that_all_match(argument, patterns, module, names, "normalization layers", "named_modules()")
    parents = _parents_in(module)
    return [
        FoundBatchNorm(
            aliases[0], layer, reason_by_patterns(aliases, include, exclude), _obstacle(layer, parents[layer])
        )
        for layer, aliases in names.items()
        if is_batch_norm(layer)
    ]


def is_batch_norm(layer: nn.Module) -> bool:
    """Whether a layer is torch's batch norm, derived from one, or named like one and without norms inside."""
    if isinstance(layer, torch.jit.ScriptModule):
        return "BatchNorm" in str(getattr(layer, "original_name", ""))
    if isinstance(layer, _BatchNorm):
        return True
    return is_normalization(layer) and any("BatchNorm" in cls.__name__ for cls in type(layer).__mro__)


def _parents_in(module: nn.Module) -> defaultdict[nn.Module, list[nn.Module]]:
    parents: defaultdict[nn.Module, list[nn.Module]] = defaultdict(list)
    for parent in module.modules():
        for child in parent.children():
            parents[child].append(parent)
    return parents


def _obstacle(layer: nn.Module, parents: list[nn.Module]) -> str | None:
    if isinstance(layer, torch.jit.ScriptModule):
        return "it is TorchScript"
    for part in (layer, *parents):
        cls = type(part)
        if cls.__module__.startswith("torch.ao."):
            return f"it is part of {cls.__name__}, a fused or quantized layer of torch.ao"
        if any(base.__name__ == "_GhostBatchNorm" for base in cls.__mro__):
            return f"it is part of {cls.__name__}, whose forward sets its momentum"
        if is_optimized_module(part):
            return "it is compiled by itself"
    if parametrize.is_parametrized(layer):
        return "it is parametrized"
    if not _computes_batch_norm(layer):
        return f"{type(layer).__name__} has a forward of its own"
    held = layer._parameters if isinstance(layer, _BatchNorm) else layer._buffers
    if not {"weight", "bias"} <= held.keys():
        return "its weight or bias is computed, as by pruning"
    return None


def _computes_batch_norm(layer: nn.Module) -> bool:
    """Whether forward is that of torch or torchvision; the latter is not imported, so that its class decides."""
    if isinstance(layer, _BatchNorm):
        return has_forward_of_torch(layer)
    owner = next(cls for cls in type(layer).__mro__ if "forward" in vars(cls))
    return "forward" not in vars(layer) and owner.__name__ == _FROZEN
