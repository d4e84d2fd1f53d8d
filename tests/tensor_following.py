"""Which convolutions of a model reach a normalization layer, found out by running it and following its tensors.

An oracle for the selection, and independent of it: nothing is traced. A forward runs under a dispatch mode that sees
every operator on every tensor. Each call of a convolution marks the memory of its output; an operator passes the marks
of its inputs on to its output, or does not; the marks that arrive at a normalization are those that were looked for.
Views share the memory of their base, so that they need no rule.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Modules whose output takes over the marks of their input, whatever they do inside: dropout in training multiplies
IDENTITIES = frozenset({"_DropoutNd", "StochasticDepth", "DropPath", "DropBlock2d", "DropBlock3d", "PatchDropout"})
# Modules that normalize by operators which do not show it
NORMS = frozenset({"RMSNorm", "RmsNorm", "RmsNorm2d", "FrozenBatchNorm2d", "FrozenBatchNormAct2d", "EvoNorm2dS0"})

# Operators that normalize their first argument
NORM_OPERATORS = frozenset(
    {
        "batch_norm",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "_batch_norm_with_update",
        "_batch_norm_no_update",
        "cudnn_batch_norm",
        "native_group_norm",
        "native_layer_norm",
    }
)
# Operators whose output is new memory with the values of their inputs in it, moved, copied or added
PASSING_OPERATORS = frozenset(
    {
        "_reshape_copy",
        "_to_copy",
        "_unsafe_view",
        "add",
        "add_",
        "cat",
        "channel_shuffle",
        "clone",
        "constant_pad_nd",
        "copy_",
        "flip",
        "gather",
        "index",
        "index_select",
        "native_channel_shuffle",
        "pixel_shuffle",
        "pixel_unshuffle",
        "reflection_pad1d",
        "reflection_pad2d",
        "repeat",
        "replication_pad1d",
        "replication_pad2d",
        "roll",
        "stack",
    }
)


@dataclass(frozen=True)
class Followed:
    """What one forward did.

    Args:
        order: All convolutions of the model, by first qualified name, in the order of last call. Those that were not
            called come first, as defined.
        executed: Those that were called.
        norms: For each of them, the modules in which its output was normalized, if every call was followed by a
            normalization; otherwise nothing.
    """

    order: list[str]
    executed: set[str]
    norms: dict[str, set[str]]

    @property
    def normalized(self) -> set[str]:
        return {name for name, norms in self.norms.items() if norms}


class _Follower(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []  # the convolution of each call
        self.norms: list[set[str]] = []  # the modules in which the output of that call was normalized
        self.weights: set[int] = set()  # memory of the weights of convolutions
        self.running: list[str] = []  # the modules whose forward is running, the innermost last
        self.closed = 0  # inside how many modules in which operators are not looked at
        # Marks on memory: the numbers of calls. Marked memory is kept, or else new memory could take its address
        self._marks: dict[int, tuple[Any, frozenset[int]]] = {}

    def marks(self, values: Any) -> frozenset[int]:
        tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
        found = [self._marks[address][1] for address in map(_address, tensors) if address in self._marks]
        return frozenset().union(*found)

    def mark(self, values: Any, marks: frozenset[int]) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                self._marks[_address(value)] = (value.untyped_storage(), marks)

    def convolved(self, name: str, output: Any) -> None:
        self.mark(output, frozenset({len(self.calls)}))
        self.calls.append(name)
        self.norms.append(set())

    def normalized(self, values: Any) -> None:
        for call in self.marks(values):
            self.norms[call].add(self.running[-1])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.closed:
            return output
        name = func._schema.name.split("::")[1]
        if name == "convolution" and _address(args[1]) in self.weights:
            raise NotImplementedError(f"{self.running[-1]} uses the weight of a convolution without calling it")
        if name in NORM_OPERATORS:
            self.normalized(args[0])
        inputs = (args, kwargs)
        passed = self.marks(inputs) if name in PASSING_OPERATORS else frozenset()
        if name == "copy_" and _is_whole(args[0]):
            passed = self.marks(args[1])
        if func._schema.is_mutable and name not in PASSING_OPERATORS and self.marks(output) and not _is_whole(args[0]):
            raise NotImplementedError(f"{name} overwrites a part of the output of a convolution")
        is_view = any(argument.alias_info and not argument.alias_info.is_write for argument in func._schema.arguments)
        if not is_view:
            self.mark(output, passed)
        return output


def follow(model: nn.Module, *inputs: Any) -> Followed:
    """Run `model` on `inputs`, without gradients and in the mode in which it is."""
    follower = _Follower()
    names = {name: child for name, child in model.named_modules() if isinstance(child, CONVOLUTIONS)}
    follower.weights = {_address(conv.weight) for conv in names.values()}
    handles = [handle for name, child in model.named_modules() for handle in _hook(follower, name, child)]
    try:
        with torch.no_grad(), follower:
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()

    last_call = {name: number for number, name in enumerate(follower.calls)}
    norms: dict[str, set[str]] = {}
    for name in last_call:
        reached = [follower.norms[number] for number, called in enumerate(follower.calls) if called == name]
        norms[name] = set().union(*reached) if all(reached) else set()
    order = sorted(names, key=lambda name: last_call.get(name, -1))
    return Followed(order, set(last_call), norms)


def _hook(follower: _Follower, name: str, module: nn.Module) -> list[Any]:
    classes = {cls.__name__ for cls in type(module).__mro__}
    is_convolution, is_norm = isinstance(module, CONVOLUTIONS), bool(classes & NORMS)
    is_identity = bool(classes & IDENTITIES)
    arrived: list[frozenset[int]] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        follower.running.append(name)
        if is_norm and not follower.closed:
            follower.normalized((args, kwargs))
        if is_identity:
            arrived.append(follower.marks((args, kwargs)))
        follower.closed += is_convolution or is_norm or is_identity

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        follower.running.pop()
        follower.closed -= is_convolution or is_norm or is_identity
        if is_identity:
            follower.mark(output, arrived.pop())
        elif is_norm:
            follower.mark(output, frozenset())
        elif is_convolution:
            follower.convolved(name, output)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is all of its memory, not a part."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
