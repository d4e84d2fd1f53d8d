"""Weight Standardization of whole models, as functions that edit a model in place."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ws_algorithm.cautions import cautions_about, summary_of
from ws_algorithm.folding import fold_weight_standardization as fold_weight_standardization
from ws_algorithm.folding import removable_layers, standardized_layers
from ws_algorithm.formula import Formula, resolve_formula
from ws_algorithm.gains import check_wrappers, hand_over_gains
from ws_algorithm.group_norm import Optimizers, checked_optimizers
from ws_algorithm.parametrization import register_weight_standardizer, unregister_weight_standardizer
from ws_algorithm.patterns import Patterns
from ws_algorithm.rescaling import rescalers_by_weight
from ws_algorithm.selection import Layers, Predicate, Rules, Selection, select_convolutions

log = logging.getLogger(__name__)


def apply_weight_standardization(
    module: nn.Module,
    n_last_layers_ignore: int = 0,
    *,
    layers: Layers = "all",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    predicate: Predicate | None = None,
    example_input: Any = None,
    formula: str | Formula = "composer",
    optimizers: Optimizers | None = None,
) -> int:
    r"""Standardize the weights of the convolutions of a model, now and in every later forward.

    .. math:: \hat{W}_{o} = (W_{o} - \mu_{o}) / s_{o}

    Every ``Conv1d``, ``Conv2d`` and ``Conv3d`` that all of the rules below admit computes with :math:`\hat{W}` and
    learns the raw :math:`W`, which remains the same ``Parameter`` object: an optimizer built before this call keeps
    working. A convolution that is already standardized stays as it is, so that applying twice equals applying once; one
    with a fan-in of 1 is left alone, since its standardized weight would be 0. What was and what was not standardized
    is logged in one line, and whatever deserves a second look as a warning.

    A drop-in for ``composer.functional.apply_weight_standardization``.

    Args:
        module: The model; edited in place. May itself be a convolution.
        n_last_layers_ignore: How many convolutions, counted from the one that is executed last, are left alone: those
            of a prediction head. All convolutions are counted, whatever the other rules say. Default: ``0``.
        layers: ``"all"``, or ``"normalized"`` for the authors' rule: only convolutions that a normalization layer
            follows, with nothing but shape operations, concatenation, dropout or addition in between. Default:
            ``"all"``.
        include: Qualified names of layers, or ``fnmatch`` patterns on the qualified names of convolutions; only
            convolutions that one of them matches are standardized. The name of a module stands for all convolutions
            in it. ``None`` for no such rule. Default: ``None``.
        exclude: The same; convolutions that one of them matches are left alone. Default: ``None``.
        predicate: Called with the qualified name and the module of each convolution that all other rules admit; those
            for which it is false are left alone. Default: ``None``.
        example_input: What to run and observe a copy of the model with, where its forward cannot be traced or depends
            on optional arguments: a tuple of positional arguments, or the only argument. Default: ``None``.
        formula: A name in ``FORMULAS`` (``composer``, ``paper``, ``tensorflow``, ``timm``, ``bit``, ``affine``,
            ``scaled``) or a :class:`~ws_algorithm.formula.Formula`. A published checkpoint needs the formula that it
            was trained with; a network that was trained without Weight Standardization keeps its function with
            ``affine``. Default: ``"composer"``.
        optimizers: Optimizers of the model, to which the gains that learn (those of ``scaled``) are added, each in the
            parameter group of its weight; ``[]`` if they will be built later. Default: ``None``.

    Returns:
        The number of convolutions that this call standardized.

    Raises:
        ValueError: If an argument is not of the kind described, a pattern matches no convolution, a convolution that
            is to be standardized is lazy, pruned, of whole numbers, prepared for quantization-aware training, or under
            ``weight_norm``, ``spectral_norm`` or ``orthogonal``, or `module` is wrapped in FSDP or
            ``DistributedDataParallel`` and the gains of `formula` are new to it. Nothing has been changed then.

    Source: https://arxiv.org/abs/1903.10520.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 10, 1))
        >>> apply_weight_standardization(model, layers="normalized")
        1
        >>> is_weight_standardized(model[0]), is_weight_standardized(model[3])
        (True, False)
    """
    formula = resolve_formula(formula)
    held_by = None if optimizers is None else checked_optimizers(optimizers)
    rules = Rules(n_last_layers_ignore, layers, include, exclude, predicate)
    selection = select_convolutions(module, rules, example_input)
    check_selection(selection)
    return standardize_selection(selection, formula, held_by)


def check_selection(selection: Selection) -> None:
    """Raise ``ValueError`` if a convolution that is to be standardized cannot be."""
    refused = [choice for choice in selection.chosen if choice.refused_because is not None]
    if refused:
        others = f" ({len(refused) - 1} more like it)" if len(refused) > 1 else ""
        raise ValueError(
            f"`module` has a convolution, {str(refused[0])!r}, that cannot be standardized: "
            f"{refused[0].refused_because}; or leave it alone with exclude={refused[0].name!r}.{others}"
        )


def standardize_selection(selection: Selection, formula: Formula, optimizers: Sequence[Optimizer] | None) -> int:
    """Standardize what was chosen, give gains that learn to the optimizers, and return the number of convolutions."""
    check_wrappers(selection, formula)
    chosen, rescalers = selection.chosen, rescalers_by_weight(selection.module)
    done: list[nn.Module] = []
    try:
        for choice in chosen:
            register_weight_standardizer(choice.module, formula, rescalers)
            done.append(choice.module)
    except BaseException:  # out of memory, an interrupt, a tensor that refuses to be changed
        for conv in done:
            unregister_weight_standardizer(conv)
        raise
    log.log(logging.INFO if is_weight_standardized(selection.module) else logging.WARNING, summary_of(selection))
    for caution in cautions_about(selection, formula):
        log.warning(caution)
    hand_over_gains(chosen, optimizers)
    return len(chosen)


def is_weight_standardized(module: nn.Module) -> bool:
    """Whether the weight of `module`, or of any layer inside it, is standardized by this package or by Composer's.

    Raises:
        ValueError: If `module` is not a module.

    Example:
        >>> from torch import nn
        >>> is_weight_standardized(nn.Conv2d(3, 8, 3))
        False
    """
    return bool(standardized_layers(module))


def remove_weight_standardization(module: nn.Module) -> int:
    """Take the standardization off a model and keep its raw weights, in place.

    The function of the model changes (its weights are no longer standardized); its keys, classes and ``Parameter``
    objects are those it had before :func:`apply_weight_standardization`. Gains and shifts of ``affine`` and ``scaled``
    are dropped. To keep the function, use
    :func:`~ws_algorithm.folding.fold_weight_standardization`.

    Returns:
        The number of convolutions that were standardized.

    Raises:
        ValueError: If `module` is not a module, or one of the weights carries other parametrizations as well. Nothing
            has been changed then.

    Example:
        >>> from torch import nn
        >>> conv = nn.Conv2d(3, 8, 3)
        >>> raw = conv.weight
        >>> apply_weight_standardization(conv), remove_weight_standardization(conv), conv.weight is raw
        (1, 1, True)
    """
    layers = removable_layers(module)
    for layer in layers:
        unregister_weight_standardizer(layer)
    return len(layers)
