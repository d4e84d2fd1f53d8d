"""What a user says about the GroupNorms that are to replace batch norms, and the number of groups that follows."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from ws_algorithm.patterns import Patterns, check_patterns

Indivisible = Literal["error", "largest_divisor"]


@dataclass(frozen=True)
class GroupNormRules:
    """What a user says: arguments of :func:`~ws_algorithm.group_norm.apply_group_normalization`.

    Raises:
        ValueError: If one of them is not of the kind described there.
    """

    num_groups: int = 32
    channels_per_group: int | None = None
    indivisible: Indivisible = "error"
    copy_affine: bool = False
    eps: float = 1e-5
    include: Patterns | None = None
    exclude: Patterns | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_groups", _whole_number("num_groups", self.num_groups))
        if self.channels_per_group is not None:
            number = _whole_number("channels_per_group", self.channels_per_group)
            object.__setattr__(self, "channels_per_group", number)
            if self.num_groups != 32:
                raise ValueError(
                    f"`num_groups` (={self.num_groups}) and `channels_per_group` (={number}) exclude each other. Give "
                    "one of them."
                )
        if self.indivisible not in get_args(Indivisible):
            choices = ", ".join(map(repr, get_args(Indivisible)))
            raise ValueError(f"`indivisible` (={self.indivisible!r}) must be one of {choices}.")
        if not isinstance(self.copy_affine, bool):
            raise ValueError(f"`copy_affine` (={self.copy_affine!r}) must be True or False.")
        is_number = isinstance(self.eps, (int, float)) and not isinstance(self.eps, bool)
        if not is_number or not 0 < self.eps < math.inf:
            raise ValueError(f"`eps` (={self.eps!r}) must be a positive number, such as 1e-5.")
        for name in ("include", "exclude"):
            object.__setattr__(self, name, check_patterns(name, getattr(self, name)))

    def __str__(self) -> str:
        """As arguments in Python."""
        return ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))

    def groups_of(self, channels: int) -> int | None:
        """The number of groups for so many channels; ``None`` if they do not divide and are to."""
        wanted = self.num_groups if self.channels_per_group is None else self.channels_per_group
        divisor = _largest_divisor(channels, wanted)
        if divisor != wanted and self.indivisible == "error":
            return None
        return divisor if self.channels_per_group is None else channels // divisor


def _largest_divisor(number: int, at_most: int) -> int:
    return next(divisor for divisor in range(min(number, at_most), 0, -1) if number % divisor == 0)


def _whole_number(argument: str, value: Any) -> int:
    try:
        number = None if isinstance(value, (bool, torch.Tensor)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < 1:
        raise ValueError(f"`{argument}` (={value!r}) must be a whole number, 1 or more.")
    return number
