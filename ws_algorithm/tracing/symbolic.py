"""Runs of a forward with symbols in place of tensors: no input is needed.

``torch.fx`` traces with symbols too, but patches ``nn.Module`` for all threads while it does, and gives up at the first
``if`` or ``len``. Here what a forward asks of a symbol is answered: conditions with both answers, numbers with
different ones, and random draws are symbols as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ws_algorithm.tracing.following import Reading
from ws_algorithm.tracing.recorder import Run
from ws_algorithm.tracing.trial import Answers, Trial

# What a forward is told that asks a symbol for a number or a length; what it does should not depend on it
_NUMBERS = (4, 7, 1, 3, 1024)
# A forward with more conditions is not tried in all its ways
_MOST_CONDITIONS = 32


@dataclass(frozen=True)
class Ways:
    """What runs with symbols have shown.

    Args:
        runs: One for each way through forward that was found.
        complete: Whether all that was tried got through, so that what no run uses is not used.
    """

    runs: list[Run]
    complete: bool


def symbolic_ways(module: nn.Module) -> Ways:
    """The ways through the forward of a model, in training and in evaluation.

    Raises:
        Exception: Whatever forward raises if it does not get through, in neither of the two.
        RuntimeError: If it has too many ways, or which convolutions it uses depends on a number.
    """
    found: list[Ways] = []
    failures: list[Exception] = []
    for training in (True, False):
        try:
            found.append(_ways(module, training))
        except Exception as failure:  # whatever the user's code raises when given symbols
            failures.append(failure)
    if not found:
        raise failures[-1]
    return Ways([run for ways in found for run in ways.runs], not failures and all(ways.complete for ways in found))


def _ways(module: nn.Module, training: bool) -> Ways:
    """Runs in which every condition has had both answers, as far as they lead to the end."""
    base = _passage(module, training, _NUMBERS[0], {})
    trials, failed = [base], False
    tried = set(base.answers.items())
    for trial in trials:  # grows meanwhile
        for index, condition in enumerate(trial.asked):
            answers = {earlier: trial.answers[earlier] for earlier in trial.asked[:index]}
            other = not trial.answers[condition]
            if (condition, other) in tried:
                continue
            if len(tried) > 2 * _MOST_CONDITIONS:
                raise RuntimeError(f"forward depends on more than {_MOST_CONDITIONS} conditions of its input")
            tried.add((condition, other))
            try:
                trials.append(_passage(module, training, _NUMBERS[0], answers | {condition: other}))
            except Exception:  # no way through: forward checks its input here
                failed = True
                continue
            tried |= set(trials[-1].answers.items())
    if any(trial.gave_a_number for trial in trials):
        others, refused = _with_other_numbers(module, training, base)
        trials, failed = trials + others, failed or refused
    return Ways([trial.operations for trial in trials], not failed)


def _with_other_numbers(module: nn.Module, training: bool, base: Trial) -> tuple[list[Trial], bool]:
    """Runs with other answers to questions for a number, and whether some did not get through."""
    used = Reading(base.operations).calls.keys()
    trials, refused = [], False
    for number in _NUMBERS[1:]:
        try:
            trial = _passage(module, training, number, base.answers)
        except Exception:  # forward checks a number here
            refused = True
            continue
        if Reading(trial.operations).calls.keys() != used:
            raise RuntimeError("which convolutions forward uses depends on a number or length that it computes")
        trials.append(trial)
    return trials, refused


def _passage(module: nn.Module, training: bool, number: int, answers: Answers) -> Trial:
    """A run that reaches the end of forward with these answers; others are ``True``, or ``False`` if that fails."""
    given = dict(answers)
    while True:
        trial = Trial(module, training, number, given)
        try:
            trial.go()
        except Exception as error:
            failure = error
        else:
            return trial
        open_conditions = [c for c in trial.asked if c not in given]
        if not open_conditions or len(trial.asked) > _MOST_CONDITIONS:
            raise failure
        given |= {condition: True for condition in open_conditions[:-1]} | {open_conditions[-1]: False}
