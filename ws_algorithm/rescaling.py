"""Gain and shift behind the standardization of a weight, for the formulas that have them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from ws_algorithm.formula import Formula, rescale, scale_and_mean
from ws_algorithm.layers import is_standardizer

# The names that a plain state dict may have for gain and shift, beside the weight of the convolution
_PLAIN_NAMES = {
    "affine": {"gain": "weight_gamma", "shift": "weight_beta"},  # mmcv, ConvAWS2d
    "scaled": {"gain": "gain"},  # timm, ScaledStdConv2d
}


class _Chains:
    """The parametrizations of convolutions that share a raw weight, or once did; those of a copy are the copies."""

    def __init__(self) -> None:
        self.chains: WeakSet[Any] = WeakSet()

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self.chains))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Chains:
        copied = memo[id(self)] = _Chains()
        for chain in self:
            copied.chains.add(copy.deepcopy(chain, memo))
        return copied

    def __reduce__(self) -> tuple[type[_Chains], tuple[()]]:
        return _Chains, ()


class Rescaler(nn.Module):
    r"""The parametrization ``standardized weight -> weight`` that stands behind a standardizer.

    .. math:: W'_{o} = \mathrm{gain}_o \hat{W}_{o} + \mathrm{shift}_o \quad\text{or}\quad
        W'_{o} = \mathrm{gain}_o \, n^{-1/2} \, \hat{W}_{o}

    The first for a formula of `rescaling` ``"affine"``: gain and shift are buffers, the scale and the mean of the
    weight that was there at first, so that :math:`W'` is that weight. The second for ``"scaled"``: the gain is a
    parameter, 1 at first, and trains if the raw weight does. All have shape ``(out_channels, 1, ...)``. The buffers
    for float16 and bfloat16 weights are made in float32.

    Convolutions that share one raw weight share one rescaler.

    Args:
        formula: Of the standardizer; has a `rescaling`.
        weight: The weight before it is standardized.

    Source: mmcv's ``ConvAWS2d``; https://arxiv.org/abs/2101.08692.
    """

    gain: Any
    shift: Any

    def __init__(self, formula: Formula, weight: Tensor) -> None:
        super().__init__()
        assert formula.rescaling is not None
        self.formula = formula
        self.users = _Chains()
        values = self.values_for(weight)
        if formula.rescaling == "scaled":
            self.gain = nn.Parameter(values["gain"], requires_grad=weight.requires_grad)
        else:
            self.register_buffer("gain", values["gain"])
        self.register_buffer("shift", values.get("shift"))

    def forward(self, standardized: Tensor) -> Tensor:
        """Return the weight that the convolution computes with; same shape and dtype."""
        return rescale(standardized, self.formula, self.gain, self.shift)

    def forward_cached(self, standardized: Tensor, cache: dict[Any, Any]) -> Tensor:
        """Return :meth:`forward` of a cached weight; without gradients, computed once for all forwards of a scope.

        Args:
            standardized: The cached weight.
            cache: What this scope has computed so far, by rescaler.
        """
        sources = (standardized, self.gain, *(() if self.shift is None else (self.shift,)))
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            return self.forward(standardized)
        if any(source.is_inference() for source in sources):
            return self.forward(standardized)
        state = tuple((source._version, source.data_ptr()) for source in sources)
        last = cache.get(self)
        if last is None or last[0] != state or last[1]._version != last[2] or last[1].requires_grad:
            with torch.inference_mode(False), torch.no_grad():
                rescaled = self.forward(standardized)
            last = cache[self] = (state, rescaled, rescaled._version)
        return last[1]

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return `weight`: what is assigned is the raw weight."""
        return weight

    @torch.no_grad()
    def values_for(self, weight: Tensor) -> dict[str, Tensor]:
        """Gain, and shift if there is one, for a raw `weight` that has just been set."""
        if self.formula.rescaling == "scaled":
            shape = (weight.shape[0], *[1] * (weight.ndim - 1))
            return {"gain": torch.ones(shape, dtype=weight.dtype.to_real(), device=weight.device)}
        whole = getattr(weight, "full_tensor", None)  # of a weight that fully_shard shards, unlike buffers
        weight = weight if whole is None else whole()
        scale, mean = scale_and_mean(weight.detach(), self.formula)
        return {"gain": scale, "shift": mean}

    @torch.no_grad()
    def begin_anew(self, weight: Tensor) -> None:
        """Set gain and shift for a raw `weight` that has just been initialised."""
        for name, value in self.values_for(weight).items():
            part = getattr(self, name)
            if part.is_meta:
                is_parameter = isinstance(part, nn.Parameter)
                setattr(self, name, nn.Parameter(value, part.requires_grad) if is_parameter else value)
            elif self.formula.rescaling == "scaled":
                part.fill_(1)
            else:
                part.copy_(value)

    def alone(self) -> Rescaler:
        """A copy for a convolution whose raw weight is no longer that of the others."""
        return copy.deepcopy(self, {id(self.users): self.users})

    def complete(self, state_dict: dict[str, Any], layer: str, own: str, weight: Any, shape: torch.Size) -> str | None:
        """Give a state dict that has a plain weight the keys of gain and shift.

        Their values are those that mmcv or timm saved, or those for `weight` if there are none.

        Args:
            state_dict: Edited in place.
            layer: The prefix of the convolution.
            own: The prefix of this module.
            weight: That arrives.
            shape: That `weight` must have.

        Returns:
            What is wrong, if one of two values is missing.
        """
        assert self.formula.rescaling is not None
        names = _PLAIN_NAMES[self.formula.rescaling]
        if any(f"{own}{name}" in state_dict for name in names):
            return None
        saved = {name: plain for name, plain in names.items() if f"{layer}{plain}" in state_dict}
        for name, plain in saved.items():
            state_dict[f"{own}{name}"] = state_dict.pop(f"{layer}{plain}")
        lacking = [f"{layer}{plain}" for name, plain in names.items() if name not in saved]
        if saved and not lacking:
            return None
        if isinstance(weight, Tensor) and weight.shape == shape:
            for name, value in self.values_for(weight).items():
                state_dict.setdefault(f"{own}{name}", value)
        if not saved:
            return None
        there = ", ".join(repr(f"{layer}{plain}") for plain in saved.values())
        return (
            f"`state_dict` has {there} and lacks {', '.join(map(repr, lacking))}, which belongs to it. Add what is "
            "missing, or leave out both, to keep the function of the weight."
        )

    def extra_repr(self) -> str:
        return f"rescaling={self.formula.rescaling!r}"


Rescalers = dict[tuple[int, Formula], Rescaler]  # by the id of the raw weight


def rescalers_by_weight(module: nn.Module) -> Rescalers:
    """The rescalers of a model, for convolutions whose weight is one that has a rescaler already."""
    chains: list[Any] = [part for part in module.modules() if isinstance(part, ParametrizationList)]
    of_raw = [chain for chain in chains if hasattr(chain, "original") and is_standardizer(chain[0])]
    return {(id(chain.original), link.formula): link for chain in of_raw for link in _rescalers_in(chain).values()}


def rescaler_for(conv: Any, formula: Formula, rescalers: Rescalers | None) -> Rescaler:
    """The rescaler of `rescalers` for the weight of a plain convolution, where a new one is put if there is none."""
    if rescalers is None or is_parametrized(conv, "weight"):
        return Rescaler(formula, conv.weight)
    key = id(conv.weight), formula
    if key not in rescalers:
        rescalers[key] = Rescaler(formula, conv.weight)
    return rescalers[key]


def tied_rescalers(chain: Any) -> dict[int, Rescaler]:
    """The rescalers of a convolution by their place in its chain, shared with whom it shares its raw weight.

    A convolution that came to another raw weight than those it shared a rescaler with gets a copy; one that came to the
    raw weight of another again, the rescaler of the other.
    """
    for place, rescaler in _rescalers_in(chain).items():
        others = [other for other in rescaler.users if other is not chain]
        raw = getattr(chain, "original", None)
        tied = [other for other in others if getattr(other, "original", None) is raw]
        theirs = [link for other in tied for link in other if _is_alike(link, rescaler)]
        if theirs and theirs[0] is not rescaler:
            chain[place] = theirs[0]
        elif not theirs and any(link is rescaler for other in others for link in other):
            chain[place] = rescaler.alone()
    return _rescalers_in(chain)


def untie_rescalers(chain: Any) -> None:
    """Give a convolution that is about to get another raw weight copies of the rescalers that it shares."""
    for place, rescaler in _rescalers_in(chain).items():
        if any(link is rescaler for other in rescaler.users if other is not chain for link in other):
            chain[place] = rescaler.alone()


def _rescalers_in(chain: Any) -> dict[int, Rescaler]:
    return {place: link for place, link in enumerate(chain) if isinstance(link, Rescaler)}


def _is_alike(link: nn.Module, rescaler: Rescaler) -> bool:
    return isinstance(link, Rescaler) and link.formula == rescaler.formula
