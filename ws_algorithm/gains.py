"""Gains that learn: new parameters, and the place of each in the optimizers of a model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ws_algorithm.formula import Formula
from ws_algorithm.layers import parametrizations_of, raw_weight
from ws_algorithm.rescaling import Rescaler
from ws_algorithm.selection import ConvolutionChoice, Selection

log = logging.getLogger(__name__)


def check_wrappers(selection: Selection, formula: Formula) -> None:
    """Raise ``ValueError`` if `selection.module` is wrapped in what knew its parameters before the gains came."""
    if formula.rescaling is None or not selection.chosen:
        return
    parts = list(selection.module.modules())
    names = {cls.__name__ for part in parts for cls in type(part).__mro__}  # importing FSDP takes long
    if names & {"FullyShardedDataParallel", "FSDPModule"}:
        raise ValueError(
            "`module` is under FSDP, which shards the parameters that it knows: with this `formula` there are new "
            "ones. Standardize before wrapping it."
        )
    if formula.rescaling == "scaled" and any(isinstance(part, DistributedDataParallel) for part in parts):
        raise ValueError(
            "`module` is under DistributedDataParallel, which would not average the gradients of new parameters, and "
            "with this `formula` there are gains. Standardize before wrapping it."
        )


def hand_over_gains(choices: Sequence[ConvolutionChoice], optimizers: Sequence[Optimizer] | None) -> None:
    """Add the gains that learn to the parameter group that has the raw weight; warn if no optimizers are given.

    Another group would be unknown to learning rate schedules built for the optimizer.
    """
    found = [(choice, gain) for choice in choices if (gain := _gain_of(choice.module)) is not None]
    gains = {id(gain): (choice, gain) for choice, gain in reversed(found)}  # tied convolutions share one
    if gains and optimizers is None:
        log.warning(
            "The gains of %d convolutions are new parameters, which learn. Build the optimizer after this call, and "
            "say so with optimizers=[], or give it as `optimizers`.",
            len(found),
        )
    for choice, gain in reversed(gains.values()):
        raw = raw_weight(choice.module)
        for group in (group for optimizer in optimizers or () for group in optimizer.param_groups):
            known = set(map(id, group["params"]))
            if id(raw) in known and id(gain) not in known:
                group["params"].append(gain)
                if "param_names" in group:  # of optimizers that were built of named parameters
                    group["param_names"].append(f"{choice.name}.parametrizations.weight.1.gain".lstrip("."))


def _gain_of(conv: nn.Module) -> nn.Parameter | None:
    for parametrization in parametrizations_of(conv):
        if isinstance(parametrization, Rescaler) and isinstance(parametrization.gain, nn.Parameter):
            return parametrization.gain
    return None
