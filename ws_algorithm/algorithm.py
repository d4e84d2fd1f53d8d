"""Weight Standardization and Group Normalization as Composer algorithms, beside others and alike on all ranks."""

from __future__ import annotations

import logging

try:
    from composer.core import Algorithm, Event, State
    from composer.loggers import Logger
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "composer":
        raise
    raise ModuleNotFoundError(
        "`WeightStandardization` and `GroupNormalization` are algorithms for Composer's Trainer, which is not "
        "installed: pip install mosaicml. Without Composer, use `apply_weight_standardization(model)` and "
        "`apply_group_normalization(model)`.",
        name=error.name,
    ) from error

from composer.algorithms import EMA, SWA, LayerFreezing
from composer.utils import dist
from torch import nn

from ws_algorithm.checkpoint_loading import watch_loading
from ws_algorithm.formula import Formula, resolve_formula
from ws_algorithm.functional import check_selection, standardize_selection
from ws_algorithm.group_norm import replace_batch_norms
from ws_algorithm.group_norm_rules import GroupNormRules, Indivisible
from ws_algorithm.layers import standardizers_of
from ws_algorithm.patterns import Patterns
from ws_algorithm.selection import Layers, Rules, Selection, select_convolutions
from ws_algorithm.trainer_scopes import TrainerScopes

log = logging.getLogger(__name__)


class WeightStandardization(Algorithm):
    r"""Standardize the weights of the convolutions of the Trainer's model, before training starts.

    .. math:: \hat{W}_{o} = (W_{o} - \mu_{o}) / s_{o}

    Runs on ``Event.INIT``, once; see :func:`~ws_algorithm.functional.apply_weight_standardization`. Logs the
    hyperparameter ``WeightStandardization/num_weights_standardized``. A drop-in for
    ``composer.algorithms.WeightStandardization``.

    Its place in the Trainer's list does not matter. Algorithms that replace layers on ``Event.INIT`` (BlurPool,
    Factorize, StochasticDepth, ...) come first, and copies of the model that EMA and SWA have made are made again. If a
    standardized convolution is replaced later than that, ``fit`` stops before the first batch.

    A checkpoint of a run with this algorithm needs the algorithm again when it is loaded (``required_on_load()`` is
    ``True``). Composer finds algorithms to add by itself only among its own, so name it in ``algorithms`` when loading,
    with the formula of that run. A checkpoint of a run without it continues with its optimizer's state.

    Args:
        n_last_layers_ignore: How many convolutions, counted from the one that is executed last, are left alone: those
            of a prediction head. Default: ``0``.
        layers: ``"all"``, or ``"normalized"`` for the authors' rule: only convolutions that a normalization layer
            follows. Default: ``"all"``.
        include: Qualified names of layers in the Trainer's model, or ``fnmatch`` patterns; only convolutions that one
            of them matches are standardized. ``None`` for no such rule. Default: ``None``.
        exclude: The same; convolutions that one of them matches are left alone. Default: ``None``.
        formula: A name in ``FORMULAS`` (``composer``, ``paper``, ``tensorflow``, ``timm``, ``bit``, ``affine``,
            ``scaled``) or a :class:`~ws_algorithm.formula.Formula`. The gain and shift of ``affine`` are taken from the
            weights that the model has, and anew from plain ones that ``load_path`` brings; the gains of ``scaled`` are
            added to the optimizer, in the parameter group of their weight. Default: ``"composer"``.
        once_per_step: Whether to standardize once per optimizer step, however many micro-batches it has, and to project
            the gradients once, before any algorithm reads them; and once per evaluation and prediction. See
            :func:`~ws_algorithm.once.standardize_once`. Where that would not be exact, autograd does it. Default:
            ``True``.

    Raises:
        ValueError: If an argument is not of that kind; from the Trainer, if a convolution cannot be standardized, or
            the ranks of a distributed run would standardize different ones, or the checkpoint to load was trained with
            another formula; from ``fit``, if standardized convolutions are gone.

    Source: https://arxiv.org/abs/1903.10520.

    Example:
        >>> WeightStandardization(layers="normalized").rules
        Rules(n_last_layers_ignore=0, layers='normalized', include=None, exclude=None)
    """

    def __init__(
        self,
        n_last_layers_ignore: int = 0,
        *,
        layers: Layers = "all",
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        formula: str | Formula = "composer",
        once_per_step: bool = True,
    ) -> None:
        if not isinstance(once_per_step, bool):
            raise ValueError(f"`once_per_step` (={once_per_step!r}) must be True or False.")
        self.rules = Rules(n_last_layers_ignore, layers, include, exclude)
        self._resolved_formula = resolve_formula(formula)
        self.n_last_layers_ignore = self.rules.n_last_layers_ignore
        self.formula = formula
        self.once_per_step = once_per_step
        self._standardized: dict[str, nn.Module] = {}
        self._is_check_due = False
        self._scopes: TrainerScopes | None = None

    def __repr__(self) -> str:
        rules = self.rules
        return (
            f"{type(self).__name__}(n_last_layers_ignore={rules.n_last_layers_ignore}, layers={rules.layers!r}, "
            f"include={rules.include!r}, exclude={rules.exclude!r}, formula={self.formula!r}, "
            f"once_per_step={self.once_per_step!r})"
        )

    @staticmethod
    def required_on_load() -> bool:
        return True

    def match(self, event: Event, state: State) -> bool:
        if event == Event.INIT:
            return not _deferred(self, state.algorithms)
        if event == Event.BATCH_START:
            return self._is_check_due
        if self._scopes is not None:
            self._scopes.follow(event, state)
        return event == Event.FIT_START and bool(self._standardized)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:  # others may still come on this event
            self._is_check_due = True
            return
        if event == Event.BATCH_START:
            self._is_check_due = False
            _check_still_standardized(self._standardized, state.model)
            return
        selection = _select_on_all_ranks(state.model, self.rules, self._resolved_formula)
        count = standardize_selection(selection, self._resolved_formula, state.optimizers)
        watch_loading(state, self.formula)
        self._standardized = {str(c): c.module for c in selection.choices if standardizers_of(c.module)}
        self._scopes = TrainerScopes() if self.once_per_step and self._standardized else None
        logger.log_hyperparameters({"WeightStandardization/num_weights_standardized": count})
        _copy_model_again(state, logger)
        if any(isinstance(algorithm, LayerFreezing) for algorithm in state.algorithms):
            log.warning("LayerFreezing freezes layers without parts only, so it never freezes one standardized.")


class GroupNormalization(Algorithm):
    """Replace the batch norms of the Trainer's model by GroupNorms, before training starts.

    Runs on ``Event.INIT``; see :func:`~ws_algorithm.group_norm.apply_group_normalization`. Logs the hyperparameter
    ``GroupNormalization/num_layers_replaced``.

    Its place beside :class:`WeightStandardization`, surgery on convolutions, EMA and SWA does not matter. Name it
    before Composer's LowPrecisionGroupNorm, which takes the GroupNorms that are there when it runs. The batch norms of
    GhostBatchNorm are left alone.

    A checkpoint of a run with this algorithm needs the algorithm again when it is loaded (``required_on_load()`` is
    ``True``). Composer finds algorithms to add by itself only among its own, so name it in ``algorithms`` when loading;
    a resumed run without it would go on with batch norms, since Composer does not load strictly then.

    Args:
        num_groups: The number of groups of each layer. Default: ``32``.
        channels_per_group: Instead, the number of channels of each group. Default: ``None``.
        indivisible: What to do where that does not divide the channels: ``"error"``, or ``"largest_divisor"`` for the
            largest divisor of the channels that is at most that number. Default: ``"error"``.
        copy_affine: Whether the values of scale and shift are kept. Default: ``False``.
        eps: Added to the variance. Default: ``1e-5``.
        include: Qualified names of layers in the Trainer's model, or ``fnmatch`` patterns; only normalization layers
            that one of them matches are replaced. ``None`` for no such rule. Default: ``None``.
        exclude: The same; layers that one of them matches are left alone. Default: ``None``.

    Raises:
        ValueError: If an argument is not of that kind; from the Trainer, if a batch norm cannot be replaced.

    Source: https://arxiv.org/abs/1803.08494.

    Example:
        >>> GroupNormalization(16, indivisible="largest_divisor").rules.groups_of(24)
        12
    """

    def __init__(
        self,
        num_groups: int = 32,
        *,
        channels_per_group: int | None = None,
        indivisible: Indivisible = "error",
        copy_affine: bool = False,
        eps: float = 1e-5,
        include: Patterns | None = None,
        exclude: Patterns | None = None,
    ) -> None:
        self.rules = GroupNormRules(num_groups, channels_per_group, indivisible, copy_affine, eps, include, exclude)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rules})"

    @staticmethod
    def required_on_load() -> bool:
        return True

    def match(self, event: Event, state: State) -> bool:
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        count = replace_batch_norms(state.model, self.rules, state.optimizers)
        logger.log_hyperparameters({"GroupNormalization/num_layers_replaced": count})
        _copy_model_again(state, logger)


def _copy_model_again(state: State, logger: Logger) -> None:
    """EMA and SWA copy the model on ``Event.INIT``; their copies need the parameters and buffers that it has now."""
    for algorithm in state.algorithms:
        if isinstance(algorithm, (EMA, SWA)):
            algorithm.apply(Event.INIT, state, logger)


class _AtTheEnd(Algorithm):
    """Runs an algorithm on ``Event.INIT`` from the end of the Trainer's list, and leaves the list."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm

    def match(self, event: Event, state: State) -> bool:
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        state.algorithms.remove(self)
        self.algorithm.apply(event, state, logger)


def _deferred(algorithm: WeightStandardization, algorithms: list[Algorithm]) -> bool:
    """Whether others follow in the Trainer's list; if so, the algorithm will also be asked at its end.

    Composer asks the algorithms one after the other, and those that are appended meanwhile as well.
    """
    if not isinstance(algorithms, list) or algorithm not in algorithms:  # not called by a Trainer
        return False
    followers = algorithms[algorithms.index(algorithm) + 1 :]
    if all(isinstance(follower, WeightStandardization) for follower in followers):
        return False
    if not any(isinstance(follower, _AtTheEnd) and follower.algorithm is algorithm for follower in followers):
        algorithms.append(_AtTheEnd(algorithm))
    return True


def _select_on_all_ranks(model: nn.Module, rules: Rules, formula: Formula) -> Selection:
    """Select, and stop on every rank if one of them cannot, or two would standardize different convolutions."""
    selection, outcome = None, None
    try:
        selection = select_convolutions(model, rules)
        check_selection(selection)
        outcome = [repr(formula), *sorted(str(choice) for choice in selection.chosen)]
    except Exception as error:
        if dist.get_world_size() == 1:
            raise
        outcome = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    if dist.get_world_size() > 1:
        _check_ranks_agree(dist.all_gather_object(outcome))
    assert selection is not None
    return selection


def _check_ranks_agree(outcomes: list[list[str] | str]) -> None:
    """Raise ``ValueError`` unless all ranks have the same formula and convolutions; a string is a rank's complaint."""
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, str):
            raise ValueError(f"Rank {rank}: {outcome}")
        if outcome != outcomes[0]:
            first, other = outcomes[0][1:], outcome[1:]
            formulas = f"by {outcomes[0][0]} and {outcome[0]}; " if outcome[0] != outcomes[0][0] else ""
            raise ValueError(
                f"The ranks would standardize differently: rank 0 {len(first)} convolutions, rank {rank} {len(other)}; "
                f"{formulas}only rank 0: {', '.join(sorted(set(first) - set(other))) or 'none'}; only rank {rank}: "
                f"{', '.join(sorted(set(other) - set(first))) or 'none'}. Build the same model on every rank."
            )


def _check_still_standardized(standardized: dict[str, nn.Module], model: nn.Module) -> None:
    """Raise ``ValueError`` for convolutions that are gone, unless a standardized one stands in their place."""
    present = {_unwrapped(name): layer for name, layer in model.named_modules() if standardizers_of(layer)}
    layers = set(present.values())
    gone = [
        name
        for name, conv in standardized.items()
        if conv not in layers and name not in present and f"module.{name}" not in present
    ]
    if gone:
        raise ValueError(
            f"{len(gone)} convolutions that WeightStandardization standardized are gone or no longer standardized: "
            f"{', '.join(gone)}. Something replaced them after Event.INIT; let it do so on Event.INIT, or before the "
            "Trainer is built."
        )


def _unwrapped(name: str) -> str:
    """A qualified name without what torch.compile and FSDP put into it."""
    return name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")
