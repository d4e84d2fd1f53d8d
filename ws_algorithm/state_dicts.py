"""The state dict of a standardized model with the keys of a plain one, folded or with raw weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ws_algorithm.folding import folded_weights, removable_layers
from ws_algorithm.layers import raw_weight

_CHAIN = "parametrizations.weight."


def folded_state_dict(module: nn.Module) -> OrderedDict[str, Any]:
    """The state dict that `module` would have after folding: plain keys, standardized weights.

    Keys and their order are those of a model that was never standardized, so that it loads strictly into one.
    Standardized weights are new tensors, one for all keys of tied weights; other entries share the memory of `module`,
    as those of ``state_dict()`` do. `module` is not changed.

    Raises:
        ValueError: As :func:`fold_weight_standardization`; or if ``module.state_dict()`` renames the keys.

    Example:
        >>> from torch import nn
        >>> from ws_algorithm import apply_weight_standardization
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
        >>> _ = apply_weight_standardization(model)
        >>> list(model.state_dict()), list(folded_state_dict(model))
        (['0.bias', '0.parametrizations.weight.original'], ['0.weight', '0.bias'])
    """
    layers = removable_layers(module)
    folded = dict(zip(layers, folded_weights(module, layers), strict=True))
    of_raw = {id(raw_weight(layer)): weight for layer, weight in folded.items()}
    state, _ = _with_plain_keys(module, layers, lambda layer, original: of_raw[id(raw_weight(layer))])
    return state


def plain_state_dict(module: nn.Module) -> OrderedDict[str, Any]:
    """The state dict of `module` with raw weights under their plain names, ``conv.weight``.

    Keys and their order are those of a model that was never standardized; loaded into one and standardized by the same
    formula, or loaded into a standardized model, the raw weights are the same. All entries share the memory of
    `module`. `module` is not changed.

    Raises:
        ValueError: If `module` is not a module, one of the weights carries other parametrizations as well or has more
            to it than a raw weight (gain and shift), or ``module.state_dict()`` renames the keys.

    Example:
        >>> from torch import nn
        >>> from ws_algorithm import apply_weight_standardization
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
        >>> before = {key: value.clone() for key, value in model.state_dict().items()}
        >>> _ = apply_weight_standardization(model)
        >>> all(value.equal(before[key]) for key, value in plain_state_dict(model).items())
        True
    """
    state, left_out = _with_plain_keys(module, removable_layers(module), lambda layer, original: original)
    if left_out:
        raise ValueError(
            f"`module` ({type(module).__name__}) has more to its standardized weights than raw weights: "
            f"{', '.join(map(repr, left_out[:3]))}. folded_state_dict() has the weights that it computes with, and "
            "state_dict() all that it has."
        )
    return state


def _with_plain_keys(
    module: nn.Module, layers: list[nn.Module], value: Callable[[nn.Module, Tensor], Tensor]
) -> tuple[OrderedDict[str, Any], list[str]]:
    """A state dict with ``weight`` as the first key of each layer, and the keys that were left out of it."""
    state = module.state_dict()
    plain: OrderedDict[str, Any] = OrderedDict()
    by_prefix = dict(_prefixes(module, set(layers)))
    for prefix in by_prefix:
        if f"{prefix}{_CHAIN}original" not in state:
            raise ValueError(
                f"`module` ({type(module).__name__}) gives {f'{prefix}{_CHAIN}original'!r} another name in its state "
                "dict, as FSDP does. Take the state dict of the module that it wraps."
            )
    left_out = []
    for key, entry in state.items():
        around = sorted((prefix for prefix in by_prefix if key.startswith(prefix)), key=len)
        for prefix in around:
            plain.setdefault(f"{prefix}weight", value(by_prefix[prefix], state[f"{prefix}{_CHAIN}original"]))
        if not around or not key.startswith(f"{around[-1]}{_CHAIN}"):
            plain[key] = entry
        elif key != f"{around[-1]}{_CHAIN}original":
            left_out.append(key)
    _keep_versions(state, plain, by_prefix)
    return plain, left_out


def _prefixes(module: nn.Module, layers: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The prefixes of keys of layers, each of their names."""
    for name, layer in module.named_modules(remove_duplicate=False):
        if layer in layers:
            yield f"{name}." if name else "", layer


def _keep_versions(state: Any, plain: Any, prefixes: dict[str, nn.Module]) -> None:
    """Give a state dict what another says about the versions of its modules, less those that it does not have."""
    gone = tuple(f"{prefix}parametrizations" for prefix in prefixes)
    versions = getattr(state, "_metadata", OrderedDict()).items()
    plain._metadata = OrderedDict((name, version) for name, version in versions if not name.startswith(gone or ("\0",)))
