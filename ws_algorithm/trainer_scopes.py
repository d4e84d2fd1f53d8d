"""The scopes of a Trainer in which weights are standardized once: each optimizer step, each evaluation and prediction.

Note [Composer's events]: Composer asks all algorithms which of them match an event before it runs the first. Scopes
follow the events as they are asked: whatever the order of the list, gradients are projected before any algorithm reads
them, and EMA and SWA move weights before the scope of an evaluation begins and after it ends.
Source: https://github.com/mosaicml/composer/blob/v0.32.1/composer/core/engine.py#L386.

No event tells that an exception has ended a step or an evaluation, so that nothing depends on one:

- in a step, weights are cached only while the model's own forward runs the batch of the Trainer, and within a backward;
- in an evaluation, they are cached until its end, or until the model is set back to training, which the Trainer does
  whatever has ended the evaluation.
"""

from __future__ import annotations

import functools
import logging
import weakref
from typing import Any

from composer.core import Event, State
from composer.utils import dist
from torch import nn

from ws_algorithm.once import StandardizeOnceSession
from ws_algorithm.torch_internals import is_in_backward

log = logging.getLogger(__name__)

_STARTS = (Event.FIT_START, Event.EVAL_START, Event.PREDICT_START, Event.BEFORE_TRAIN_BATCH)
_ENDS = (Event.AFTER_TRAIN_BATCH, Event.EVAL_END, Event.PREDICT_END)


class TrainerScopes:
    """Opens and closes the scopes of a Trainer."""

    def __init__(self) -> None:
        self._session: StandardizeOnceSession | None = None

    def follow(self, event: Event, state: State) -> None:
        """Take account of an event that is about to run."""
        if event in _STARTS or event in _ENDS:
            self._end()  # also one that an exception has left, such as running out of memory
        if event == Event.FIT_START and _perturbs_weights_per_rank(state):
            log.warning(
                "Gradients are projected in every backward, not once per step: an optimizer with closures (SAM) may "
                "give each rank other weights."
            )
        elif event == Event.BEFORE_TRAIN_BATCH:
            self._begin(_StepSession(state.model, not _perturbs_weights_per_rank(state)))
        elif event == Event.BEFORE_FORWARD and isinstance(self._session, _StepSession):
            self._session.announce_forward(state)
        elif event in (Event.EVAL_BEFORE_FORWARD, Event.PREDICT_BEFORE_FORWARD) and self._session is None:
            self._begin(_EvaluationSession(state.model))

    def _begin(self, session: StandardizeOnceSession) -> None:
        self._session = session
        session.open()

    def _end(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


class _StepSession(StandardizeOnceSession):
    """The micro-batches of one optimizer step."""

    def __init__(self, model: nn.Module, may_defer: bool) -> None:
        super().__init__(model, may_defer)
        self._is_in_forward = False

    @property
    def is_active(self) -> bool:
        return self._is_in_forward or is_in_backward()

    def announce_forward(self, state: State) -> None:
        """Cache while the model runs the batch that a state has now, whatever ends it."""
        _AnnouncedForward(self, state).put_before(self.model)

    def run_forward(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Run the model's own forward."""
        self._is_in_forward = True
        try:
            return self.model.forward(*arguments, **named)
        finally:
            self._is_in_forward = False


class _AnnouncedForward:
    """Stands before the forward of a model for one call: that of the Trainer, with the batch of its state.

    A hook would not do: torch calls none after a ``KeyboardInterrupt``. Copies and files of the model have its own.
    """

    def __init__(self, session: _StepSession, state: State) -> None:
        self._session = session
        self._state = weakref.ref(state)
        self._patched: Any = None  # a forward that a user has put on the model

    def put_before(self, model: nn.Module) -> None:
        """Put it before the forward of `model`, or in the place of one that no forward has followed."""
        patched = vars(model).get("forward")
        self._patched = patched._patched if isinstance(patched, _AnnouncedForward) else patched
        vars(model)["forward"] = self

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        model, state = self._session.model, self._state()
        del vars(model)["forward"]
        if self._patched is not None:
            vars(model)["forward"] = self._patched
        if state is not None and arguments and arguments[0] is state.batch:
            return self._session.run_forward(arguments, named)
        return model.forward(*arguments, **named)

    def __reduce__(self) -> Any:
        if self._patched is not None:
            return functools.partial, (self._patched,)
        return getattr, (self._session.model, "forward")


class _EvaluationSession(StandardizeOnceSession):
    """The batches of one evaluation or prediction."""

    def on_mode_change(self) -> None:
        self.close()


def _perturbs_weights_per_rank(state: State) -> bool:
    """Return whether ranks compute gradients at weights of their own: the mean of those must not be projected."""
    takes_closure = (getattr(optimizer, "_step_supports_amp_closure", False) for optimizer in state.optimizers)
    return dist.get_world_size() > 1 and any(takes_closure)
