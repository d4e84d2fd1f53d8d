"""Weight Standardization as a parametrization of a convolution, put on and taken off again.

In plain words, after :func:`register_weight_standardizer` ``conv``:

- ``conv.weight`` is the standardized weight, computed from the raw one in every forward; inside
  :func:`~ws_algorithm.once.standardize_once` it is cached;
- the raw weight is the very ``Parameter`` object that ``conv.weight`` was, so optimizers built before keep working,
  under the name ``conv.parametrizations.weight.original``;
- ``conv.reset_parameters()`` and loading a plain ``conv.weight`` key set the raw weight; assigning to ``conv.weight``
  is refused, since it could mean the raw weight or the effective one;
- :func:`unregister_weight_standardizer` restores class, parameter and keys as they were.

A formula with gain and shift has them in a second parametrization behind the first. With ``affine`` they follow what
sets the raw weight as above, so that the convolution computes with the very weight that was set. Convolutions that
share a raw weight share this second parametrization.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ws_algorithm.formula import FORMULAS, Formula, check_weight, resolve_formula, standardize
from ws_algorithm.layers import is_standardizer, raw_weight, standardizers_of
from ws_algorithm.rescaling import Rescaler, Rescalers, rescaler_for, tied_rescalers, untie_rescalers
from ws_algorithm.weight_cache import WeightCache


class WeightStandardizer(nn.Module):
    r"""The parametrization ``raw weight -> standardized weight`` for ``torch.nn.utils.parametrize``.

    .. math:: \hat{W}_{o} = (W_{o} - \mu_{o}) / s_{o}

    Args:
        formula: A name in ``FORMULAS`` or a :class:`~ws_algorithm.formula.Formula`. The gain and shift of ``affine``
            and ``scaled`` are not part of it; :func:`apply_weight_standardization` puts them behind. Default:
            ``"composer"``.

    Raises:
        ValueError: If `formula` is not known.

    Source: https://arxiv.org/abs/1903.10520.

    Example:
        >>> import torch
        >>> from torch.nn.utils import parametrize
        >>> conv = parametrize.register_parametrization(torch.nn.Conv2d(3, 8, 3), "weight", WeightStandardizer())
        >>> bool(conv.weight.flatten(1).mean(1).abs().max() < 1e-6)
        True
    """

    def __init__(self, formula: str | Formula = "composer") -> None:
        super().__init__()
        self.formula = resolve_formula(formula)
        self.cache = WeightCache()

    def forward(self, weight: Tensor) -> Tensor:
        """Return the standardized weight; same shape ``(out_channels, in_channels / groups, *kernel_size)``.

        Inside :func:`~ws_algorithm.once.standardize_once` it is computed once, in the dtype of autocast where that is
        on; everywhere else in every call.
        """
        if not torch.compiler.is_dynamo_compiling() and self.cache.entry is not None:
            cached = self.cache.entry.get(weight)
            if cached is not None:
                return cached
        check_weight(weight)
        return standardize(weight, self.formula)

    def train(self, mode: bool = True) -> WeightStandardizer:
        """Set the mode, which also tells a scope of the Trainer that an evaluation has ended, whatever ended it."""
        session = None if self.cache.entry is None else self.cache.entry.session
        if session is not None:
            session.on_mode_change()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightStandardizer:
        """Move or convert, as all of ``torch.nn`` does it; the memory of the standardized weight is given back."""
        self.cache.release()
        return super()._apply(fn, recurse)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the raw weight to store when `weight` is assigned: the assigned values themselves."""
        return weight

    def __prepare_scriptable__(self) -> None:
        """Refuse ``torch.jit.script``, which asks for this."""
        raise ValueError(
            "`torch.jit.script` cannot compile the standardization of a convolution. Script a folded model: "
            "torch.jit.script(ws_algorithm.folded_copy(model))."
        )

    def extra_repr(self) -> str:
        name = next((name for name, formula in FORMULAS.items() if formula == self.formula), None)
        return f"formula={name or self.formula!r}"


def register_weight_standardizer(
    conv: nn.Module, formula: str | Formula = "composer", rescalers: Rescalers | None = None
) -> None:
    """Standardize the weight of one convolution from now on.

    Args:
        conv: The convolution.
        formula: Of the standardization.
        rescalers: Those of other convolutions, of which it takes that for its own weight; a new one is added.
    """
    formula = resolve_formula(formula)
    rescaler = [] if formula.rescaling is None else [rescaler_for(conv, formula, rescalers)]
    if parametrize.is_parametrized(conv):
        _give_own_class(conv, without=())
    parametrize.register_parametrization(conv, "weight", WeightStandardizer(formula))
    parametrizations: Any = conv.parametrizations
    parametrizations["weight"].extend(rescaler)
    for link in rescaler:
        link.users.chains.add(parametrizations["weight"])
    parametrizations.train(conv.training)  # parts start in training mode, whatever that of the whole
    injected: Any = type(conv)
    injected.weight = _with_cache(vars(injected)["weight"])
    for name, method in _raw_weight_methods(injected.__bases__[0]).items():
        setattr(injected, name, method)


def _with_cache(parametrized: property) -> property:
    """Return torch's property for a parametrized weight, with a way around its nested calls to a weight that is cached.

    Note [Short way to a cached weight]: inside a scope, torch's property, its two module calls and the forward of the
    standardizer take 5.7 microseconds, and this one 1.0 (torch 2.7.0, one thread of an Intel Xeon). Outside of scopes
    torch's property computes, as if this one were not there.
    Source: https://github.com/pytorch/pytorch/blob/v2.7.0/torch/nn/utils/parametrize.py#L384.
    """
    compute = parametrized.fget  # looked up here, since a compiler cannot look into a property
    assert compute is not None

    def weight(self: Any) -> Tensor:
        if not torch.compiler.is_dynamo_compiling():
            chain = self._modules["parametrizations"]._modules["weight"]
            links = chain._modules
            first = links["0"]
            entry = first.cache.entry if type(first) is WeightStandardizer else None
            if entry is not None:
                cached = entry.get(chain._parameters.get("original"))
                if cached is not None and len(links) == 1:
                    return cached
                if cached is not None and len(links) == 2 and type(links["1"]) is Rescaler:
                    return links["1"].forward_cached(cached, entry.rescaled)
        return compute(self)

    return property(weight, parametrized.fset)


def unregister_weight_standardizer(conv: nn.Module) -> nn.Parameter:
    """Take the standardization off one convolution and return its weight, which holds the raw values again.

    Raises:
        ValueError: If other parametrizations stand on the same weight, whose place in the chain cannot be closed.
    """
    check_removable(conv)
    _give_own_class(conv, without=_raw_weight_methods(nn.Module))
    parametrize.remove_parametrizations(conv, "weight", leave_parametrized=False)
    for name in [name for name in conv._parameters if name != "weight"]:
        conv._parameters[name] = conv._parameters.pop(name)  # weight first again: the order of keys and parameters
    weight = conv.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _give_own_class(conv: nn.Module, without: Collection[str]) -> None:
    """Replace the class that torch injected by a copy of it, less the attributes `without`.

    A deep copy shares the injected class with its original, and torch adds and deletes properties on the class.
    """
    injected = type(conv)
    kept = {name: value for name, value in vars(injected).items() if name not in without}
    own_class: Any = type(injected.__name__, injected.__bases__, kept)
    conv.__class__ = own_class


def check_removable(conv: nn.Module) -> None:
    """Raise ``ValueError`` where :func:`unregister_weight_standardizer` would."""
    others = [type(p).__name__ for p in _chain(conv) if not _is_own(p)]
    if others:
        raise ValueError(
            f"`module` has a convolution whose weight carries other parametrizations beside the standardization: "
            f"{', '.join(others)}. Remove them all with torch.nn.utils.parametrize.remove_parametrizations."
        )
    if "weight" not in vars(type(conv)):
        raise ValueError(
            f"`module` has a convolution whose class was replaced by {type(conv).__name__} after it was standardized, "
            "as fully_shard does. Undo that first, or load the full state dict into a model that is not wrapped."
        )


def _holds_raw_weight(conv: nn.Module) -> bool:
    """Whether ``weight`` is the standardized raw weight, with no other parametrization in between."""
    return bool(standardizers_of(conv)) and all(map(_is_own, _chain(conv)))


def _is_own(parametrization: nn.Module) -> bool:
    return is_standardizer(parametrization) or isinstance(parametrization, Rescaler)


def _chain(conv: nn.Module) -> Any:
    parametrizations: Any = conv.parametrizations
    return parametrizations["weight"]


def _raw_weight_methods(base: Any) -> dict[str, Callable[..., Any]]:
    """Methods for the class that ``torch.nn.utils.parametrize`` injects above `base`, the class of the convolution.

    Through them, what ``reset_parameters`` initialises and what is loaded under the plain key ``weight`` reaches the
    raw weight, and assigning to ``weight`` is refused. They call `base` by name because other class swaps (FSDP) may
    stand in front.
    """

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name == "weight" and _holds_raw_weight(self):
            raise ValueError(
                "`weight` of a standardized convolution cannot be assigned: it is computed from the raw weight. To set "
                "the raw weight, write to `conv.parametrizations.weight.original`, the name that named_parameters() "
                "gives it and functional_call() takes; to set the weight that the convolution computes with, as fusing "
                "with a norm does, fold the model first with fold_weight_standardization(model)."
            )
        base.__setattr__(self, name, value)

    def reset_parameters(self: Any) -> None:
        if not _holds_raw_weight(self):
            base.reset_parameters(self)
            return
        # The class's own code runs on a plain convolution, whose weight is the raw weight
        standardized_class, raw = type(self), raw_weight(self)
        self.__class__ = base
        self._parameters["weight"] = raw
        try:
            base.reset_parameters(self)
        finally:
            new = self._parameters.pop("weight")
            self.__class__ = standardized_class
            if new is not raw:
                _chain(self).original = new
        for rescaler in tied_rescalers(_chain(self)).values():
            rescaler.begin_anew(raw_weight(self))

    def _load_from_state_dict(
        self: Any,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        plain, raw = f"{prefix}weight", f"{prefix}parametrizations.weight.original"
        if _holds_raw_weight(self):
            tied_rescalers(_chain(self))  # of raw weights that are no longer one, each loads its own
        if local_metadata.get("assign_to_params_buffers") and _holds_raw_weight(self):
            untie_rescalers(_chain(self))  # as torch gives each of two tied layers a Parameter of its own
        if plain in state_dict and raw not in state_dict and _holds_raw_weight(self):
            state_dict[raw] = weight = state_dict.pop(plain)
            for place, rescaler in tied_rescalers(_chain(self)).items():
                own = f"{prefix}parametrizations.weight.{place}."
                complaint = rescaler.complete(state_dict, prefix, own, weight, raw_weight(self).shape)
                error_msgs += [] if complaint is None else [complaint]
        others = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        base._load_from_state_dict(self, state_dict, prefix, *others)

    methods = (__setattr__, reset_parameters, _load_from_state_dict)
    return {method.__name__: method for method in methods if hasattr(base, method.__name__)}
