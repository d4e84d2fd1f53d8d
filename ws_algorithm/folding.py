"""Standardized weights folded into plain ones, for inference and export, and back as long as raw weights are kept.

In plain words: folding writes into each ``Parameter`` the weight that its convolution computes with, and takes the
standardization off.
"""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ws_algorithm.layers import parametrizations_of, raw_weight, standardizers_of
from ws_algorithm.parametrization import check_removable, unregister_weight_standardizer
from ws_algorithm.selection import check_module

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

_KEPT = "_standardization_before_folding"


def fold_weight_standardization(module: nn.Module, *, keep_raw: bool = False) -> int:
    """Turn a standardized model into a plain one that computes the same, in place.

    Every standardized convolution becomes an ordinary one whose ``Parameter`` (the same object) holds the standardized
    weight: for inference and export, without any cost. Device, dtype, memory format, ties, hooks, ``requires_grad`` and
    the order of keys stay what they are. The raw weights are overwritten, unless they are kept; or fold a
    :func:`folded_copy`.

    Args:
        module: The model; edited in place.
        keep_raw: Whether the raw weights are kept for :func:`unfold_weight_standardization`. They are in no state dict
            and no file; a deep copy of the model has copies of them. Default: ``False``.

    Returns:
        The number of convolutions that were folded.

    Raises:
        ValueError: If `module` is not a module, one of the weights carries other parametrizations as well, or a
            standardized weight is shared with a layer that uses it unstandardized or by another formula. Nothing has
            been changed then.

    Example:
        >>> import torch
        >>> from ws_algorithm import apply_weight_standardization
        >>> conv, image = torch.nn.Conv2d(3, 8, 3), torch.randn(1, 3, 8, 8)
        >>> _ = apply_weight_standardization(conv)
        >>> before = conv(image)
        >>> fold_weight_standardization(conv), torch.equal(conv(image), before)
        (1, True)
    """
    layers = removable_layers(module)
    folded = folded_weights(module, layers)  # all before any: two layers may share one raw weight
    kept = [_Kept(layer) for layer in layers] if keep_raw else []
    with torch.no_grad():
        for layer, weight in zip(layers, folded, strict=True):
            unregister_weight_standardizer(layer).copy_(weight)
            vars(layer).pop(_KEPT, None)
    for layer, one in zip(layers, kept, strict=False):
        one.plain_class = type(layer)
        vars(layer)[_KEPT] = one
    return len(layers)


def unfold_weight_standardization(module: nn.Module) -> int:
    """Undo ``fold_weight_standardization(module, keep_raw=True)``: raw weights and their standardization come back.

    Raw weights have the values that they had, in the same ``Parameter`` objects, so that an optimizer built before goes
    on with them; on the device and in the dtype that the model has now. What was done to folded weights since is
    dropped, and a warning says so.

    Args:
        module: The model; edited in place.

    Returns:
        The number of convolutions that are standardized again.

    Raises:
        ValueError: If `module` is not a module, no raw weights are kept in it, or a convolution was parametrized,
            sharded or replaced since it was folded. Nothing has been changed then.

    Example:
        >>> from torch import nn
        >>> from ws_algorithm import apply_weight_standardization, is_weight_standardized
        >>> conv = nn.Conv2d(3, 8, 3)
        >>> raw, values = conv.weight, conv.weight.detach().clone()
        >>> _ = apply_weight_standardization(conv)
        >>> fold_weight_standardization(conv, keep_raw=True), unfold_weight_standardization(conv)
        (1, 1)
        >>> conv.parametrizations.weight.original is raw, bool((raw == values).all())
        (True, True)
    """
    check_module(module)
    found = [(layer, vars(layer).get(_KEPT)) for layer in module.modules()]
    kept = [(layer, one) for layer, one in found if isinstance(one, _Kept) and one.chain is not None]
    if not kept:
        raise ValueError(
            "`module` has no raw weights to go back to. Fold with keep_raw=True, in the same process; or load the raw "
            "weights of a checkpoint and standardize them with apply_weight_standardization."
        )
    for name, layer in module.named_modules():
        one = vars(layer).get(_KEPT)
        if isinstance(one, _Kept) and one.chain is not None:
            one.check_unchanged(name, layer)
    folded: list[Any] = [layer._parameters["weight"] for layer, _ in kept]
    folded = [weight.detach().clone() for weight in folded]  # all before any: two layers may share one weight
    for layer, one in kept:
        one.put_back(layer)
    changed = sum(not _is_close(layer, weight) for (layer, _), weight in zip(kept, folded, strict=True))
    if changed:
        log.warning(
            "%d of %d folded weights of %s were changed since they were folded (by training, loading or another "
            "dtype); those changes are dropped.",
            changed,
            len(kept),
            type(module).__name__,
        )
    return len(kept)


def folded_copy(module: M) -> M:
    """A deep copy of a model in which the standardization is folded; the model stays as it is.

    The copy has the mode (training or evaluation), the device and the dtypes of `module`. It can be one of the
    ``transforms`` of ``composer.utils.export_for_inference``.

    Raises:
        ValueError: As :func:`fold_weight_standardization`, or if `module` cannot be copied.

    Example:
        >>> import torch
        >>> from ws_algorithm import apply_weight_standardization, is_weight_standardized
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> _ = apply_weight_standardization(model)
        >>> folded = folded_copy(model)
        >>> is_weight_standardized(model), is_weight_standardized(folded)
        (True, False)
    """
    check_module(module)
    try:
        copied = copy.deepcopy(module)
    except Exception as error:
        raise ValueError(
            f"`module` ({type(module).__name__}) cannot be copied by copy.deepcopy: {error} Fold it in place: "
            "fold_weight_standardization(module, keep_raw=True), and unfold it afterwards."
        ) from error
    fold_weight_standardization(copied)
    return copied


def standardized_layers(module: nn.Module) -> list[nn.Module]:
    """Not only convolutions: a user may have put a :class:`WeightStandardizer` on any layer.

    Raises:
        ValueError: If `module` is not a module.
    """
    check_module(module)
    return [layer for layer in module.modules() if standardizers_of(layer)]


def removable_layers(module: nn.Module) -> list[nn.Module]:
    """The layers that can be made plain; a warning if there are none.

    Raises:
        ValueError: If `module` is not a module, or one of them carries other parametrizations as well.
    """
    layers = standardized_layers(module)
    for layer in layers:
        check_removable(layer)
    if not layers:
        log.warning("%s has no standardized layer; nothing was removed or folded.", type(module).__name__)
    return layers


def folded_weights(module: nn.Module, layers: list[nn.Module]) -> list[Tensor]:
    """What each layer of a model computes with, in new tensors of the dtypes of the raw weights.

    Raises:
        ValueError: If one of the raw weights is shared with a layer that computes with something else.
    """
    folded = [_weight_of(layer) for layer in layers]
    _check_not_shared(module, layers, folded)
    return folded


class _Kept:
    """What a folded convolution was: raw values, and class and parametrizations that give them back.

    It is a plain attribute of the layer, so that it is in no state dict and ``parameters()`` does not name it.

    Args:
        layer: Standardized.
    """

    def __init__(self, layer: nn.Module | None = None) -> None:
        self.chain: Any = None
        if layer is not None:
            parametrizations: Any = layer.parametrizations
            self.chain = parametrizations["weight"]
            self.standardized_class = self.plain_class = type(layer)
            self.raw = raw_weight(layer).detach().clone()

    def check_unchanged(self, name: str, layer: nn.Module) -> None:
        weight = layer._parameters.get("weight")
        if type(layer) is not self.plain_class or weight is None or weight.shape != self.raw.shape:
            raise ValueError(
                f"`module` has a layer, {name!r}, that was parametrized, sharded or replaced since it was folded; it "
                "cannot be unfolded. Undo that first."
            )

    def put_back(self, layer: Any) -> None:
        """Make a layer standardized again."""
        weight: nn.Parameter = layer._parameters.pop("weight")
        layer.__class__ = self.standardized_class
        if "parametrizations" not in layer._modules:
            layer.parametrizations = nn.ModuleDict()
        layer.parametrizations["weight"] = self.chain
        self.chain.original = weight
        self.chain.to(device=weight.device, dtype=None if weight.dtype == self.raw.dtype else weight.dtype)
        layer.parametrizations.train(layer.training)
        with torch.no_grad():
            weight.copy_(self.raw)
        del vars(layer)[_KEPT]

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()  # a file remembers nothing: classes that are made at run time cannot be written to one

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        copied = _Kept()
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied


@torch.no_grad()
def _weight_of(layer: nn.Module) -> Tensor:
    """The weight that a layer computes with, in the dtype of its raw weight."""
    standardized: Any = layer
    kind = raw_weight(layer).device.type
    is_known = torch.amp.autocast_mode.is_autocast_available(kind)  # not for the meta device
    with torch.autocast(kind, enabled=False) if is_known else nullcontext():
        return standardized.weight.detach().clone()


def _is_close(layer: nn.Module, folded: Tensor) -> bool:
    return folded.is_meta or torch.allclose(_weight_of(layer), folded, rtol=1e-5, atol=1e-6, equal_nan=True)


def _check_not_shared(module: nn.Module, layers: list[nn.Module], folded: list[Tensor]) -> None:
    """Folding overwrites raw weights: no layer may use one unstandardized, nor two layers differently."""
    inside = {part for layer in layers for part in layer.modules()}
    raw: dict[int, tuple[nn.Module, Tensor]] = {}
    for layer, weight in zip(layers, folded, strict=True):
        first, of_first = raw.setdefault(id(raw_weight(layer)), (layer, weight))
        if first is not layer and not _is_same(first, of_first, layer, weight):
            raise ValueError(
                "`module` shares a raw weight among layers that standardize it by different formulas or gains; one "
                "folded weight cannot serve both. Give one of them a weight of its own first."
            )
    for name, other in module.named_modules():
        if other not in inside and any(id(parameter) in raw for parameter in other.parameters(recurse=False)):
            raise ValueError(
                f"`module` shares the raw weight of a standardized layer with {name!r} ({type(other).__name__}), which "
                "folding would change. Give that layer a weight of its own first."
            )


def _is_same(first: nn.Module, of_first: Tensor, second: nn.Module, of_second: Tensor) -> bool:
    if of_first.is_meta:
        return repr(parametrizations_of(first)) == repr(parametrizations_of(second))
    return torch.allclose(of_first, of_second, rtol=0, atol=0, equal_nan=True)
