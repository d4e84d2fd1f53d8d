"""The schedule of the detectors that the authors compare with."""

from __future__ import annotations

from composer.core import State, Time
from composer.optim import ComposerScheduler, LinearScheduler, MultiStepScheduler


class LinearWarmupMultiStepScheduler(ComposerScheduler):
    r"""A linear warm-up that starts from a factor, and steps at milestones.

    .. math::
        \alpha(t) = \gamma^x \left(f + (1 - f) \min(1, t / t_{warmup})\right)

    Here :math:`f` is `start_factor` and :math:`x` the number of milestones reached. Composer's
    ``MultiStepWithWarmupScheduler`` always starts from 0. ``scale_schedule_ratio`` stretches the milestones, and the
    warm-up only with `scale_warmup`, as with Composer's schedulers.

    Args:
        t_warmup: Length of the warm-up, such as ``"500ba"``; ``"0ba"`` for none.
        milestones: Times from which on the learning rate is multiplied, such as ``["8ep", "11ep"]``, in order.
        start_factor: Of the learning rate at the start, from 0 to 1. mmdetection has 0.001, Detectron and
            maskrcnn-benchmark 1/3. Default: ``1 / 3``.
        gamma: What the learning rate is multiplied by at each milestone. Default: ``0.1``.
        scale_warmup: Whether ``scale_schedule_ratio`` stretches the warm-up too. Default: ``False``.

    Raises:
        ValueError: If a time is none, is negative or is out of order, or a number is out of its range.
    """

    def __init__(
        self,
        t_warmup: str | Time,
        milestones: list[str | Time],
        start_factor: float = 1 / 3,
        gamma: float = 0.1,
        scale_warmup: bool = False,
    ) -> None:
        if not 0 <= start_factor <= 1:
            raise ValueError(f"`start_factor` (={start_factor}) must be from 0 to 1.")
        if not gamma > 0:
            raise ValueError(f"`gamma` (={gamma}) must be positive; it is 0.1 as a rule.")
        if not isinstance(milestones, list | tuple) or not milestones:
            raise ValueError(f"`milestones` (={milestones!r}) must be a list of times, such as [8ep, 11ep].")
        warmup, *steps = [_time("t_warmup", t_warmup), *(_time("milestones", time) for time in milestones)]
        if any(
            not first < second for first, second in zip(steps, steps[1:], strict=False) if first.unit == second.unit
        ):
            raise ValueError(f"`milestones` (={milestones!r}) must be in order, each later than the one before.")
        self.t_warmup, self.milestones, self.start_factor, self.gamma = warmup, steps, start_factor, gamma
        self.scale_warmup = scale_warmup
        self._warmup = LinearScheduler(start_factor, 1.0, warmup)
        self._steps = MultiStepScheduler([*steps], gamma)

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        factor = self._steps(state, ssr)
        if self.t_warmup.value == 0:
            return factor
        return factor * self._warmup(state, ssr if self.scale_warmup else 1.0)


def _time(argument: str, value: str | Time) -> Time:
    try:
        time = Time.from_input(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"`{argument}`: {value!r} is no time; write it with its unit, such as 8ep or 500ba."
        ) from error
    if time.value < 0:
        raise ValueError(f"`{argument}`: {value!r} must not be negative.")
    return time
