"""Gradients that reach the raw weight unprojected, and the account of when they have to be projected."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ws_algorithm.formula import Formula, standardize
from ws_algorithm.holding import HeldWeight, dtype_in_convolution, hold_all
from ws_algorithm.multi_tensor import project_all


class Deferral:
    """The gradient of one raw weight while it is standardized once.

    In plain words: while ``is_pending``, all that ``raw.grad`` holds is the sum of gradients with respect to the
    standardized weight ``held``, and :meth:`settle` projects it. At any other time ``raw.grad`` is a true gradient, and
    what is added to it is projected first. Whatever else adds to ``raw.grad`` settles it before.

    Args:
        raw: The raw weight.
        may_defer: Whether gradients may wait at all; if not, each is projected in its backward.
    """

    def __init__(self, raw: nn.Parameter, may_defer: bool) -> None:
        self.raw = raw
        self.may_defer = may_defer
        self.held: HeldWeight | None = None
        self.is_pending = False
        self.is_open = True
        self.pauses = 0
        self.exact_because: str | None = None
        self.projected_because: str | None = None
        self.backwards = 0
        # Whether raw.grad may be replaced when it is projected: it began empty, so no one expects it to stay one tensor
        self._may_own = not raw.is_cuda
        self._owns_gradient = False
        self._delivered: dict[int, list[Tensor]] = {}  # what was passed on, by the backward that is under way
        self._lock = threading.Lock()
        self._hook: Any = None

    def hold(self, held: HeldWeight) -> None:
        """Go on with another standardized weight."""
        self.settle()
        self.held = held

    def watch(self) -> None:
        """See from now on all that is added to ``raw.grad``."""
        if self._hook is None:
            self._hook = self.raw.register_hook(self._check)

    def count_as_pending(self) -> None:
        """Take a gradient of zeros for one that waits."""
        self.watch()
        self.is_pending, self._owns_gradient = True, False

    def forget(self) -> None:
        """Have the raw weight standardized again: it may have been written to in a way that PyTorch does not count."""
        self.settle()
        self.held = None

    def join(self, ddp: DistributedDataParallel) -> None:
        """Take account of a ``DistributedDataParallel`` that reduces the gradient into memory of its own."""
        self._owns_gradient = self._may_own = False
        if self.may_defer and (ddp.find_unused_parameters or ddp.static_graph):
            self.settle()
            self.may_defer = False
            self.projected_because = (
                "DistributedDataParallel with find_unused_parameters or static_graph lets a rank leave out layers that "
                "others use"
            )

    def close(self) -> None:
        """Defer nothing from now on."""
        self.is_open = False
        if self._hook is not None:
            self._hook.remove()

    def settle(self) -> None:
        """Make ``raw.grad`` the true gradient."""
        settle_all([self])

    def receive(self, gradient: Tensor, held: HeldWeight, accumulator: Any) -> Tensor:
        """What to pass on to the raw weight, from the gradient with respect to the standardized weight `held`."""
        self.backwards += 1
        if torch.is_grad_enabled():
            self.settle()
            self.exact_because = "second order (create_graph=True)"
            return _differentiable_gradient(self.raw, held, gradient)
        gradient = gradient.to(self.raw.dtype)
        if self._may_pass_on(held, accumulator):
            passed_on = self._pass_on(gradient)
            if passed_on is not None:
                return passed_on
        self.settle()
        return held.project(gradient)

    def _may_pass_on(self, held: HeldWeight, accumulator: Any) -> bool:
        if not (self.is_open and self.may_defer and held is self.held) or self.pauses > 0 or _has_other_hooks(self.raw):
            return False
        return _will_accumulate(accumulator)

    def _pass_on(self, gradient: Tensor) -> Tensor | None:
        """The gradient to pass on, or ``None`` if ``raw.grad`` holds a true one. Threads may do so at the same time."""
        with self._lock:
            if self.raw.grad is None:
                self.is_pending, self._owns_gradient = True, self._may_own
                gradient = _with_memory_of_its_own(gradient)  # autograd may take it as raw.grad, and add to it in place
            elif not self.is_pending:
                return None
            self._delivered.setdefault(torch._C._current_graph_task_id(), []).append(gradient)
            return gradient

    def _check(self, total: Tensor) -> Tensor | None:
        """A hook on the raw weight: settle unless `total` is exactly what was delivered."""
        delivered = self._delivered.pop(torch._C._current_graph_task_id(), [])
        if len(delivered) == 1 and total.data_ptr() == delivered[0].data_ptr() and self.is_pending:
            return None
        self.settle()
        if not delivered:
            return None
        self.may_defer = False
        self.exact_because = "the raw weight gets gradients from elsewhere too (an L2 term of the loss, a tied layer)"
        assert self.held is not None
        deferred = torch.stack(delivered).sum(0)
        return total - deferred + self.held.project(deferred)

    def settle_by_replacing(self) -> bool:
        """Settle with a new tensor as ``raw.grad``, where no one expects it to stay the same tensor; saves a copy."""
        gradient = self.raw.grad
        if not (self.is_pending and self._owns_gradient) or gradient is None or self.held is None:
            return False
        projected = self.held.project(gradient)
        if projected.stride() == gradient.stride():
            self.raw.grad = projected
        else:  # the model was converted to another memory format inside
            gradient.copy_(projected)
        self.is_pending = False
        return True


def settle_all(deferrals: list[Deferral]) -> None:
    """Project the pending gradients of many raw weights, in one launch for each formula on CUDA."""
    by_formula: dict[Formula, list[tuple[Tensor, HeldWeight]]] = {}
    for deferral in deferrals:
        if deferral.settle_by_replacing():
            continue
        gradient, held = deferral.raw.grad, deferral.held
        if deferral.is_pending and gradient is not None and held is not None:
            by_formula.setdefault(held.formula, []).append((gradient, held))
        deferral.is_pending = False
    for formula, pending in by_formula.items():
        gradients = [gradient for gradient, _ in pending]
        weights = [held.weight_then(gradient) for gradient, held in pending]
        project_all(gradients, weights, [held.statistics for _, held in pending], formula)


class _StraightThrough(torch.autograd.Function):
    """Forward: the held standardized weight. Backward: as :class:`Deferral` decides."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, deferral: Deferral, held: HeldWeight, dtype: torch.dtype) -> Tensor:
        ctx.deferral, ctx.held = deferral, held
        return held.value(dtype).detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        return ctx.deferral.receive(gradients[0], ctx.held, ctx.next_functions[0][0]), None, None, None


class Loan:
    """The standardized weight of one raw weight on loan to its convolutions, for as long as it is standardized once.

    Args:
        deferral: Of the raw weight.
        formula: That standardizes it.
        lender: Has all raw weights of a model standardized when the first of them is asked for.
    """

    def __init__(self, deferral: Deferral, formula: Formula, lender: Any) -> None:
        self.deferral = deferral
        self.formula = formula
        self.lender = lender
        self._lent: tuple[Tensor, HeldWeight, torch.dtype, int] | None = None

    def lend(self, raw: nn.Parameter, dtype: torch.dtype, with_gradient: bool) -> Tensor | None:
        """The standardized weight, or ``None`` if autograd is to compute it."""
        deferral = self.deferral
        if not self.lender.is_lending() or raw is not deferral.raw:
            return None
        if deferral.held is None:
            self.lender.standardize()
        held = deferral.held
        if held is None or not held.is_current(raw):
            (held,) = hold_all([raw], self.formula, dtype)
            deferral.hold(held)
        return self._with_graph(held, dtype) if with_gradient else held.value(dtype)

    def _with_graph(self, held: HeldWeight, dtype: torch.dtype) -> Tensor:
        """One node of the graph per forward and backward, which a convolution that is called again shares.

        A node that outlived its backward would be older than those of the next forward, so that the engine would run it
        last, and all gradients would be alive until then.
        """
        value, lent = held.value(dtype), self._lent
        if lent is not None and lent[1] is held and lent[2] == dtype and lent[3] == self.deferral.backwards:
            if lent[0]._version == value._version and lent[0].data_ptr() == value.data_ptr():
                return lent[0]
        self.deferral.watch()
        ddp = DistributedDataParallel._active_ddp_module
        if ddp is not None:
            self.deferral.join(ddp)
        graph: Any = _StraightThrough.apply(held.raw, self.deferral, held, dtype)
        self._lent = (graph, held, dtype, self.deferral.backwards)
        return graph


class Memory:
    """What one standardizer remembers between calls. Copies and files of a model remember nothing."""

    def __init__(self) -> None:
        self.held: HeldWeight | None = None
        self.loan: Loan | None = None
        self.never_once_because: str | None = None

    def is_lent(self, weight: Tensor) -> bool:
        """Whether `weight` is held for a loan already, so that it is known to be of a kind that may be."""
        loan = self.loan
        return loan is not None and loan.deferral.raw is weight and loan.deferral.held is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        return Memory()

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        return Memory, ()


def standardize_loans(loans: list[Loan]) -> None:
    """Standardize the raw weights of many loans, in one launch for each formula and dtype on CUDA."""
    groups: dict[tuple[Formula, torch.dtype], list[Loan]] = {}
    for loan in loans:
        groups.setdefault((loan.formula, dtype_in_convolution(loan.deferral.raw)), []).append(loan)
    for (formula, dtype), group in groups.items():
        for loan, held in zip(group, hold_all([loan.deferral.raw for loan in group], formula, dtype), strict=True):
            loan.deferral.hold(held)


def _differentiable_gradient(raw: nn.Parameter, held: HeldWeight, gradient: Tensor) -> Tensor:
    """The gradient of the raw weight as a function of the raw weight and of `gradient`."""
    if not held.is_current(raw):
        raise RuntimeError(
            "A weight that is standardized once was changed between a forward and its backward with create_graph=True; "
            "run the backward first."
        )
    standardized = standardize(raw, held.formula)
    return torch.autograd.grad(standardized, raw, gradient.to(raw.dtype), create_graph=True)[0]


def _with_memory_of_its_own(gradient: Tensor) -> Tensor:
    """A gradient, copied if another tensor has the same memory: of a sum, both terms get the same."""
    storage = gradient.untyped_storage()
    is_shared = torch._C._storage_Use_Count(storage._cdata) > 2  # by `gradient` and by `storage` itself
    return gradient.clone() if is_shared else gradient


def _has_other_hooks(raw: nn.Parameter) -> bool:
    """Whether hooks beside ours wait for the gradient of the raw weight."""
    return len(raw._backward_hooks or ()) > 1 or bool(getattr(raw, "_post_accumulate_grad_hooks", None))


def _will_accumulate(accumulator: Any) -> bool:
    """Whether this backward adds to ``raw.grad``; ``torch.autograd.grad`` returns the gradient instead."""
    try:
        return torch._C._will_engine_execute_node(accumulator)
    except RuntimeError:
        return False
