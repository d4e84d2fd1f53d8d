"""What a Trainer loads into a standardized model, seen before it is loaded.

Composer has no event between reading a checkpoint and loading it, so the methods of its ``State`` that load are put
behind our own, for that one state.
"""

from __future__ import annotations

import weakref
from typing import Any

from composer.core import State
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ws_algorithm.checkpoints.run_formulas import recorded_formulas
from ws_algorithm.formula import FORMULAS, Formula, resolve_formula

_PLAIN, _RAW = ".weight", ".parametrizations.weight.original"
_LOADING = ("load_model_state", "load_optim_state")


def watch_loading(state: State, formula: str | Formula) -> None:
    """Let a state load only checkpoints of a formula, and optimizers of a model that was not standardized yet.

    From then on, loading raises ``ValueError`` before anything has changed if the checkpoint was trained with other
    formulas alone; and if its optimizer has no state of a parameter of the model, such as a gain that is new.

    Args:
        state: Of the Trainer. May be watched for several formulas, each of which must have been recorded.
        formula: That of an algorithm.
    """
    watched = getattr(vars(state).get(_LOADING[0]), "__self__", None)
    watch = watched if isinstance(watched, _Watch) else _Watch(state)
    watch.formulas.append(formula)
    for name in _LOADING:
        vars(state)[name] = getattr(watch, name)


class _Watch:
    """Stands before the methods of a state. Does not keep the state: it belongs to it."""

    def __init__(self, state: State) -> None:
        self._state = weakref.ref(state)
        self.formulas: list[str | Formula] = []

    def load_model_state(self, state_dict: dict[str, Any], *arguments: Any, **named: Any) -> None:
        recorded = recorded_formulas(state_dict.get("algorithms"))
        for formula in self.formulas if recorded else ():
            _check_recorded(formula, ["composer" if other is None else other for other in recorded])
        state = self._present()
        type(state).load_model_state(state, state_dict, *arguments, **named)

    def load_optim_state(self, state_dict: dict[str, Any], *arguments: Any, **named: Any) -> None:
        state = self._present()
        optimizers = state_dict["optimizers"]
        if optimizers is not None:  # Composer may leave them to the first process
            optimizers = {name: _with_raw_names(kept, state) for name, kept in optimizers.items()}
        try:
            type(state).load_optim_state(state, state_dict | {"optimizers": optimizers}, *arguments, **named)
        except KeyError as error:
            raise ValueError(
                f"The optimizer in the checkpoint has no state of {error}, which this model trains: training cannot go "
                "on from there. To start anew from its weights, load with load_weights_only=true, in a new folder."
            ) from error

    def _present(self) -> State:
        state = self._state()
        assert state is not None, "one of its own methods is called"
        return state


def _check_recorded(formula: str | Formula, recorded: list[str | Formula]) -> None:
    known = [FORMULAS.get(other, other) if isinstance(other, str) else other for other in recorded]
    if resolve_formula(formula) in known:
        return
    raise ValueError(
        f"`formula` (={formula!r}) of WeightStandardization must be that by which the checkpoint was trained, "
        f"{' and '.join(map(repr, recorded))}: with another one its weights compute another function. "
        "Name that one; or, to start from its raw weights all the same, load with load_weights_only=true and "
        'load_ignore_keys=["state/algorithms*"].'
    )


def _with_raw_names(optimizer: dict[str, Any], state: State) -> dict[str, Any]:
    """The state of an optimizer by the names that raw weights have now, if a plain model kept it."""
    kept = optimizer.get("state")
    if not kept or not all(isinstance(name, str) for name in kept):
        return optimizer
    raw = [name for name in _names_in_checkpoints(state.model) if name.endswith(_RAW) and name not in kept]
    names = {name.removesuffix(_RAW) + _PLAIN: name for name in raw}
    groups = [
        group | {"params": [names.get(name, name) for name in group["params"]]} for group in optimizer["param_groups"]
    ]
    state_by_name = {names.get(name, name): value for name, value in kept.items()}
    return optimizer | {"state": state_by_name, "param_groups": groups}


def _names_in_checkpoints(model: nn.Module) -> list[str]:
    """The names of parameters without what wrappers put into them."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    return [name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "") for name, _ in model.named_parameters()]
