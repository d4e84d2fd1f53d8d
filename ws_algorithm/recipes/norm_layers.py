"""The normalization layer of a network, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

Norm = Literal["batch", "group", "frozen"]
NormLayer = Callable[[int], nn.Module]


def resolve_norm_layer(
    norm: str,
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    *,
    default_num_groups: int = 32,
    default_channels_per_group: int | None = None,
) -> NormLayer:
    """A maker of normalization layers from a number of channels. All have eps 1e-5.

    Args:
        norm: ``"batch"`` for ``BatchNorm2d``; ``"group"`` for ``GroupNorm``; ``"frozen"`` for torchvision's
            ``FrozenBatchNorm2d``, whose statistics, scale and shift are buffers: they come from a file and stay.
        num_groups: Groups of each GroupNorm. Excludes `channels_per_group`.
        channels_per_group: Channels in each group, whatever the width of the layer.
        default_num_groups: Groups if neither is given. Default: ``32``, as in the paper.
        default_channels_per_group: Channels per group if neither is given, in place of `default_num_groups`.

    Returns:
        The maker. It raises a ``ValueError`` for a number of channels that the groups do not divide.

    Raises:
        ValueError: If `norm` is not known, both numbers are given, one is not positive, or `norm` has no groups.

    Source: Wu and He 2018, https://arxiv.org/abs/1803.08494.
    """
    if norm not in _UNGROUPED and norm != "group":
        raise ValueError(f"`norm` (={norm!r}) must be 'batch', 'group' or 'frozen'.")
    check_groups(norm, num_groups, channels_per_group)
    if norm != "group":
        return _UNGROUPED[norm]
    if num_groups is None and channels_per_group is None:
        channels_per_group = default_channels_per_group
        num_groups = default_num_groups if channels_per_group is None else None
    return partial(_group_norm, num_groups, channels_per_group)


def check_groups(norm: str, num_groups: int | None, channels_per_group: int | None) -> None:
    """Refuse groups that contradict one another or that `norm` does not have.

    Raises:
        ValueError: If both numbers are given, one is not positive, or `norm` is not ``"group"``.
    """
    given = {"num_groups": num_groups, "channels_per_group": channels_per_group}
    given = {argument: value for argument, value in given.items() if value is not None}
    if len(given) == 2:
        raise ValueError(
            f"`num_groups` (={num_groups}) and `channels_per_group` (={channels_per_group}) exclude each other. "
            "Give one of them."
        )
    for argument, value in given.items():
        if norm != "group":
            raise ValueError(f"`{argument}` (={value}) is for norm='group', and `norm` is {norm!r}. Leave it out.")
        if value < 1:
            raise ValueError(f"`{argument}` (={value}) must be at least 1.")


_UNGROUPED: dict[str, NormLayer] = {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d}


def _group_norm(num_groups: int | None, channels_per_group: int | None, channels: int) -> nn.GroupNorm:
    argument, divisor = (
        ("num_groups", num_groups) if channels_per_group is None else ("channels_per_group", channels_per_group)
    )
    assert divisor is not None, "resolve_norm_layer gives one of the two"
    if channels % divisor:
        raise ValueError(
            f"`{argument}` (={divisor}) must divide the channels of every normalized layer, and one has {channels}. "
            "Set `num_groups` or `channels_per_group` to a number that does."
        )
    return nn.GroupNorm(divisor if channels_per_group is None else channels // divisor, channels)
