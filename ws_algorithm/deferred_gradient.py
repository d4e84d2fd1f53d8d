"""Gradients that reach the raw weight unprojected, and when they are projected."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ws_algorithm.formula import Formula, standardize
from ws_algorithm.multi_tensor import has_layout_of
from ws_algorithm.torch_internals import (
    apply_without_transforms,
    hook_count,
    is_recorded,
    is_reduced_by_ddp,
    is_transformed,
    references,
    references_of_a_gradient,
    will_accumulate,
)
from ws_algorithm.weight_cache import CachedWeight, WeightCache, project_cached


class CacheEntry:
    """One raw weight inside a scope: its standardized weight, and its gradient, which is projected once.

    In plain words: while ``pending`` is a cached weight, all that ``raw.grad`` holds is a sum of gradients with respect
    to that standardized weight, and :func:`flush_all` projects it. At any other time ``raw.grad`` is a true gradient,
    and what is added to it is projected first. Gradients from elsewhere (an L2 term of the loss, a plain layer that
    shares the raw weight) reach the raw weight through autograd; a hook flushes before the first of them.

    Args:
        raw: The raw weight.
        formula: The formula that standardizes it.
        caches: The caches of the standardizers that share the raw weight; the first has the memory.
        session: The session, which says whether it is active and standardizes all weights at once.
    """

    def __init__(self, raw: nn.Parameter, formula: Formula, caches: list[WeightCache], session: Any) -> None:
        self.raw = raw
        self.formula = formula
        self.caches = caches
        self._session = weakref.ref(
            session
        )  # graphs that a Trainer keeps refer to entries, and must not keep the model
        self.may_defer: bool = session.may_defer
        self.suspensions = 0  # steps of optimizers that are under way
        self.cached: CachedWeight | None = None
        self.pending: CachedWeight | None = None
        self.rescaled: dict[Any, Any] = {}  # with gain and shift, without gradients
        self._output: tuple[Tensor, CachedWeight, bool] | None = None
        self._hook: Any = None
        self._leaf_node: Any = None
        self._lock = threading.Lock()
        for cache in caches:
            cache.entry = self

    @property
    def session(self) -> Any:
        """Return the session, or ``None`` if it was forgotten without being closed."""
        return self._session()

    def get(self, raw: Any) -> Tensor | None:
        """Return the standardized weight, or ``None`` if autograd is to compute it.

        Args:
            raw: What the standardizer has as its raw weight now; a replica of a model has another one.
        """
        if raw is not self.raw or is_recorded(raw):
            return None
        session = self._session()
        if session is None or not session.is_active:
            if torch.is_grad_enabled():  # an exception may have ended a Trainer's step, and someone goes on by hand
                flush_all([self]) if session is None else session.flush()
            return None
        cached = self.cached
        if cached is None or not cached.is_valid():
            cached = self._refresh()
        if cached is None or (cached.stream is not None and cached.stream != torch.cuda.current_stream(raw.device)):
            return None  # another thread has closed the scope, or nothing orders the kernels of two streams
        if torch.is_grad_enabled() and raw.requires_grad:
            return None if is_transformed() else self._with_graph(cached)
        value = cached.value
        if value is not None and value.requires_grad:  # someone has made it a leaf of their own
            cached.set_value()
            value = cached.value
        return value

    def _refresh(self) -> CachedWeight | None:
        """Standardize the raw weight again, and at the first time with it all others of the session."""
        flush_all([self])
        self._output = None
        session = self._session()
        if session is not None:
            session.cache_weights([self] if self.cached is not None else None)
        return self.cached

    def replace(self, cached: CachedWeight | None) -> None:
        """Use another cached weight, or none, from now on."""
        if self.cached is not None:
            self.cached.close()
        self.cached = cached

    def _with_graph(self, cached: CachedWeight) -> Tensor:
        """Return the cached weight with one node of the graph, which all calls of a forward share.

        A node that outlived its backward would be older than those of the next forward: the engine would run it last,
        and all gradients would be alive until then.
        """
        is_reduced, output = is_reduced_by_ddp(), self._output
        if output is not None and output[1] is cached and output[2] is is_reduced:
            return output[0]
        if self._hook is None:
            # Weakly: a circle through the graph is one that Python's collector cannot see
            self._hook = self.raw.register_hook(while_alive(self._before_gradient_from_elsewhere))
            self._leaf_node = torch.autograd.graph.get_gradient_edge(self.raw).node
        graph: Any = _StraightThrough.apply(self.raw, self, cached, is_reduced)
        self._output = (graph, cached, is_reduced)
        return graph

    def end_node(self) -> None:
        """Begin a new node of the graph with the next forward."""
        self._output = None

    def defer(self, gradient: Tensor, cached: CachedWeight, is_ours: bool) -> bool:
        """Add a gradient to the sum that waits in ``raw.grad``; return whether that was possible.

        Args:
            gradient: The gradient with respect to the standardized weight.
            cached: The standardized weight.
            is_ours: Whether no one else has the gradient, so that its memory may become the sum.
        """
        raw = self.raw
        if not self.may_defer or self.suspensions > 0 or cached is not self.cached:
            return False
        if hook_count(raw) > 1 or not will_accumulate(self._leaf_node):
            return False
        with self._lock:  # several threads may run backwards
            total = raw.grad
            if total is None:
                raw.grad = _as_sum(gradient, raw, is_ours)
                self.pending = cached
            elif self.pending is cached:
                total.add_(gradient)
            else:
                return False
        return True

    def _before_gradient_from_elsewhere(self, gradient: Tensor | None) -> None:
        """Hook on the raw weight; deferred gradients reach it as ``None``."""
        if gradient is not None:
            self.may_defer = False  # also for other threads, which must not begin a sum beside it
            flush_all([self])

    def take_pending(self) -> tuple[Tensor, CachedWeight] | None:
        """Return the sum that has to be projected now, if there is one."""
        with self._lock:
            pending, self.pending = self.pending, None
            gradient = self.raw.grad
        return None if pending is None or gradient is None else (gradient, pending)

    def remove(self) -> None:
        """Cache and defer nothing from now on."""
        for cache in self.caches:
            cache.entry = None
        if self._hook is not None:
            self._hook.remove()
        self.may_defer, self._output, self._leaf_node, self.rescaled = False, None, None, {}
        self.replace(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class _StraightThrough(torch.autograd.Function):
    """Forward: the cached standardized weight. Backward: the gradient waits in ``raw.grad``, or is projected now."""

    apply = apply_without_transforms  # type: ignore[assignment]

    @staticmethod
    def forward(ctx: Any, raw: Tensor, entry: CacheEntry, cached: CachedWeight, is_reduced: bool) -> Tensor:
        ctx.own = entry, cached, is_reduced
        ctx.set_materialize_grads(False)
        return cached.value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, None, None, None]:
        if gradients[0] is None:  # a function behind the convolution has given none
            return None, None, None, None
        entry, cached, is_reduced = ctx.own
        # Of a sum of weights, both get the same gradient; and hooks may keep it
        is_ours = entry.raw.grad is None and references(gradients[0]) == references_of_a_gradient()
        gradient = gradients[0]
        entry.end_node()
        if torch.is_grad_enabled():
            flush_all([entry])
            return _differentiable_gradient(cached, gradient), None, None, None
        # A gradient that is averaged over ranks is projected before: they may have other weights, or leave out layers
        if not is_reduced and entry.defer(gradient, cached, is_ours):
            return None, None, None, None
        flush_all([entry])
        return cached.project(gradient.to(cached.raw.dtype)), None, None, None


def while_alive(method: Callable[..., None]) -> Callable[..., None]:
    """Return a function that calls a bound method for as long as its object is there, and does not keep it."""
    found = weakref.WeakMethod(method)

    def call(*arguments: Any) -> None:
        alive = found()
        if alive is not None:
            alive(*arguments)

    return call


def flush_all(entries: list[CacheEntry]) -> None:
    """Project the gradients that wait, so that ``raw.grad`` is the gradient of each raw weight."""
    pending = [entry.take_pending() for entry in entries]
    project_cached([one for one in pending if one is not None])


def _as_sum(gradient: Tensor, raw: Tensor, is_ours: bool) -> Tensor:
    """Return `gradient` as ``raw.grad`` may keep it and be added to; copied only where that is necessary."""
    if is_ours and gradient.dtype == raw.dtype and has_layout_of(gradient, raw):
        return gradient
    return torch.empty_like(raw).copy_(gradient)


def _differentiable_gradient(cached: CachedWeight, gradient: Tensor) -> Tensor:
    """Return the gradient of the raw weight as a function of the raw weight and of `gradient`."""
    if not cached.is_of_raw_weight():
        raise RuntimeError(
            "A weight that is standardized once was changed between a forward and its backward with create_graph=True. "
            "Run the backward first."
        )
    raw = cached.raw
    return torch.autograd.grad(standardize(raw, cached.formula), raw, gradient.to(raw.dtype), create_graph=True)[0]
