"""An order of images in which wide and tall ones stand apart, so that little padding is needed."""

from __future__ import annotations

import torch
from torch import Tensor


def is_tall(sizes: Tensor) -> Tensor:
    """Which images are taller than wide.

    Args:
        sizes: Heights and widths ``(N, 2)``.

    Returns:
        Booleans ``(N,)``.
    """
    return sizes[:, 0] > sizes[:, 1]


def grouped_order(is_in_second: Tensor, group_size: int, generator: torch.Generator) -> Tensor:
    """A random order of positions, in which each ``group_size`` that follow one another are of one kind.

    Positions that are left over of both kinds fill at most one group together; what does not fill a group comes last.

    Args:
        is_in_second: Of which of two kinds each position is, booleans ``(N,)``.
        group_size: How many positions are of one kind, counted from the first on.
        generator: What decides.

    Returns:
        Every position once, ``(N,)``.
    """
    kinds = [_shuffled(kind.nonzero().flatten(), generator) for kind in (~is_in_second, is_in_second)]
    whole = [len(kind) - len(kind) % group_size for kind in kinds]
    left_over = torch.cat([kind[count:] for kind, count in zip(kinds, whole, strict=True)])
    mixed = len(left_over) - len(left_over) % group_size
    groups = [kind[:count] for kind, count in zip(kinds, whole, strict=True)] + [left_over[:mixed]]
    order = _shuffled(torch.cat(groups).view(-1, group_size), generator)
    return torch.cat([order.flatten(), left_over[mixed:]])


def _shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    return values[torch.randperm(len(values), generator=generator)]
