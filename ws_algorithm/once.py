"""Weight Standardization once per optimizer step instead of once per micro-batch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ws_algorithm.deferral import Deferral, Loan, settle_all, standardize_loans
from ws_algorithm.layers import parametrizations_of, raw_weight
from ws_algorithm.parametrization import WeightStandardizer

log = logging.getLogger(__name__)

_EXACT = "%s weights of %s are standardized in every forward by autograd, not once per step: %s."
_PROJECTED = "%sGradients of %s are projected in every backward, not once per step: %s."
_logged: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


@contextmanager
def standardize_once(model: nn.Module) -> Iterator[None]:
    r"""Standardize the weights of `model` once for all forwards and backwards inside, and project their gradients once.

    One optimizer step of micro-batches is many forwards and backwards with the same weights. The gradient of the
    standardization is linear in :math:`g = dL/d\hat{W}` and depends on nothing else but :math:`W`, so that

    .. math:: \frac{dL}{dW} = \sum_k P_W(g_k) = P_W \Big( \sum_k g_k \Big)

    Inside, forwards use a standardized weight that is held, already in autocast's dtype, and ``raw.grad`` collects
    :math:`\sum_k g_k`; when the context ends, also by an exception, it is projected. So end it **before** gradients are
    clipped, read or stepped with::

        with standardize_once(model):
            for images, labels in micro_batches:
                loss_function(model(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    The gradients are those of autograd, up to rounding, in every case. Weights for which one projection per step would
    not give them are projected in each backward (gradients that are accumulated to older ones, hooks on the raw weight,
    ``torch.autograd.grad``, gradients that also come from elsewhere, such as an L2 term of the loss) or
    differentiated by autograd (``create_graph=True``; compiled, traced or FSDP-sharded models). A weight that changes
    inside is standardized again. Segments under ``torch.utils.checkpoint`` belong inside together with their backward.
    Several processes under ``DistributedDataParallel`` need equal weights on all ranks. Several threads may run inside
    one context, if they are joined before it ends. ``conv.weight`` is one tensor for all calls, to be read only.

    Args:
        model: A model with standardized convolutions; may be wrapped in ``DistributedDataParallel``. Contexts may be
            nested.

    Raises:
        ValueError: If `model` is not a module, or is inside a context of another thread.

    Example:
        >>> import torch
        >>> from ws_algorithm import apply_weight_standardization
        >>> conv = torch.nn.Conv2d(3, 8, 3)
        >>> _ = apply_weight_standardization(conv)
        >>> with standardize_once(conv):
        ...     for _ in range(4):
        ...         conv(torch.randn(1, 3, 8, 8)).square().mean().backward()
        >>> gradient = conv.parametrizations.weight.original.grad.flatten(1)
        >>> bool(gradient.sum(1).abs().max() < 1e-4 * gradient.abs().sum(1).max())  # the mean is projected out
        True
    """
    session = OnceSession(model)
    session.open()
    try:
        yield
    finally:
        session.close()


class OnceSession:
    """What :func:`standardize_once` does on its way in and out, for those who cannot use a ``with`` block.

    Args:
        model: A model with standardized convolutions.
        may_defer: Whether gradients may wait for :meth:`close`; if not, each backward projects its own.

    Raises:
        ValueError: If `model` is not a module.
    """

    def __init__(self, model: nn.Module, may_defer: bool = True) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        self.model = model
        self.may_defer = may_defer
        self.thread = threading.get_ident()
        self._lock = threading.Lock()
        self._is_lending: Callable[[], bool] = lambda: True
        self._own: list[tuple[WeightStandardizer, Loan]] = []
        self._of_others: list[Loan] = []
        self._step_hooks: list[Any] = []

    def lend_while(self, is_lending: Callable[[], bool]) -> None:
        """Lend only when a function says so; at other times autograd standardizes."""
        self._is_lending = is_lending

    def is_lending(self) -> bool:
        """Whether standardized weights are lent now."""
        return self._is_lending()

    def open(self) -> None:
        """Lend standardized weights to the convolutions from now on."""
        standardizers = _standardizers_by_raw_weight(self.model)
        if not standardizers:
            log.warning("%s has no standardized layer; nothing is standardized once.", type(self.model).__name__)
        reason = why_not_once(self.model)
        if reason is not None:
            _log_once(self.model, _EXACT, len(standardizers), reason)
            return
        for raw, group in standardizers.items():
            _end_abandoned_loans(group)
            loans = {standardizer.memory.loan for standardizer in group} - {None}
            self._check_thread(loans)
            self._of_others += [loan for loan in loans if loan is not None]
            if loans or len({standardizer.formula for standardizer in group}) > 1:
                continue
            if any(standardizer.memory.never_once_because for standardizer in group):
                continue
            loan = Loan(Deferral(raw, self.may_defer), group[0].formula, self)
            for standardizer in group:
                standardizer.memory.loan = loan
                self._own.append((standardizer, loan))
        self._step_hooks = [
            register_optimizer_step_pre_hook(lambda optimizer, *_: self._pause(optimizer, 1)),
            register_optimizer_step_post_hook(lambda optimizer, *_: self._pause(optimizer, -1)),
        ]

    def _check_thread(self, loans: set[Loan | None]) -> None:
        """Raise ``ValueError`` if another thread would settle gradients while this one computes them."""
        if any(loan is not None and loan.lender.thread != self.thread and loan.lender.is_lending() for loan in loans):
            self.close()
            raise ValueError(
                "`model` is inside standardize_once in another thread already. Open one context around all threads "
                "that use the model, and start and join them inside."
            )

    def standardize(self) -> None:
        """Standardize all raw weights at once, when the first is asked for: by then autocast and ``zero_grad`` are."""
        with self._lock:
            loans = [
                loan for loan in self._loans() if loan.deferral.held is None and loan.deferral.raw.device.type != "meta"
            ]
            standardize_loans(loans)
            ddp = DistributedDataParallel._active_ddp_module
            if ddp is not None:
                for loan in loans:
                    loan.deferral.join(ddp)
            _count_zeros_as_pending([loan.deferral for loan in loans])

    def settle(self) -> None:
        """Make the gradients of all raw weights those of autograd."""
        settle_all([loan.deferral for loan in [*self._loans(), *self._of_others]])

    def close(self) -> None:
        """Settle, and leave the convolutions to themselves again."""
        try:
            self.settle()
        finally:
            for hook in self._step_hooks:
                hook.remove()
            reasons: dict[str, int] = {}
            for standardizer, loan in self._own:
                standardizer.memory.loan = None
                loan.deferral.close()
                self._remember(standardizer, loan.deferral, reasons)
            self._own, self._of_others = [], []
            for reason, count in reasons.items():
                _log_once(self.model, _EXACT, count, reason)

    def _pause(self, optimizer: torch.optim.Optimizer, pauses: int) -> None:
        """A step of an optimizer inside reads gradients, and a closure makes new ones: none of them may wait."""
        stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        deferrals = [loan.deferral for loan in self._loans() if loan.deferral.raw in stepped]
        settle_all(deferrals)
        for deferral in deferrals:
            deferral.pauses = max(0, deferral.pauses + pauses)
            if pauses < 0:
                deferral.forget()

    def _loans(self) -> list[Loan]:
        return list(dict.fromkeys(loan for _, loan in self._own))

    def _remember(self, standardizer: WeightStandardizer, deferral: Deferral, reasons: dict[str, int]) -> None:
        if deferral.projected_because is not None:
            _log_once(self.model, _PROJECTED, "", deferral.projected_because)
        reason = deferral.exact_because
        if reason is not None and standardizer.memory.never_once_because is None:
            reasons[reason] = reasons.get(reason, 0) + 1
            standardizer.memory.never_once_because = reason


def why_not_once(model: nn.Module) -> str | None:
    """Why autograd has to standardize `model`, if it has to."""
    for module in model.modules():
        is_compiled = getattr(module, "_compiled_call_impl", None) is not None or hasattr(
            vars(module).get("forward"), "_torchdynamo_orig_callable"
        )
        if is_compiled or type(module).__name__ == "OptimizedModule":
            return "the model is compiled"
        if any(cls.__name__ in ("FullyShardedDataParallel", "FSDPModule") for cls in type(module).__mro__):
            return "its weights are sharded (FSDP)"
    return None


def _standardizers_by_raw_weight(model: nn.Module) -> dict[nn.Parameter, list[WeightStandardizer]]:
    """Of weights whose raw weight is what the standardizer standardizes."""
    by_raw: dict[nn.Parameter, list[WeightStandardizer]] = {}
    for layer in model.modules():
        first = next(iter(parametrizations_of(layer)), None)
        if not isinstance(first, WeightStandardizer):
            continue
        raw = raw_weight(layer)
        if type(raw) is nn.Parameter and not raw.is_complex():
            by_raw.setdefault(raw, []).append(first)
    return by_raw


def _end_abandoned_loans(group: list[WeightStandardizer]) -> None:
    """A session that an exception has left notices it when it is asked."""
    for standardizer in group:
        if standardizer.memory.loan is not None:
            standardizer.memory.loan.lender.is_lending()


def _count_zeros_as_pending(deferrals: list[Deferral]) -> None:
    """A gradient of zeros, as ``zero_grad(set_to_none=False)`` leaves it, is as good as none."""
    by_device: dict[torch.device, list[Deferral]] = {}
    for deferral in deferrals:
        if deferral.raw.grad is not None:
            by_device.setdefault(deferral.raw.grad.device, []).append(deferral)
    for group in by_device.values():
        any_nonzero = torch.stack([deferral.raw.grad.any() for deferral in group if deferral.raw.grad is not None])
        for deferral, nonzero in zip(group, any_nonzero.tolist(), strict=True):
            if not nonzero and deferral.may_defer:
                deferral.count_as_pending()


def _log_once(model: nn.Module, text: str, count: int | str, reason: str) -> None:
    """Say what is not done once per step, and why, for the first of many contexts."""
    message = text % (count, type(model).__name__, reason)
    if message not in _logged.setdefault(model, set()):
        _logged[model].add(message)
        log.warning(message)
