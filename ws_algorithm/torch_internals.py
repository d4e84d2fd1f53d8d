"""The private parts of PyTorch that standardizing once per step needs, each with what it is for.

PyTorch has no public function for any of these questions. ``tests/test_torch_internals.py`` has a test for each that
fails when PyTorch changes the answer. Links are to the lines of torch 2.7.0.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace as fx_tracing
from torch.nn.parallel import DistributedDataParallel

# Looked up once: they are asked for every weight of every forward
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_storage_references = torch._C._storage_Use_Count
_is_fx_tracing = getattr(fx_tracing, "_get_is_fx_tracing", fx_tracing.is_fx_tracing)  # which warns in newer releases


def is_recorded(tensor: Tensor) -> bool:
    """Return whether the operations of this moment are traced or captured, so that values become constants.

    In this order: ``torch.jit.trace``; dispatch modes (``make_fx``, ``export``, fake tensors); ``torch.fx``; CUDA
    graphs. ``torch.compile`` is asked by ``torch.compiler.is_dynamo_compiling``.

    Source: https://github.com/pytorch/pytorch/blob/v2.7.0/torch/fx/_symbolic_trace.py#L40.
    """
    if _tracing_state() is not None or _dispatch_modes() > 0 or _is_fx_tracing():
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def is_transformed() -> bool:
    """Return whether ``torch.func`` transforms this moment: it cannot differentiate an ``autograd.Function`` of ours.

    Source: https://github.com/pytorch/pytorch/blob/v2.7.0/torch/_functorch/pyfunctorch.py#L256.
    """
    return _transforms() is not None


@classmethod
def apply_without_transforms(cls: Any, *arguments: Any) -> Any:
    """Return the output of an ``autograd.Function`` outside of ``torch.func``, without asking again whether it is so.

    It is a fifth of what a cached weight costs in the forward of a ResNet-50 on a CPU, 10 of 43 microseconds.

    Source: https://github.com/pytorch/pytorch/blob/v2.7.0/torch/autograd/function.py#L575.
    """
    own: Any = super(torch.autograd.Function, cls)
    return own.apply(*arguments)


def is_in_backward() -> bool:
    """Return whether this thread is inside a backward, as a forward that ``torch.utils.checkpoint`` repeats is.

    Source: https://github.com/pytorch/pytorch/blob/v2.7.0/torch/utils/checkpoint.py#L1111.
    """
    return torch._C._current_graph_task_id() != -1


def will_accumulate(leaf_node: Any) -> bool:
    """Return whether the backward that is under way adds to the ``grad`` of a leaf.

    ``torch.autograd.grad`` returns the gradient instead, and ``backward(inputs=...)`` may leave the leaf out.

    Args:
        leaf_node: The ``AccumulateGrad`` node of the leaf.

    Source: https://github.com/pytorch/pytorch/blob/v2.7.0/torch/autograd/graph.py#L519.
    """
    try:
        return torch._C._will_engine_execute_node(leaf_node)
    except RuntimeError:  # asked outside of a backward, or within ``torch.autograd.grad`` of that leaf
        return False


def hook_count(leaf: Tensor) -> int:
    """Return how many hooks wait for the gradient of a leaf.

    Source: https://github.com/pytorch/pytorch/blob/v2.7.0/torch/_tensor.py#L691.
    """
    return len(leaf._backward_hooks or ()) + len(getattr(leaf, "_post_accumulate_grad_hooks", None) or ())


def shares_memory(tensor: Tensor) -> bool:
    """Return whether other tensors use the memory of `tensor`, such as a view or what autograd has saved.

    Memory that is to be written to again may still be read by a graph or by the user.

    Source: https://github.com/pytorch/pytorch/blob/v2.7.0/torch/_inductor/cudagraph_trees.py#L524.
    """
    storage = tensor.untyped_storage()
    return _storage_references(storage._cdata) > 2  # by `tensor` and by `storage` itself


def references(tensor: Tensor) -> tuple[int, int, int]:
    """Return how many references there are to a tensor: of Python, of C++, and of all tensors to its memory.

    Source: https://github.com/pytorch/pytorch/blob/v2.7.0/torch/csrc/autograd/functions/accumulate_grad.h#L139, where
    autograd asks the same before it keeps a gradient as ``grad``.
    """
    use_count: Any = getattr(tensor, "_use_count")  # noqa: B009 - not in torch's stubs
    try:
        storage = tensor.untyped_storage()
    except NotImplementedError:  # one of a batch of gradients, as of ``is_grads_batched``, has no memory of its own
        return 0, 0, 0
    return sys.getrefcount(tensor), use_count(), _storage_references(storage._cdata)


@functools.cache
def references_of_a_gradient() -> tuple[int, int, int]:
    """Return :func:`references` of a gradient that an ``autograd.Function`` gets and no one else has.

    Releases of torch count differently, so that one is made and asked.
    """
    found: list[tuple[int, int, int]] = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.detach()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> None:
            found.append(references(gradients[0]))

    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        weight: Any = Asks.apply(torch.ones(1, 1, 1, requires_grad=True))
        torch.nn.functional.conv1d(torch.ones(1, 1, 1), weight).backward(torch.ones(1, 1, 1))
    return found[0]


def is_reduced_by_ddp() -> bool:
    """Return whether this forward is inside a ``DistributedDataParallel`` that averages its gradients over ranks.

    Inside ``no_sync`` it does not, unless it is one with which a rank may leave out layers that others use: it then
    averages the gradients that such a rank has from before.

    Source: https://github.com/pytorch/pytorch/blob/v2.7.0/torch/nn/parallel/distributed.py#L1443.
    """
    ddp = DistributedDataParallel._active_ddp_module
    return ddp is not None and (ddp.require_backward_grad_sync or may_leave_out_layers(ddp))


def may_leave_out_layers(module: nn.Module) -> bool:
    """Return whether a module is a ``DistributedDataParallel`` with which a rank may leave out layers."""
    return isinstance(module, DistributedDataParallel) and (module.find_unused_parameters or module.static_graph)


def is_optimized_module(module: nn.Module) -> bool:
    """Return whether a module is what ``torch.compile`` has made of another; that class has no public name.

    Source: https://github.com/pytorch/pytorch/blob/v2.7.0/torch/_dynamo/eval_frame.py#L299.
    """
    return any(base.__name__ == "OptimizedModule" for base in type(module).__mro__)


def is_compiled(module: nn.Module) -> bool:
    """Return whether ``torch.compile`` or ``Module.compile`` has compiled a module, or its forward.

    Source: https://github.com/pytorch/pytorch/blob/v2.7.0/torch/nn/modules/module.py#L1748.
    """
    if getattr(module, "_compiled_call_impl", None) is not None or is_optimized_module(module):
        return True
    return hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
