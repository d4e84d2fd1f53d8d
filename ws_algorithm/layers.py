"""What the layers and functions of a network are to Weight Standardization: convolutions, norms, or neither."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, dropout, instancenorm, padding
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Functions that convolve, or multiply in the way of a 1x1 convolution, with a weight from their arguments
CONVOLVING_FUNCTIONS = frozenset(
    "conv1d conv2d conv3d _conv_forward convolution _convolution linear matmul __matmul__ mm bmm addmm einsum "
    "tensordot".split()
)

_NORMALIZING_FUNCTIONS = frozenset(
    {"batch_norm", "group_norm", "layer_norm", "instance_norm", "rms_norm"}
    | {"native_batch_norm", "native_group_norm", "native_layer_norm"}
)

# Functions behind which a value is still the same up to place, shape, sums and dropout. The paper's rule looks through
# them: https://github.com/joe-siyuan-qiao/WeightStandardization
_PLACES_AND_SHAPES = (
    "reshape view view_as reshape_as flatten unflatten ravel permute transpose swapaxes swapdims movedim moveaxis t "
    "T mT H mH adjoint contiguous squeeze unsqueeze expand expand_as broadcast_to repeat repeat_interleave tile chunk "
    "split split_with_sizes tensor_split unsafe_chunk unsafe_split hsplit vsplit unbind narrow select index_select "
    "gather unfold getitem __getitem__ __setitem__ take pad constant_pad_nd roll flip rot90 pixel_shuffle "
    "pixel_unshuffle channel_shuffle native_channel_shuffle clone detach copy requires_grad data to type type_as float "
    "half bfloat16 double cuda cpu alias"
)
_JOINS = "cat concat concatenate stack hstack vstack dstack column_stack row_stack"
_SUMS = "add __add__ __radd__ __iadd__"
_DROPOUTS = (
    "dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout native_dropout "
    "stochastic_depth drop_path drop_block2d drop_block3d"
)
_TRANSPARENT_FUNCTIONS = frozenset(" ".join((_PLACES_AND_SHAPES, _JOINS, _SUMS, _DROPOUTS)).split())

# Of these, only the first argument goes through; the others lend their shape or type
FIRST_ARGUMENT_FUNCTIONS = frozenset("view_as reshape_as expand_as type_as to".split())

# These say what a tensor is like, and do not use its values
DESCRIBING_FUNCTIONS = frozenset("shape size dim ndim numel nelement device dtype layout is_cuda requires_grad".split())

# Results of these share memory with their first argument
VIEW_FUNCTIONS = frozenset(
    "view view_as reshape reshape_as flatten unflatten ravel permute transpose swapaxes swapdims movedim moveaxis t T "
    "mT H mH adjoint squeeze unsqueeze expand expand_as narrow select getitem __getitem__ chunk split split_with_sizes "
    "tensor_split hsplit vsplit dsplit unsafe_chunk unsafe_split unbind detach data contiguous alias to type type_as "
    "float half bfloat16 double cpu cuda real imag diagonal unfold as_strided view_as_real view_as_complex conj "
    "positive broadcast_to broadcast_tensors resolve_conj resolve_neg meshgrid linalg_diagonal rename atleast_1d "
    "atleast_2d atleast_3d dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout "
    "feature_alpha_dropout".split()
)
_IN_PLACE_OPERATOR = re.compile(r"__i(add|sub|mul|matmul|truediv|floordiv|div|mod|pow|and|or|xor|lshift|rshift)__")

# Layers of other packages whose forward standardizes its own weight.
_STANDARDIZED_LAYERS = frozenset(
    {
        "StdConv2d",  # timm, google-research/big_transfer
        "StdConv2dSame",  # timm
        "ScaledStdConv2d",  # timm
        "ScaledStdConv2dSame",  # timm
        "ConvWS2d",  # mmcv
        "ConvAWS2d",  # mmcv
    }
)

# `_NormBase` of torch is a base of batch and instance norms alike
_NORMALIZATIONS = (batchnorm._NormBase, instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

# Norms that other packages derive from Module: FrozenBatchNorm2d, EvoNorm2dS0, FilterResponseNormTlu2d, RmsNorm2d
_NORMALIZATION_NAME = re.compile(
    r"_?(Frozen|NaiveSync|Sync|Cross|LP|LowPrecision|Fused|Simple|Llama|T5|Qwen2)?"
    r"(Batch|Group|Layer|Instance|R[Mm][Ss]|Evo|FilterResponse|Switchable|Simple)Norm(alization)?"
    r"([123][dD])?([SB]\d[ab]?)?(Tlu|Act)?([123][dD])?|In[Pp]laceA[Bb][Nn](Sync)?|ABN"
)

# Packages whose norms with a forward of their own normalize first
_KNOWN_PACKAGES = ("torch", "torchvision", "timm", "composer")

_TRANSPARENT = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    dropout._DropoutNd,
    padding._ConstantPadNd,
    padding._ReflectionPadNd,
    padding._ReplicationPadNd,
    padding._CircularPadNd,
)
_TRANSPARENT_NAMES = frozenset(
    {
        "StochasticDepth",  # torchvision
        "DropPath",  # timm and most copies of it
        "DropBlock2d",  # torchvision, timm
        "DropBlock3d",  # torchvision
        "Rearrange",  # einops
    }
)


def is_convolution(layer: nn.Module) -> bool:
    """Whether a layer is a ``Conv1d``, ``Conv2d`` or ``Conv3d``, subclasses included and transposed ones not."""
    return isinstance(layer, CONVOLUTIONS)


def is_normalization(layer: nn.Module) -> bool:
    """Whether a layer normalizes its input: torch's norms except ``LocalResponseNorm``, and others by their names.

    torchvision's ``FrozenBatchNorm2d`` and timm's layers of norm and activation are norms. A layer that contains norms,
    or a class of the user's that derives from one and has a forward of its own, is judged by its forward instead.
    """
    if isinstance(layer, _NORMALIZATIONS):
        return _is_of_a_known_package(layer)
    names = [cls.__name__ for cls in type(layer).__mro__]
    if isinstance(layer, nn.Identity) or not any(map(_NORMALIZATION_NAME.fullmatch, names)):
        return False
    children = list(layer.children())
    return not children or (_is_of_a_known_package(layer) and not any(map(is_normalization, children)))


def is_transparent(layer: nn.Module) -> bool:
    """Whether the output of a layer is its input up to place, shape and dropout.

    A layer that has only the name of one, and parts, is judged by its forward instead.
    """
    if type(layer).__name__ in _TRANSPARENT_NAMES:
        return next(layer.children(), None) is None
    return isinstance(layer, _TRANSPARENT) and _is_of_torch(layer.forward)


def is_elementary(layer: nn.Module) -> bool:
    """Whether a layer is one step of a forward, not a composition of steps.

    A convolution whose class has a forward of the user's own may do more than convolve.
    """
    if isinstance(layer, torch.jit.ScriptModule):
        return True
    if "forward" in vars(layer):  # replaced on this one
        return False
    if is_convolution(layer):
        return has_forward_of_known_package(layer) or own_standardization(layer) is not None
    if is_normalization(layer) or is_transparent(layer):
        return True
    if isinstance(layer, (nn.Sequential, nn.ModuleList, nn.ModuleDict, parametrize.ParametrizationList)):
        return False
    of_interest = (part for part in layer.modules() if is_convolution(part) or is_normalization(part))
    return _is_of_torch(layer.forward) and next(of_interest, None) is None


def is_norm_operation(name: str, layer: nn.Module | None) -> bool:
    """Return whether a step of a forward normalizes its first argument.

    Args:
        name: The name of the function.
        layer: The layer, if it is one.
    """
    return name in _NORMALIZING_FUNCTIONS if layer is None else is_normalization(layer)


def lets_through(name: str, layer: nn.Module | None, is_first: bool) -> bool:
    """Return whether the output of a step of a forward is an argument up to place, shape, sums and dropout.

    Args:
        name: The name of the function.
        layer: The layer, if it is one.
        is_first: Whether the argument is the first.
    """
    if layer is not None:
        return is_transparent(layer)
    if name == "copy_":  # over what was there
        return not is_first
    plain = name.removesuffix("_") if name.endswith("_") and not name.endswith("__") else name  # the same in place
    return is_first if plain in FIRST_ARGUMENT_FUNCTIONS else plain in _TRANSPARENT_FUNCTIONS


def changed_in_place(name: str, layer: nn.Module | None, args: Any, kwargs: Any) -> Any:
    """Return the argument that a step of a forward changes; ``None`` if none.

    Args:
        name: The name of the function.
        layer: The layer, if it is one.
        args: Its positional arguments.
        kwargs: Its arguments by name.
    """
    if kwargs.get("out") is not None:
        return kwargs["out"]
    flag = kwargs.get("inplace") if layer is None else getattr(layer, "inplace", False)
    named_so = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__")
    if named_so or _IN_PLACE_OPERATOR.fullmatch(name) or flag is True or flag == 1:
        return args[0] if args else next(iter(kwargs.values()), None)
    return None


def has_forward_of_torch(layer: nn.Module) -> bool:
    """Whether the forward of a layer was written in ``torch.nn``, not by a class that derives from one of its."""
    return _is_of_torch(layer.forward)


def has_forward_of_known_package(layer: nn.Module) -> bool:
    """Return whether a known package wrote the forward of a layer, and so does not edit its weight."""
    methods = [layer.forward, getattr(layer, "_conv_forward", layer.forward)]
    return all(_home_of(method).partition(".")[0] in _KNOWN_PACKAGES for method in methods)


def _is_of_torch(forward: Any) -> bool:
    """Whether a method was written in ``torch.nn``."""
    return _home_of(forward).split(".")[:2] == ["torch", "nn"]


def _is_of_a_known_package(layer: nn.Module) -> bool:
    return _home_of(layer.forward).partition(".")[0] in _KNOWN_PACKAGES


def _home_of(method: Any) -> str:
    """The Python module in which a method was written; its ``__module__`` may be copied from another."""
    function = getattr(method, "__func__", method)
    return getattr(function, "__globals__", {}).get("__name__", "")


def is_standardizer(parametrization: nn.Module) -> bool:
    """Whether a parametrization standardizes weights: ours or the one that Composer ships."""
    return any(cls.__name__ == "WeightStandardizer" for cls in type(parametrization).__mro__)


def parametrizations_of(conv: nn.Module) -> list[nn.Module]:
    """The parametrizations on the weight of a module, in the order in which they act."""
    if not parametrize.is_parametrized(conv, "weight"):
        return []
    parametrizations: Any = conv.parametrizations
    return list(parametrizations["weight"])


def standardizers_of(conv: nn.Module) -> list[nn.Module]:
    """The standardizing parametrizations on the weight of a module."""
    return [parametrization for parametrization in parametrizations_of(conv) if is_standardizer(parametrization)]


def raw_weight(conv: nn.Module) -> nn.Parameter:
    """The parameter that a convolution learns, trained and saved; the first if parametrizations split it in several."""
    layer: Any = conv
    if not parametrize.is_parametrized(conv, "weight"):
        return layer.weight
    chain = layer.parametrizations["weight"]
    return chain.original if hasattr(chain, "original") else chain.original0


def weights_of(conv: nn.Module) -> list[Tensor]:
    """Return all parameters that make up the weight of a convolution, whatever has split it; of others, none."""
    if not is_convolution(conv):
        return []
    names = (name for name, _ in conv.named_parameters())
    ours = [name for name in names if name.startswith("parametrizations.weight.") or re.match("weight[^.]*$", name)]
    return [conv.get_parameter(name) for name in ours]


def weight_shape(conv: nn.Module) -> torch.Size:
    """The shape of the weight that a convolution computes with; ``()`` if it is lazy and has none yet."""
    layer: Any = conv
    if parametrize.is_parametrized(conv, "weight"):  # not asked for: computing one may change buffers (spectral_norm)
        return torch.Size((layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size))
    return torch.Size() if is_lazy(layer.weight) else layer.weight.shape


def own_standardization(conv: nn.Module) -> str | None:
    """The name of the class of timm, mmcv or BiT by which a convolution standardizes its own weight, if it is one."""
    return next((cls.__name__ for cls in type(conv).__mro__ if cls.__name__ in _STANDARDIZED_LAYERS), None)
