"""Which parameters get which optimizer options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def parameter_groups(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model for ``torch.optim``.

    Args:
        model: The model as built, before any surgery renames its parameters.
        groups: Each ``{"params": selectors, <optimizer option>: <value>, ...}``. A selector is ``"bias"`` (every bias),
            ``"norm"`` (weights and biases of normalization layers) or a pattern on qualified names such as
            ``"layer1.*"``. A parameter belongs to the first group that selects it.

    Returns:
        One dict per group, and last one with all other parameters and no option of its own.

    Raises:
        ValueError: If a group has no ``params``, or a selector selects nothing.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8))
        >>> groups = parameter_groups(model, [{"params": "norm", "weight_decay": 0.0}])
        >>> [len(group["params"]) for group in groups]
        [2, 2]
    """
    named = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    of_norms = {id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}
    result: list[dict[str, Any]] = []
    taken: set[int] = set()
    for position, group in enumerate(groups):
        chosen: set[str] = set()
        for selector in _selectors(position, group):
            matches = {name for name, p in named.items() if _selects(selector, name, id(p) in of_norms)}
            if not matches:
                raise ValueError(f"`param_groups[{position}].params` selects nothing with {selector!r}.")
            chosen |= matches
        options = {key: value for key, value in group.items() if key != "params"}
        result.append({"params": [p for n, p in named.items() if n in chosen and id(p) not in taken], **options})
        taken |= {id(named[name]) for name in chosen}
    return [*result, {"params": [p for p in named.values() if id(p) not in taken]}]


def _selectors(position: int, group: Mapping[str, Any]) -> list[str]:
    selectors = group.get("params")
    selectors = [selectors] if isinstance(selectors, str) else selectors
    if not isinstance(selectors, list | tuple) or not selectors or not all(isinstance(s, str) for s in selectors):
        raise ValueError(
            f"`param_groups[{position}].params` (={selectors!r}) must be 'bias', 'norm', a pattern on names, or a list "
            "of these."
        )
    return list(selectors)


def _selects(selector: str, name: str, of_norm: bool) -> bool:
    if selector == "bias":
        return name.rpartition(".")[2] == "bias"
    return of_norm if selector == "norm" else fnmatchcase(name, selector)
