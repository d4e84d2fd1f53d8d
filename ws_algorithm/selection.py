"""Which convolutions of a model are standardized, in which order, and why the others are not.

A model is looked at, never changed. Candidates are found by walking the modules, so they do not depend on train or
eval mode, on random states or on whether the model can be traced. Only leaving out the last ``n`` needs the order of
execution, and only then a copy of the model without data is traced with ``torch.fx``.
"""

from __future__ import annotations

import copy
import inspect
import logging
import operator
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

log = logging.getLogger(__name__)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

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


@dataclass(frozen=True)
class ConvolutionChoice:
    """One convolution of a model and what is to happen to it.

    Args:
        name: Its first qualified name (``""`` for the model itself).
        module: The convolution.
        skipped_because: Why it is left alone; ``None`` if it is to be standardized.
    """

    name: str
    module: nn.Module
    skipped_because: str | None

    def __str__(self) -> str:
        return self.name or "(the model itself)"


def choose_convolutions(module: nn.Module, n_last_layers_ignore: int = 0) -> list[ConvolutionChoice]:
    """Every ``Conv1d``, ``Conv2d`` and ``Conv3d`` of a model, each once, with the decision on it.

    Subclasses count, and so does `module` itself. With ``n_last_layers_ignore > 0`` the list is in the order of last
    use in ``forward``, otherwise in the order of definition.

    Args:
        module: Any model; it is not changed.
        n_last_layers_ignore: How many of the convolutions that are executed last are left alone. More than there
            are leaves all of them alone. Default: ``0``.

    Raises:
        ValueError: If an argument is not of that kind, or a convolution cannot be standardized as it is (lazy, pruned,
            under an old-style ``weight_norm`` or ``spectral_norm``).
    """
    n_last_layers_ignore = check_n_last_layers_ignore(n_last_layers_ignore)
    convolutions = find_convolutions(module)
    for name, conv in convolutions.items():
        _check_standardizable(name, conv)
    names = list(convolutions)
    if n_last_layers_ignore:
        names = _in_execution_order(module, convolutions)
    ignored = set(names[max(len(names) - n_last_layers_ignore, 0) :])
    choices = []
    for name in names:
        reason = _reason_to_skip(convolutions[name])
        if reason is None and name in ignored:
            reason = f"n_last_layers_ignore={n_last_layers_ignore}"
        choices.append(ConvolutionChoice(name, convolutions[name], reason))
    return choices


def check_n_last_layers_ignore(value: Any) -> int:
    """Return `value` as an ``int``.

    Raises:
        ValueError: If it is not a whole number (``bool`` is none) or is negative.
    """
    try:
        number = None if isinstance(value, torch.Tensor) or "bool" in type(value).__name__ else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < 0:
        raise ValueError(
            f"`n_last_layers_ignore` (={value!r}) must be a whole number of layers, 0 or more. Use 0 to ignore none."
        )
    return number


def check_module(module: Any) -> None:
    """Raise ``ValueError`` unless `module` is a module whose layers can be told apart (a TorchScript module is not)."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"`module` must be a torch.nn.Module, got {type(module).__name__}: {module!r:.80}.")
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError("`module` is a torch.jit.ScriptModule; standardize the model before scripting or tracing it.")


def find_convolutions(module: nn.Module) -> dict[str, nn.Module]:
    """The convolutions of a model by first qualified name, in the order of definition, each once."""
    check_module(module)
    return {name: child for name, child in module.named_modules() if isinstance(child, CONVOLUTIONS)}


def is_standardizer(parametrization: nn.Module) -> bool:
    """Whether a parametrization standardizes weights: ours or the one that Composer ships."""
    return any(cls.__name__ == "WeightStandardizer" for cls in type(parametrization).__mro__)


def standardizers_of(conv: nn.Module) -> list[nn.Module]:
    """The standardizing parametrizations on the weight of a module."""
    if not parametrize.is_parametrized(conv, "weight"):
        return []
    parametrizations: Any = conv.parametrizations
    return [parametrization for parametrization in parametrizations["weight"] if is_standardizer(parametrization)]


def _check_standardizable(name: str, conv: nn.Module) -> None:
    if parametrize.is_parametrized(conv, "weight"):
        return
    weight = conv._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"`module` has a convolution, {name!r}, whose weight is not a parameter but computed by a hook, as pruning "
            "and the old-style weight_norm and spectral_norm of torch.nn.utils do. Remove that first (prune.remove, "
            "remove_weight_norm, remove_spectral_norm) or use torch.nn.utils.parametrizations."
        )
    if isinstance(weight, UninitializedParameter):
        raise ValueError(
            f"`module` has a lazy convolution, {name!r}, without a weight yet. Run one batch through the model first."
        )


def _reason_to_skip(conv: nn.Module) -> str | None:
    if standardizers_of(conv):
        return "already standardized"
    own_layer = next((cls.__name__ for cls in type(conv).__mro__ if cls.__name__ in _STANDARDIZED_LAYERS), None)
    if own_layer is not None:
        return f"already standardized by its class {own_layer}"
    weight: Any = conv.weight
    if weight.ndim > 1 and weight.shape[1:].numel() == 1:
        return "fan-in 1: the standardized weight would be 0"
    return None


def _in_execution_order(module: nn.Module, convolutions: dict[str, nn.Module]) -> list[str]:
    """Names in the order of last use; those that no trace reaches come first, as defined."""
    try:
        last_use = _last_uses(module, set(convolutions.values()))
    except Exception as error:  # whatever the user's forward raises when given proxies
        log.warning(
            "The forward of %s cannot be traced (%s: %s), so `n_last_layers_ignore` counts its %d convolutions in the "
            "order in which they are defined, which may not be the order in which they are executed.",
            type(module).__name__,
            type(error).__name__,
            str(error).split("\n")[0],
            len(convolutions),
        )
        return list(convolutions)
    return sorted(convolutions, key=lambda name: last_use.get(convolutions[name], -1))


def _last_uses(module: nn.Module, convolutions: set[nn.Module]) -> dict[nn.Module, int]:
    """For each convolution that a trace reaches, the position of its last use among the nodes of the graph."""
    while True:
        try:
            return _trace_last_uses(module)
        except Exception:
            wrapped = _only_child_with(module, convolutions)
            if wrapped is None:
                raise
            module = wrapped


def _only_child_with(module: nn.Module, convolutions: set[nn.Module]) -> nn.Module | None:
    """The child that holds all convolutions, as in a ``ComposerModel`` around a network, if there is one."""
    for child in module.children():
        if convolutions <= set(child.modules()):
            return child
    return None


def _trace_last_uses(module: nn.Module) -> dict[nn.Module, int]:
    shadow = _without_data(module)
    original_of = dict(zip(shadow.modules(), module.modules(), strict=True))
    parameters = inspect.signature(shadow.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    with _fixed_random_states():
        graph = _ConvolutionTracer().trace(shadow, concrete_args=defaults)
    modules = dict(shadow.named_modules(remove_duplicate=False))
    owners = {id(p): m for m in shadow.modules() if isinstance(m, CONVOLUTIONS) for p in m.parameters()}
    last_use = {}
    for position, node in enumerate(graph.nodes):
        used = None
        if node.op == "call_module":
            used = modules[node.target]
            if isinstance(used, parametrize.ParametrizationList):  # the weight of a standardized convolution
                used = owners.get(id(getattr(used, "original", None)))
        elif node.op == "get_attr":  # forward calls a functional with the weight of a convolution
            used = owners.get(id(_attribute(shadow, node.target)))
        if isinstance(used, CONVOLUTIONS):
            last_use[original_of[used]] = position
    if not last_use:
        raise RuntimeError("the trace reaches no convolution")
    return last_use


class _ConvolutionTracer(fx.Tracer):
    """A convolution is one node whatever its class; fx alone would inline every class from outside ``torch.nn``."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, CONVOLUTIONS) or super().is_leaf_module(m, module_qualified_name)


def _without_data(module: nn.Module) -> nn.Module:
    """A copy of a model without hooks and with all parameters and buffers on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        meta = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for value in (value for part in module.modules() for value in vars(part).values()):
        if isinstance(value, torch.Tensor) and not value.is_leaf:  # an activation that forward kept; no copy() of it
            memo[id(value)] = torch.empty_like(value, device="meta").detach()
    shadow = copy.deepcopy(module, memo)
    for part in shadow.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return shadow


def _attribute(module: nn.Module, qualified_name: str) -> Any:
    value: Any = module
    for part in qualified_name.split("."):
        value = getattr(value, part)
    return value


@contextmanager
def _fixed_random_states() -> Iterator[None]:
    """Let torch's, Python's and NumPy's global generators draw the same in every process, and restore them after.

    A forward that draws at random (stochastic depth) would otherwise be traced differently in every rank.
    """
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    python_state = random.getstate()
    cuda_devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=cuda_devices):
            torch.default_generator.manual_seed(0)
            random.seed(0)
            if numpy_random is not None:
                numpy_random.seed(0)
            yield
    finally:
        random.setstate(python_state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)
