"""Weight Standardization once per optimizer step or evaluation instead of once per forward."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ws_algorithm.deferred_gradient import CacheEntry, flush_all, while_alive
from ws_algorithm.formula import Formula
from ws_algorithm.layers import has_forward_of_known_package, parametrizations_of, raw_weight
from ws_algorithm.parametrization import WeightStandardizer
from ws_algorithm.torch_internals import is_compiled, may_leave_out_layers
from ws_algorithm.weight_cache import cache_weights, convolution_dtype

log = logging.getLogger(__name__)

_logged: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


@contextmanager
def standardize_once(model: nn.Module) -> Iterator[None]:
    r"""Standardize the weights of `model` once for all forwards and backwards inside, and project their gradients once.

    A scope is an optimizer step of several micro-batches, or an evaluation. The gradient of the standardization is
    linear in :math:`g = dL/d\hat{W}` and depends on nothing else but :math:`W`, so that

    .. math:: \frac{dL}{dW} = \sum_k P_W(g_k) = P_W \Big( \sum_k g_k \Big)

    Inside, forwards use a standardized weight that is cached, in autocast's dtype, and ``raw.grad`` collects
    :math:`\sum_k g_k`, which is projected when the scope ends, also by an exception. So end it **before** gradients are
    clipped, read or stepped with. Outside of scopes nothing is cached::

        with standardize_once(model):
            for images, labels in micro_batches:
                loss_function(model(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        with standardize_once(model), torch.no_grad():  # an evaluation
            outputs = [model(images) for images in batches]

    The contract: inside, do not edit raw weights in ways that PyTorch does not count (through ``.data`` or NumPy), edit
    ``raw.grad`` by linear maps only, and only read ``conv.weight``, which is one tensor for all calls. Other edits,
    ``zero_grad``, steps of an optimizer and loading are noticed. Where one projection per step would not give the
    gradients of autograd, each backward projects its own (older gradients in ``raw.grad``, hooks on the raw weight,
    ``torch.autograd.grad``, an L2 term of the loss, averages of ``DistributedDataParallel``), or autograd standardizes
    (``create_graph=True``; compiled, traced or FSDP-sharded models; convolutions whose class has a forward of its own).
    Segments under ``torch.utils.checkpoint`` belong inside together with their backward, and threads are joined inside.

    The standardized weights keep their memory from scope to scope; see :func:`release_standardized_weights`.

    Args:
        model: A model with standardized convolutions; may be wrapped in ``DistributedDataParallel``. Scopes may be
            nested.

    Raises:
        ValueError: If `model` is not a module, or is inside a scope of another thread.

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
    session = StandardizeOnceSession(model)
    session.open()
    try:
        yield
    finally:
        session.close()


def release_standardized_weights(model: nn.Module) -> int:
    """Give back the memory that the standardized weights of `model` keep between scopes.

    It is one copy of the standardized weights, in the dtype of the last scope. It is also given back when the
    standardization is removed, and when the model is moved or converted by ``model.to()``.

    Args:
        model: The model.

    Returns:
        The number of bytes.

    Raises:
        ValueError: If `model` is not a module.

    Example:
        >>> import torch
        >>> from ws_algorithm import apply_weight_standardization
        >>> conv = torch.nn.Conv2d(4, 8, 3)
        >>> _ = apply_weight_standardization(conv)
        >>> with standardize_once(conv), torch.no_grad():
        ...     _ = conv(torch.randn(1, 4, 8, 8))
        >>> release_standardized_weights(conv)  # 288 weights, and mean and scale of 8 channels, in float32
        1216
    """
    _check_module(model)
    return sum(module.cache.release() for module in model.modules() if isinstance(module, WeightStandardizer))


class StandardizeOnceSession:
    """What :func:`standardize_once` does on its way in and out, for those who cannot use a ``with`` block.

    Args:
        model: A model with standardized convolutions.
        may_defer: Whether gradients may wait for :meth:`close`; if not, each backward projects its own.

    Raises:
        ValueError: If `model` is not a module.
    """

    is_active: Any = True  # whether standardized weights are cached now; at other times autograd standardizes

    def __init__(self, model: nn.Module, may_defer: bool = True) -> None:
        _check_module(model)
        self.model = model
        self.may_defer = may_defer
        self.thread = threading.get_ident()
        self._lock = threading.Lock()
        self._own: list[CacheEntry] = []
        self._of_outer: list[CacheEntry] = []
        self._remove: Any = None

    def on_mode_change(self) -> None:
        """Take note that the model was set to training or evaluation."""

    def open(self) -> None:
        """Cache standardized weights from now on; they are computed when the first is asked for.

        By then autocast is on, ``zero_grad`` has been called, and averages of weights are in their place.
        """
        modules = list(self.model.modules())
        if not any(isinstance(module, WeightStandardizer) for module in modules):
            _warn_once(self.model, "has no standardized layer; nothing is standardized once.")
        reason = unsupported_reason(modules)
        if reason is not None:
            _warn_once(self.model, f"is standardized by autograd in every forward, not once per step: {reason}.")
            return
        if any(map(may_leave_out_layers, modules)):
            _warn_once(
                self.model,
                "has its gradients projected in every backward, not once per step: DistributedDataParallel with "
                "find_unused_parameters or static_graph lets a rank leave out layers that others use.",
            )
        step = while_alive(self._on_step)
        hooks = [
            register_optimizer_step_pre_hook(lambda optimizer, *_: step(optimizer, 1)),
            register_optimizer_step_post_hook(lambda optimizer, *_: step(optimizer, -1)),
        ]
        # Also if the session is forgotten, with a Trainer that an exception has stopped in a step
        self._remove = weakref.finalize(self, _flush_and_remove, self._own, hooks)
        self._remove.atexit = False
        for raw, standardizers in _standardizers_by_raw_weight(modules).items():
            outer = self._entries_of_others(standardizers)
            self._of_outer += outer
            if not outer and len({standardizer.formula for standardizer in standardizers}) == 1:
                caches = [standardizer.cache for standardizer in standardizers]
                self._own.append(CacheEntry(raw, standardizers[0].formula, caches, self))

    def _entries_of_others(self, standardizers: list[WeightStandardizer]) -> list[CacheEntry]:
        """Return the entries of outer scopes; sessions that an exception has left behind are closed.

        Raises:
            ValueError: If another thread would flush gradients while this one computes them.
        """
        entries = {standardizer.cache.entry for standardizer in standardizers} - {None}
        for entry in entries:
            session = entry.session
            if session is None:
                flush_all([entry])
                entry.remove()
            elif not session.is_active:
                session.close()
            elif session.thread != self.thread:
                self.close()
                raise ValueError(
                    "`model` is inside standardize_once in another thread already. Open one scope around all threads "
                    "that use the model, and start and join them inside."
                )
        return [entry for entry in entries if entry.session is not None and entry.session.is_active]

    def cache_weights(self, entries: list[CacheEntry] | None = None) -> None:
        """Standardize the raw weights of entries, or of all that have no standardized weight; together if possible."""
        with self._lock:
            if entries is None:
                entries = [entry for entry in self._own if entry.cached is None]
            groups: dict[tuple[Formula, torch.dtype], list[CacheEntry]] = {}
            for entry in entries:
                entry.replace(None)
                groups.setdefault((entry.formula, convolution_dtype(entry.raw)), []).append(entry)
            for (formula, dtype), group in groups.items():
                caches, raws = [entry.caches[0] for entry in group], [entry.raw for entry in group]
                for entry, cached in zip(group, cache_weights(caches, raws, formula, dtype), strict=True):
                    entry.replace(cached)

    def flush(self) -> None:
        """Make the gradients of all raw weights those of autograd."""
        flush_all([*self._own, *self._of_outer])

    def close(self) -> None:
        """Flush, and leave the convolutions to autograd again."""
        try:
            flush_all(self._of_outer)
        finally:
            if self._remove is not None:
                self._remove()
            self._own, self._of_outer = [], []

    def _on_step(self, optimizer: torch.optim.Optimizer, suspensions: int) -> None:
        """Let a step of an optimizer inside read gradients; a closure makes new ones, none of which may wait."""
        stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        entries = [entry for entry in self._own if entry.raw in stepped]
        flush_all(entries)
        for entry in entries:
            entry.suspensions = max(0, entry.suspensions + suspensions)
            if suspensions < 0:
                entry.replace(None)  # it may have written to the raw weight in a way that PyTorch does not count


def _flush_and_remove(entries: list[CacheEntry], hooks: list[Any]) -> None:
    try:
        flush_all(entries)
    finally:
        for removable in (*hooks, *entries):
            removable.remove()


def unsupported_reason(modules: Sequence[nn.Module]) -> str | None:
    """Return why autograd has to standardize a model of these modules, or ``None`` if it need not."""
    if any(map(is_compiled, modules)):
        return "the model is compiled"
    classes = {cls for kind in set(map(type, modules)) for cls in kind.__mro__}
    if {cls.__name__ for cls in classes} & {"FullyShardedDataParallel", "FSDPModule"}:
        return "its weights are sharded (FSDP)"
    is_replicated = any(cls.__module__ == "torch.distributed._composable.replicate" for cls in classes)
    return "its gradients are averaged by replicate(), which does not say when" if is_replicated else None


def _standardizers_by_raw_weight(modules: Sequence[nn.Module]) -> dict[nn.Parameter, list[WeightStandardizer]]:
    """Return the standardizers whose weight can be cached.

    Not if the raw weight is no ``Parameter`` (FSDP, pruning, replicas), is complex, or was made in inference mode or on
    the meta device; nor if the class of the layer has a forward of unknown origin, which may write to its weight.
    """
    by_raw: dict[nn.Parameter, list[WeightStandardizer]] = {}
    for layer in modules:
        first = next(iter(parametrizations_of(layer)), None)
        if not isinstance(first, WeightStandardizer) or not has_forward_of_known_package(layer):
            continue
        raw = raw_weight(layer)
        if type(raw) is nn.Parameter and not (raw.is_complex() or raw.is_inference() or raw.is_meta):
            by_raw.setdefault(raw, []).append(first)
    return by_raw


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")


def _warn_once(model: nn.Module, text: str) -> None:
    """Say something of a model in the first of many scopes."""
    said = _logged.setdefault(model, set())
    if text not in said:
        said.add(text)
        log.warning("%s %s", type(model).__name__, text)
