"""GroupNorm in the place of the batch norms of a whole model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ws_algorithm.batch_norms import FoundBatchNorm, find_batch_norms, is_batch_norm
from ws_algorithm.group_norm_rules import GroupNormRules, Indivisible
from ws_algorithm.patterns import Patterns

log = logging.getLogger(__name__)

Optimizers = Optimizer | Sequence[Optimizer]

_FORWARD_AND_BACKWARD_HOOKS = (
    "_forward_hooks _forward_hooks_with_kwargs _forward_hooks_always_called _forward_pre_hooks "
    "_forward_pre_hooks_with_kwargs _backward_hooks _backward_pre_hooks _is_full_backward_hook"
).split()
_STATE_DICT_HOOKS = (
    "_state_dict_hooks _state_dict_pre_hooks _load_state_dict_pre_hooks _load_state_dict_post_hooks"
).split()


def apply_group_normalization(
    module: nn.Module,
    num_groups: int = 32,
    *,
    channels_per_group: int | None = None,
    indivisible: Indivisible = "error",
    copy_affine: bool = False,
    eps: float = 1e-5,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    optimizers: Optimizers | None = None,
) -> int:
    r"""Replace the batch norms of a model by GroupNorms, in place.

    .. math:: y = \gamma_c \, (x - \mu_{n,g}) / \sqrt{\sigma^2_{n,g} + \mathrm{eps}} + \beta_c

    with the mean and the biased variance over the channels of a group :math:`g` and all positions of one sample
    :math:`n`: nothing depends on the batch. ``BatchNorm1d``, ``BatchNorm2d``, ``BatchNorm3d``, ``SyncBatchNorm`` and
    torchvision's ``FrozenBatchNorm2d`` are replaced wherever they are used. :math:`\gamma` and :math:`\beta` remain
    the same ``Parameter`` objects, set to 1 and 0, so that an optimizer built before this call keeps working; running
    statistics are dropped. Device, dtype, training mode, ``requires_grad`` and hooks on forward and backward are kept.
    Batch norms with a forward of their own (timm's ``BatchNormAct2d``), or inside fused or quantized layers, are left
    alone, which a warning in the log says. Applying twice equals applying once.

    Args:
        module: The model; edited in place.
        num_groups: The number of groups of each layer. Default: ``32``.
        channels_per_group: Instead, the number of channels of each group. Default: ``None``.
        indivisible: What to do where that does not divide the channels: ``"error"``, or ``"largest_divisor"`` for the
            largest divisor of the channels that is at most `num_groups` (or `channels_per_group`). Default:
            ``"error"``.
        copy_affine: Whether the values of scale and shift are kept, such as those of a zero-initialized last norm in
            a residual block. Default: ``False``.
        eps: Added to the variance; that of the batch norm is not taken over. Default: ``1e-5``.
        include: Qualified names of layers, or ``fnmatch`` patterns on the qualified names of normalization layers; only
            layers that one of them matches are replaced. The name of a module stands for all that are in it. ``None``
            for no such rule. Default: ``None``.
        exclude: The same; layers that one of them matches are left alone. Default: ``None``.
        optimizers: Optimizers of the model. They forget what they remember of parameters that were reset (momentum),
            and the parameters that ``FrozenBatchNorm2d`` did not have are added, if there is one parameter group.
            Default: ``None``.

    Returns:
        The number of layers that this call replaced.

    Raises:
        ValueError: If an argument is not of the kind described, a pattern matches no normalization layer, the channels
            of a batch norm do not divide, one is lazy, `module` is a batch norm itself or under FSDP, or new parameters
            have no place in `optimizers` or under DDP. Nothing has been changed then.

    Source: https://arxiv.org/abs/1803.08494.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
        >>> apply_group_normalization(model), model[1]
        (1, GroupNorm(32, 64, eps=1e-05, affine=True))
    """
    rules = GroupNormRules(num_groups, channels_per_group, indivisible, copy_affine, eps, include, exclude)
    return replace_batch_norms(module, rules, optimizers)


def replace_batch_norms(module: nn.Module, rules: GroupNormRules, optimizers: Optimizers | None = None) -> int:
    """Do what :func:`apply_group_normalization` says, by rules that have been checked."""
    _check_module(module)
    held_by = checked_optimizers(optimizers)
    found = find_batch_norms(module, rules.include, rules.exclude)
    chosen = [norm for norm in found if norm.reason is None]
    _check_not_lazy(chosen)
    _check_divisible(chosen, rules)
    _check_wrappers(module, chosen)
    frozen = [norm for norm in chosen if norm.is_frozen]
    _check_place_for_new_parameters(frozen, held_by)

    replacements = {norm.module: _group_norm_for(norm, rules) for norm in chosen}
    shared = [] if rules.copy_affine else _sharing_with_others(module, chosen)
    _put_in_place(module, replacements)
    if not rules.copy_affine:
        _reset(replacements.values(), held_by)
    if held_by:
        _hand_over(frozen, replacements, held_by[0])
    _log_outcome(module, found, replacements)
    if frozen and not held_by:
        log.warning(
            "%s: GroupNorms have parameters, which FrozenBatchNorm2d has not. Build the optimizer after this call, or "
            "give it as `optimizers`.",
            _listed(frozen),
        )
    if shared:
        log.warning("%s: set to 1 and 0 with parameters of batch norms that share them.", ", ".join(shared))
    return len(chosen)


def _check_module(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise ValueError(f"`module` must be a torch.nn.Module, got {type(module).__name__}: {module!r:.80}.")
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            "`module` is a torch.jit.ScriptModule; replace the norms before scripting or tracing the model."
        )
    if is_batch_norm(module):
        raise ValueError(
            f"`module` is itself a {type(module).__name__}, which cannot be replaced in place. Use torch.nn.GroupNorm."
        )


def checked_optimizers(optimizers: Any) -> list[Optimizer]:
    """`optimizers` as a list; raises ``ValueError`` for what is none."""
    if optimizers is None:
        return []
    several = list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]
    if not all(isinstance(optimizer, Optimizer) for optimizer in several):
        raise ValueError(f"`optimizers` (={optimizers!r:.80}) must be a torch.optim.Optimizer, or a list of them.")
    return several


def _check_not_lazy(chosen: list[FoundBatchNorm]) -> None:
    if lazy := [norm for norm in chosen if norm.is_lazy]:
        raise ValueError(
            f"`module` has batch norms whose channels are not known yet, being lazy: {_listed(lazy)}. Run one batch "
            "through the model first, or leave them alone with `exclude`."
        )


def _check_divisible(chosen: list[FoundBatchNorm], rules: GroupNormRules) -> None:
    by_channels: dict[int, list[FoundBatchNorm]] = {}
    for norm in chosen:
        if rules.groups_of(norm.channels) is None:
            by_channels.setdefault(norm.channels, []).append(norm)
    if not by_channels:
        return
    argument = "num_groups" if rules.channels_per_group is None else "channels_per_group"
    layers = "; ".join(f"{channels} channels: {_listed(norms)}" for channels, norms in sorted(by_channels.items()))
    raise ValueError(
        f"`{argument}` (={getattr(rules, argument)}) must divide the channels of every batch norm to replace, but not "
        f"those of {layers}. Choose another `num_groups` or `channels_per_group`, take indivisible='largest_divisor', "
        "or leave these layers alone with `exclude`."
    )


def _check_wrappers(module: nn.Module, chosen: list[FoundBatchNorm]) -> None:
    """FSDP knows its layers and DDP its parameters from when they wrapped the model."""
    parts = list(module.modules())
    names = {cls.__name__ for part in parts for cls in type(part).__mro__}  # importing FSDP takes long
    if chosen and names & {"FullyShardedDataParallel", "FSDPModule"}:
        raise ValueError("`module` is under FSDP, which holds on to its layers. Replace the norms before wrapping it.")
    if any(isinstance(part, DistributedDataParallel) for part in parts) and any(norm.is_frozen for norm in chosen):
        raise ValueError(
            "`module` is under DistributedDataParallel, which would not average the gradients of new parameters, and "
            "FrozenBatchNorm2d has none. Replace the norms before wrapping it."
        )


def _check_place_for_new_parameters(frozen: list[FoundBatchNorm], optimizers: list[Optimizer]) -> None:
    groups = sum(len(optimizer.param_groups) for optimizer in optimizers)
    if frozen and groups > 1:
        raise ValueError(
            f"`optimizers` have {groups} parameter groups, and to which the new parameters of {_listed(frozen)} "
            "(FrozenBatchNorm2d has none) belong is not known. Build the optimizer after the norms are replaced."
        )


def _group_norm_for(norm: FoundBatchNorm, rules: GroupNormRules) -> nn.GroupNorm:
    """A GroupNorm with the parameters of a batch norm, or new ones of the values that it is to have."""
    layer: Any = norm.module
    groups = rules.groups_of(norm.channels)
    assert groups is not None
    new: Any = nn.GroupNorm(groups, norm.channels, eps=rules.eps, affine=False)
    if norm.is_frozen:
        new.weight = nn.Parameter(layer.weight.clone() if rules.copy_affine else torch.ones_like(layer.weight))
        new.bias = nn.Parameter(layer.bias.clone() if rules.copy_affine else torch.zeros_like(layer.bias))
    else:
        new.weight, new.bias = layer.weight, layer.bias
    new.affine = norm.is_frozen or layer.affine
    new.training = layer.training
    for hooks in _FORWARD_AND_BACKWARD_HOOKS:  # the same objects, so that their handles still remove them
        setattr(new, hooks, getattr(layer, hooks))
    if any(getattr(layer, hooks) for hooks in _STATE_DICT_HOOKS):
        log.warning("%s: its hooks on saving and loading are not taken over.", norm)
    return new


def _put_in_place(module: nn.Module, replacements: dict[nn.Module, nn.GroupNorm]) -> None:
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    for part in module.modules():
        if isinstance(part, DistributedDataParallel):  # it fails to broadcast buffers that are gone
            part._assign_modules_buffers()


def _reset(norms: Iterable[nn.GroupNorm], optimizers: list[Optimizer]) -> None:
    with torch.no_grad():
        for norm in norms:
            for parameter, value in ((norm.weight, 1.0), (norm.bias, 0.0)):
                if parameter is None:
                    continue
                parameter.fill_(value)
                for optimizer in optimizers:
                    optimizer.state.pop(parameter, None)


def _hand_over(frozen: list[FoundBatchNorm], replacements: dict[nn.Module, nn.GroupNorm], optimizer: Optimizer) -> None:
    """Into the group that is there: another one would be unknown to learning rate schedules built for it."""
    group = optimizer.param_groups[0]
    for norm in frozen:
        for name, parameter in replacements[norm.module].named_parameters(prefix=norm.name):
            group["params"].append(parameter)
            if "param_names" in group:  # of optimizers that were built of named parameters
                group["param_names"].append(name)


def _sharing_with_others(module: nn.Module, chosen: list[FoundBatchNorm]) -> list[str]:
    """Names of the layers that are not replaced and hold a parameter of one that is."""
    layers = {norm.module for norm in chosen}
    reset = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
    return [
        name or "the model itself"
        for name, layer in module.named_modules()
        if layer not in layers and any(id(parameter) in reset for parameter in layer.parameters(recurse=False))
    ]


def _log_outcome(module: nn.Module, found: list[FoundBatchNorm], replacements: dict[nn.Module, nn.GroupNorm]) -> None:
    left: dict[str, list[FoundBatchNorm]] = {}
    for norm in found:
        if norm.reason is not None:
            left.setdefault(norm.reason, []).append(norm)
    against_the_rules = any(norm.skipped_because is None for norms in left.values() for norm in norms)
    has_group_norms = any(isinstance(layer, nn.GroupNorm) for layer in module.modules())
    log.log(
        logging.WARNING if against_the_rules or not has_group_norms else logging.INFO,
        "Group Normalization: %d of %d batch norms of %s replaced; left alone: %s.",
        len(replacements),
        len(found),
        type(module).__name__,
        "; ".join(f"{_listed(norms)} ({reason})" for reason, norms in left.items()) or "none",
    )
    vectors = [norm for norm in found if norm.module in replacements and isinstance(norm.module, nn.BatchNorm1d)]
    if alone := [norm for norm in vectors if replacements[norm.module].num_groups == norm.channels]:
        log.warning("%s: groups of one channel, whose output for inputs of shape (N, C) is constant.", _listed(alone))


def _listed(norms: Iterable[FoundBatchNorm]) -> str:
    return ", ".join(map(str, norms))
