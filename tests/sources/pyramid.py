"""The top-down path that all three detection sources have, whatever they call its convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F

Layer = Callable[[Tensor], Tensor]


def feature_pyramid(stages: Sequence[Tensor], laterals: Sequence[Layer], outputs: Sequence[Layer]) -> list[Tensor]:
    """P2 to P6 from C2 to C5; `laterals` and `outputs` from the largest resolution on."""
    inner = [lateral(stage) for lateral, stage in zip(laterals, stages, strict=True)]
    for level in (2, 1, 0):
        inner[level] = inner[level] + F.interpolate(inner[level + 1], scale_factor=2, mode="nearest")
    levels = [output(own) for output, own in zip(outputs, inner, strict=True)]
    return [*levels, levels[-1][:, :, ::2, ::2]]
