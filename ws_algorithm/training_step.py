"""The micro-batches of one optimizer step of a Trainer, for which weights are standardized once."""

from __future__ import annotations

import inspect
import logging
from types import FrameType

from composer import Trainer
from composer.core import Event, State
from composer.utils import dist

from ws_algorithm.once import OnceSession, why_not_once

log = logging.getLogger(__name__)


class TrainingStep:
    """Standardizes once per optimizer step, from the first micro-batch of a batch to the last.

    It follows the events as Composer asks the algorithms which of them match, before it runs the first: whatever the
    order of the list, gradients are projected before any algorithm reads them.

    Weights are lent from the moment that the Trainer announces a forward until the end of the backward, and only while
    the Trainer is at it: if an exception has ended the batch in between, what others then do with the model is computed
    by autograd.
    """

    def __init__(self, state: State) -> None:
        self._reason = why_not_once(state.model)
        self._may_defer = not _perturbs_weights_per_rank(state)
        self._session: OnceSession | None = None
        self._batch: FrameType | None = None
        self._is_lending = False
        if self._reason is not None:
            log.warning("Weights are standardized in every forward, not once per step: %s.", self._reason)
        elif not self._may_defer:
            log.warning(
                "Gradients are projected in every backward, not once per step: an optimizer with closures (SAM) may "
                "give each rank other weights."
            )

    def follow(self, event: Event, state: State) -> None:
        if event == Event.BEFORE_TRAIN_BATCH and self._reason is None:
            self._end()  # one that an exception has left, such as running out of memory
            self._begin(state)
        elif event == Event.BEFORE_FORWARD:
            self._is_lending = True
        elif event == Event.AFTER_BACKWARD:
            self._is_lending = False
        elif event == Event.AFTER_TRAIN_BATCH:
            self._end()

    def _begin(self, state: State) -> None:
        self._session = OnceSession(state.model, self._may_defer)
        self._session.lend_while(self._is_in_micro_batch)
        self._session.open()
        self._batch, self._is_lending = _frame_of_batch(), False

    def _is_in_micro_batch(self) -> bool:
        if self._batch is None or _is_running(self._batch):
            return self._is_lending
        self._end()
        return False

    def _end(self) -> None:
        self._batch, self._is_lending = None, False
        if self._session is not None:
            self._session.close()
            self._session = None


def _frame_of_batch() -> FrameType | None:
    """The call of the Trainer's method for the micro-batches of one batch that this call is part of."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not Trainer._train_microbatches.__code__:
        frame = frame.f_back
    return frame


def _is_running(frame: FrameType) -> bool:
    """Whether a call has neither returned nor raised; clearing is refused while it runs, and harmless afterwards."""
    try:
        frame.clear()
    except RuntimeError:
        return True
    return False


def _perturbs_weights_per_rank(state: State) -> bool:
    """Whether ranks compute gradients at weights of their own, so that a mean of gradients is not to be projected."""
    takes_closure = (getattr(optimizer, "_step_supports_amp_closure", False) for optimizer in state.optimizers)
    return dist.get_world_size() > 1 and any(takes_closure)
