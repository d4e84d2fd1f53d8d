"""Which parameters get which optimizer options."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ws_algorithm.recipes.parameter_names import named_parameters

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def parameter_groups(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model for ``torch.optim``.

    Args:
        model: The model, with Weight Standardization or without: names are those of the network as it was built, see
            :func:`~ws_algorithm.recipes.parameter_names.named_parameters`.
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
    everything = named_parameters(model)
    named = [(name, p) for name, p in everything if p.requires_grad]
    of_norms = {id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters()}
    result: list[dict[str, Any]] = []
    taken: set[int] = set()
    for position, group in enumerate(groups):
        chosen: set[int] = set()
        for selector in _selectors(position, group):
            matches = {id(p) for name, p in named if _selects(selector, name, id(p) in of_norms)}
            if not matches:
                frozen = any(_selects(selector, name, id(p) in of_norms) for name, p in everything)
                hint = ": all of it is frozen." if frozen else f".{_hint(selector, [name for name, _ in everything])}"
                raise ValueError(f"`param_groups[{position}].params` selects nothing with {selector!r}{hint}")
            chosen |= matches
        options = {key: value for key, value in group.items() if key != "params"}
        result.append({"params": [p for _, p in named if id(p) in chosen - taken], **options})
        taken |= chosen
    return [*result, {"params": [p for _, p in named if id(p) not in taken]}]


def _selectors(position: int, group: Mapping[str, Any]) -> list[str]:
    selectors = group.get("params")
    selectors = [selectors] if isinstance(selectors, str) else selectors
    if not isinstance(selectors, list | tuple) or not selectors or not all(isinstance(s, str) for s in selectors):
        raise ValueError(
            f"`param_groups[{position}].params` (={selectors!r}) must be 'bias', 'norm', a pattern on names, or a list "
            "of these."
        )
    return list(selectors)


def _hint(selector: str, names: list[str]) -> str:
    close = difflib.get_close_matches(selector, ["bias", "norm", *names], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _selects(selector: str, name: str, of_norm: bool) -> bool:
    if selector == "bias":
        return name.rpartition(".")[2] == "bias"
    return of_norm if selector == "norm" else fnmatchcase(name, selector)
