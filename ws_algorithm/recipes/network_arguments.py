"""The numbers that networks are told, checked."""

from __future__ import annotations


def check_at_least(minimum: int, **numbers: int) -> None:
    """Refuse a number below `minimum`.

    Raises:
        ValueError: If there is one; it names the argument.
    """
    for argument, value in numbers.items():
        if value < minimum:
            raise ValueError(f"`{argument}` (={value}) must be at least {minimum}.")


def check_between(lowest: float, highest: float, **numbers: float) -> None:
    """Refuse a number below `lowest` or above `highest`.

    Raises:
        ValueError: If there is one; it names the argument.
    """
    for argument, value in numbers.items():
        if not lowest <= value <= highest:
            upper = "" if highest == float("inf") else f" and at most {highest}"
            raise ValueError(f"`{argument}` (={value}) must be at least {lowest}{upper}.")


def blocks_per_stage(depth: int, step: int, others: int) -> int:
    """The n of a network whose depth is step n + others.

    Args:
        depth: What the network is told.
        step: How much one more block in every stage adds to it.
        others: What does not grow: the stem, the classifier, the transitions.

    Raises:
        ValueError: If `depth` is not of that form with n of at least 1.
    """
    if depth < step + others or (depth - others) % step:
        examples = ", ".join(str(step * blocks + others) for blocks in (1, 2, 3))
        raise ValueError(f"`depth` (={depth}) must be {step} n + {others} with n of at least 1: {examples} and so on.")
    return (depth - others) // step
