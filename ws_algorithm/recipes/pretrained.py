"""The weights of a file into a network, or an error that names what does not fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


def load_pretrained(network: nn.Module, pretrained: str, *, dropped: Sequence[str] = ()) -> None:
    """Load the weights of a file into a network, before any Weight Standardization.

    Every key of the network must be in the file and the other way round, with the same shape, except

    - ``num_batches_tracked``, which only BatchNorm counts;
    - the weight and bias of the last ``Linear`` if the file has another number of classes: they keep their
      initialization, and the log says so.

    A network on the meta device, as when a recipe is checked, is compared with the file and stays as it is.

    Args:
        network: What the weights are for. Keys are those of its own ``state_dict()``.
        pretrained: Path of a file from ``torch.save``: a state dict, alone or under ``"state_dict"`` or ``"model"``.
            A prefix ``module.`` of its keys is dropped.
        dropped: Modules that the file may have and the network has not, such as the classifier of a network that is
            to be a backbone. Default: none.

    Raises:
        ValueError: If there is no such file, it holds no state dict, or its keys or shapes do not fit. The network is
            then unchanged.
    """
    if not Path(pretrained).is_file():
        raise ValueError(f"`pretrained` (={pretrained!r}) must be a file, and there is none. Is the path right?")
    only_compare = any(parameter.is_meta for parameter in network.parameters())
    left_out = tuple(f"{module}." for module in dropped)
    read = _read(pretrained, "meta" if only_compare else "cpu")
    found = {key: tensor for key, tensor in read.items() if not key.startswith(left_out)}
    own = network.state_dict()
    new_head = _head_of_other_classes(network, found)
    compared = [key for key in own if key not in new_head and not key.endswith(_COUNTER)]
    missing = [key for key in compared if key not in found]
    unexpected = [key for key in found if key not in own and not key.endswith(_COUNTER)]
    reshaped = [key for key in compared if key in found and found[key].shape != own[key].shape]
    if missing or unexpected or reshaped:
        shapes = [f"{key!r} {tuple(found[key].shape)} instead of {tuple(own[key].shape)}" for key in reshaped]
        problems = [
            *_listed("missing", [repr(key) for key in missing]),
            *_listed("unexpected", [repr(key) for key in unexpected]),
            *_listed("of another shape", shapes),
        ]
        raise ValueError(
            f"`pretrained` (={pretrained!r}) must fit the network. {'; '.join(problems)}. {_fix(found, own)}"
        )
    if only_compare:
        return
    if new_head:
        log.info(
            "`pretrained` (=%r) has %d classes and the network %d: %s start anew",
            pretrained,
            len(found[new_head[0]]),
            len(own[new_head[0]]),
            " and ".join(new_head),
        )
    network.load_state_dict({key: found[key] for key in own if key in found and key not in new_head}, strict=False)


_COUNTER = "num_batches_tracked"
_STATISTICS = "running_mean"


def _read(pretrained: str, device: str) -> dict[str, Tensor]:
    try:
        content = torch.load(pretrained, map_location=device, weights_only=True)
    except OSError:
        raise  # the disk's own message is about the path
    except Exception as error:  # the unpickler takes text for instructions and fails in any way
        raise ValueError(
            f"`pretrained` (={pretrained!r}) must be a file of tensors saved by torch.save, and it is not: it is of "
            "another format, is cut off, or holds a whole model. Save the state dict alone."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(
            f"`pretrained` (={pretrained!r}) must hold a state dict, alone or under 'state_dict' or 'model'. "
            "The checkpoint of a run is for `load_path`."
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _head_of_other_classes(network: nn.Module, found: Mapping[str, Tensor]) -> list[str]:
    """The names of the classifier's tensors if the file's differ from them in the number of classes alone."""
    linears = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        return []
    name, head = linears[-1]
    tensors = {f"{name}.{own}": parameter for own, parameter in head.named_parameters()}
    pairs = [(found[key], tensor) for key, tensor in tensors.items() if key in found]
    same_features = all(theirs.ndim == ours.ndim and theirs.shape[1:] == ours.shape[1:] for theirs, ours in pairs)
    other_classes = all(len(theirs) != len(ours) for theirs, ours in pairs if theirs.ndim)
    return list(tensors) if len(pairs) == len(tensors) and same_features and other_classes else []


def _listed(what: str, items: list[str]) -> list[str]:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return [f"{what.capitalize()}: {', '.join(items[:3])}{more}"] if items else []


def _fix(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    theirs, ours = (any(key.endswith(_STATISTICS) for key in keys) for keys in (found, own))
    if theirs and not ours:
        return "The file is of a network with BatchNorm: build with `norm` 'batch' or 'frozen'."
    if ours and not theirs:
        return "The file is of a network without BatchNorm: build with `norm` 'group'."
    if any(".parametrizations." in key for key in found):
        return "The file is of a parametrized model: call remove_weight_standardization on it and save it again."
    return "The file is of another network: compare the name, the arch or depth, and the widths."
