"""The weights of a file into a network, or an error that names what does not fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ws_algorithm.checkpoints.sources import ImageInput
from ws_algorithm.formula import FORMULAS, Formula

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """What a file that ``ws-algorithm convert`` has written says of the weights in it.

    Args:
        source: Where they are from.
        formula: The Weight Standardization that they were trained with, a name in ``FORMULAS``; ``None`` for none.
        image_input: What they expect to see of an image.
        options: Arguments of the model's builder that they were trained with.
        include: The convolutions that were standardized, as the file names them. Default: ``None``, those that a norm
            follows.
    """

    source: str
    formula: str | None
    image_input: ImageInput
    options: Mapping[str, Any] = field(default_factory=dict)
    include: tuple[str, ...] | None = None


def load_pretrained(
    network: nn.Module,
    pretrained: str,
    *,
    dropped: Sequence[str] = (),
    heads: Sequence[str] | None = None,
    image_input: ImageInput | None = None,
) -> None:
    """Load the weights of a file into a network, before any Weight Standardization.

    Every key of the network must be in the file and the other way round, with the same shape, except

    - ``num_batches_tracked``, which only BatchNorm counts;
    - the weights and biases of `heads` if the file has another number of classes: they keep their initialization, and
      the log says so.

    A file that ``ws-algorithm convert`` has written says what its weights expect to see of an image. If `image_input`
    is given, it must be that; the first convolution is turned round where one of both is RGB and the other BGR.
    Otherwise the network gets what the file says as the attribute ``origin``, for the data to be compared with.

    A network on the meta device, as when a recipe is checked, is compared with the file and stays as it is.

    Args:
        network: What the weights are for. Keys are those of its own ``state_dict()``.
        pretrained: Path of a file from ``torch.save``: a state dict, alone or under ``"state_dict"`` or ``"model"``.
            A prefix ``module.`` of its keys is dropped.
        heads: Modules whose weights and biases have rows for each class. Default: the last ``Linear``.
        image_input: What the network sees of an image, whatever the data are. Default: ``None``, what the data give.
        dropped: Modules that the file may have and the network has not, such as the classifier of a network that is
            to be a backbone. Default: none.

    Raises:
        ValueError: If there is no such file, it holds no state dict, its keys or shapes do not fit, or the network sees
            images otherwise than the weights expect. The network is then unchanged.
    """
    only_compare = any(parameter.is_meta for parameter in network.parameters())
    left_out = tuple(f"{module}." for module in dropped)
    read, origin = _read(pretrained, "meta" if only_compare else "cpu")
    found = {key: tensor for key, tensor in read.items() if not key.startswith(left_out)}
    own = network.state_dict()
    new_head = _heads_of_other_classes(network, found, heads)
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
    if image_input is None:
        network.origin = origin  # pyright: ignore[reportArgumentType]
    elif origin is not None:
        _fit_images(network, found, pretrained, origin.image_input, image_input)
    if only_compare:
        return
    if origin is not None:
        with_it = f"with Weight Standardization, formula {origin.formula!r}" if origin.formula else "without it"
        log.info("`pretrained` (=%r): weights of %s, trained %s", pretrained, origin.source, with_it)
    if new_head:
        log.info(
            "`pretrained` (=%r) has %d classes and the network %d: %s start anew",
            pretrained,
            len(found[new_head[0]]),
            len(own[new_head[0]]),
            " and ".join(new_head),
        )
    network.load_state_dict({key: found[key] for key in own if key in found and key not in new_head}, strict=False)


def read_origin(pretrained: str) -> Origin | None:
    """What a file says of its weights; ``None`` if it was not written by ``ws-algorithm convert``.

    Raises:
        ValueError: If there is no such file, or it holds no state dict.
    """
    return _read(pretrained, "meta")[1]


def kernels_in(pretrained: str) -> list[str]:
    """The layers of a file that may be convolutions; of what it is raises as :func:`read_origin` does."""
    tensors = _read(pretrained, "meta")[0]
    return [key.removesuffix(".weight") for key, t in tensors.items() if t.ndim > 2 and key.endswith(".weight")]


def has_module(pretrained: str, name: str) -> bool:
    """Whether a file has weights of the module `name`; of what it is raises as :func:`read_origin` does."""
    return any(key.startswith(f"{name}.") for key in _read(pretrained, "meta")[0])


def input_difference(theirs: ImageInput, ours: ImageInput) -> str | None:
    """How a network that sees `ours` sees images otherwise than weights that expect `theirs`; ``None`` if it does not.

    The order of channels aside, which :func:`load_pretrained` evens out. Means may differ by one of 255 levels, and
    scales by a hundredth: published settings round.
    """
    expected, given = _in_rgb(theirs), _in_rgb(ours)
    means = all(abs(a - b) <= 1 / 255 for (a, _), (b, _) in zip(expected, given, strict=True))
    scales = all(abs(a / b - 1) <= 0.01 for (_, a), (_, b) in zip(expected, given, strict=True))
    return None if means and scales else f"expect {_in_words(theirs)}; the network sees {_in_words(ours)}"


def _in_rgb(image_input: ImageInput) -> list[tuple[float, float]]:
    """What is subtracted from each channel, of images from 0 to 1, and what it is multiplied by then."""
    scale = image_input.scale
    pairs = [(mean / scale, scale / std) for mean, std in zip(image_input.mean, image_input.std, strict=True)]
    return pairs if image_input.channels == "rgb" else pairs[::-1]


def _in_words(image_input: ImageInput) -> str:
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (image_input.mean, image_input.std))
    return f"{image_input.channels.upper()} from 0 to {image_input.scale:g}, mean {mean}, standard deviation {std}"


def _fit_images(
    network: nn.Module, found: dict[str, Tensor], pretrained: str, theirs: ImageInput, ours: ImageInput
) -> None:
    """Turn the first convolution in `found` round where the channels are in another order."""
    difference = input_difference(theirs, ours)
    if difference is not None:
        raise ValueError(
            f"`pretrained` (={pretrained!r}) must fit the images that the network sees. The weights {difference}."
        )
    if theirs.channels != ours.channels:
        convolutions = [name for name, module in network.named_modules() if getattr(module, "in_channels", 0) == 3]
        assert len(convolutions) == 1, "one convolution sees the image"
        key = f"{convolutions[0]}.weight"
        found[key] = found[key].flip(1)


_COUNTER = "num_batches_tracked"
_STATISTICS = "running_mean"


def _read(pretrained: str, device: str) -> tuple[dict[str, Tensor], Origin | None]:
    if not Path(pretrained).is_file():
        raise ValueError(f"`pretrained` (={pretrained!r}) must be a file, and there is none. Is the path right?")
    try:
        content = torch.load(pretrained, map_location=device, weights_only=True)
    except OSError:
        raise  # the disk's own message is about the path
    except Exception as error:  # the unpickler takes text for instructions and fails in any way
        raise ValueError(
            f"`pretrained` (={pretrained!r}) must be a file of tensors saved by torch.save, and it is not: it is of "
            "another format, is cut off, or holds a whole model. Save the state dict alone."
        ) from error
    origin = _origin_in(content, pretrained)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(
            f"`pretrained` (={pretrained!r}) must hold a state dict, alone or under 'state_dict' or 'model'. "
            "The checkpoint of a run is for `load_path`."
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}, origin


def _origin_in(content: Any, pretrained: str) -> Origin | None:
    """What stands under ``"ws_algorithm"`` in the content of a file."""
    if not isinstance(content, Mapping) or "ws_algorithm" not in content:
        return None
    try:
        entry = content["ws_algorithm"]
        seen = entry["image_input"]
        mean, std = (tuple(float(value) for value in seen[name]) for name in ("mean", "std"))
        image_input = ImageInput(seen["channels"], float(seen["scale"]), mean, std)  # pyright: ignore[reportArgumentType]
        if seen["channels"] not in ("rgb", "bgr"):
            raise ValueError(seen["channels"])
        include = entry.get("include")
        include = None if include is None else tuple(map(str, include))
        options = dict(entry.get("options", {}))
        return Origin(str(entry["source"]), _name_of(entry["formula"]), image_input, options, include)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`pretrained` (={pretrained!r}) must say what its weights are as `ws-algorithm convert` writes it, and "
            f"'ws_algorithm' in it does not ({type(error).__name__}: {error}). Convert the weights again."
        ) from error


def _name_of(formula: Any) -> str | None:
    """A formula by its name: as a file has it, or for the values of one that has a name."""
    if isinstance(formula, Mapping):
        formula = next((name for name, known in FORMULAS.items() if known == Formula(**formula)), formula)
    if formula is not None and (not isinstance(formula, str) or formula not in FORMULAS):
        raise ValueError(f"no formula {formula!r} has a name here")
    return formula


def _heads_of_other_classes(network: nn.Module, found: Mapping[str, Tensor], heads: Sequence[str] | None) -> list[str]:
    """The names of the tensors of `heads` if the file's differ from them in the number of classes alone."""
    if heads is None:
        heads = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1:]
    modules = [(name, network.get_submodule(name)) for name in heads]
    tensors = {f"{name}.{own}": parameter for name, head in modules for own, parameter in head.named_parameters()}
    pairs = [(found[key], tensor) for key, tensor in tensors.items() if key in found]
    same_features = all(theirs.ndim == ours.ndim and theirs.shape[1:] == ours.shape[1:] for theirs, ours in pairs)
    other_classes = all(len(theirs) != len(ours) for theirs, ours in pairs if theirs.ndim)
    return list(tensors) if len(pairs) == len(tensors) and same_features and other_classes else []  # [] without heads


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
