"""Weight Standardization as a Composer algorithm: an event to a function, no logic of its own."""

from __future__ import annotations

try:
    from composer.core import Algorithm, Event, State
    from composer.loggers import Logger
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "composer":
        raise
    raise ModuleNotFoundError(
        "`WeightStandardization` is an algorithm for Composer's Trainer, which is not installed: pip install mosaicml. "
        "Without Composer, use `apply_weight_standardization(model)`.",
        name=error.name,
    ) from error

from ws_algorithm.formula import Formula, resolve_formula
from ws_algorithm.functional import apply_weight_standardization
from ws_algorithm.selection import check_n_last_layers_ignore


class WeightStandardization(Algorithm):
    r"""Standardize the weights of all convolutions of the Trainer's model, before training starts.

    .. math:: \hat{W}_{o} = (W_{o} - \mu_{o}) / s_{o}

    Runs on ``Event.INIT``, once; see :func:`~ws_algorithm.functional.apply_weight_standardization`. Logs the
    hyperparameter ``WeightStandardization/num_weights_standardized``. A drop-in for
    ``composer.algorithms.WeightStandardization``.

    A checkpoint of a run with this algorithm needs the algorithm again when it is loaded (``required_on_load()`` is
    ``True``). Composer finds algorithms to add by itself only among its own, so name it in ``algorithms`` when loading.

    Args:
        n_last_layers_ignore: How many convolutions, counted from the one that is executed last, are left alone: those
            of a prediction head. Default: ``0``.
        formula: A name in ``FORMULAS`` (``composer``, ``paper``, ``tensorflow``, ``timm``, ``bit``) or a
            :class:`~ws_algorithm.formula.Formula`. Default: ``"composer"``.

    Raises:
        ValueError: If an argument is not of that kind.

    Source: https://arxiv.org/abs/1903.10520.

    Example:
        >>> WeightStandardization(n_last_layers_ignore=1)
        WeightStandardization(n_last_layers_ignore=1, formula='composer')
    """

    def __init__(self, n_last_layers_ignore: int = 0, *, formula: str | Formula = "composer") -> None:
        self.n_last_layers_ignore = check_n_last_layers_ignore(n_last_layers_ignore)
        resolve_formula(formula)
        self.formula = formula

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n_last_layers_ignore={self.n_last_layers_ignore}, formula={self.formula!r})"

    @staticmethod
    def required_on_load() -> bool:
        return True

    def match(self, event: Event, state: State) -> bool:
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        count = apply_weight_standardization(state.model, self.n_last_layers_ignore, formula=self.formula)
        logger.log_hyperparameters({"WeightStandardization/num_weights_standardized": count})
