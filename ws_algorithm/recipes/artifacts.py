"""Files of a network for others: its weights, or its graph with them; and the way back from a file to outputs."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import _trace as tracing
from torch.utils import _pytree as pytree

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class WeightsFormat:
    """A format of tensors by name.

    Args:
        suffix: Of its files.
        write: A state dict to the content of a file.
        read: A file to the state dict.
        packages: That must be importable.
        extra: Of this package, that installs them.
    """

    suffix: str
    write: Callable[[State], bytes]
    read: Callable[[Path], State]
    packages: tuple[str, ...] = ()
    extra: str | None = None


@dataclass(frozen=True)
class GraphFormat:
    """A format of a network that runs without its Python code, on any number of images.

    Args:
        suffix: Of its files.
        write: A network in evaluation mode and two or more images ``(N, C, H, W)`` to the content of a file.
        read: A file to a function of images.
        packages: That must be importable.
        extra: Of this package, that installs them.
    """

    suffix: str
    write: Callable[[nn.Module, Tensor], bytes]
    read: Callable[[Path], Callable[[Tensor], Any]]
    packages: tuple[str, ...] = ()
    extra: str | None = None


def check_installed(name: str) -> None:
    """Raise ``ValueError`` if a format needs a package that cannot be imported."""
    file_format = FORMATS[name]
    for package in file_format.packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(
                f"needs {package}, which cannot be imported ({error}). "
                f'Install it by pip install "ws-algorithm[{file_format.extra}]".'
            ) from error


def loaded_into_a_copy(network: nn.Module, state: State) -> nn.Module:
    """A copy of a network of which nothing is left but the code, with the weights of a state dict.

    Raises:
        RuntimeError: If the keys or shapes are not those of the network.
    """
    copied = copy.deepcopy(network)
    with torch.no_grad():
        for tensor in copied.state_dict().values():
            tensor.fill_(math.nan if tensor.is_floating_point() else 0)
    copied.load_state_dict(state, strict=True)
    return copied


def largest_difference(outputs: Any, expected: Any) -> float:
    """The largest difference of two nested outputs of tensors, relative to the largest value of each tensor.

    Returns:
        ``inf`` if they have not the same number of tensors, or not the same shapes; ``nan`` if a value is.
    """
    first, second = (pytree.tree_leaves(nested) for nested in (outputs, expected))
    if [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        return math.inf
    differences = [_relative(a.double(), b.double()) for a, b in zip(first, second, strict=True) if b.numel()]
    return math.nan if any(map(math.isnan, differences)) else max(differences, default=0.0)


def _relative(output: Tensor, expected: Tensor) -> float:
    difference, largest = float((output - expected).abs().max()), float(expected.abs().max())
    return difference / largest if largest > 0 else difference


def _write_state_dict(state: State) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _write_safetensors(state: State) -> bytes:
    from safetensors.torch import save

    # It knows neither views nor two names for one tensor
    return save({key: tensor.contiguous().clone() for key, tensor in state.items()}, metadata={"format": "pt"})


def _read_safetensors(path: Path) -> State:
    from safetensors.torch import load_file

    return load_file(path)


def _write_torchscript(network: nn.Module, images: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(network), buffer)
    return buffer.getvalue()


def _write_torch_export(network: nn.Module, images: Tensor) -> bytes:
    buffer = io.BytesIO()
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=({0: batch},), strict=False), buffer)
    return buffer.getvalue()


def _read_torch_export(path: Path) -> Callable[[Tensor], Any]:
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def _write_onnx(network: nn.Module, images: Tensor) -> bytes:
    buffer = io.BytesIO()
    axes = {"images": {0: "batch"}, "outputs": {0: "batch"}}
    # The exporter that needs onnx alone; from torch 2.9 on it has to be asked for
    chosen: Any = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, about itself
        warnings.simplefilter("ignore", tracing.TracerWarning)  # of torch's checks of shapes
        names: Any = {"input_names": ["images"], "output_names": ["outputs"], "dynamic_axes": axes}
        torch.onnx.export(network, (images,), buffer, **names, **chosen)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def _read_onnx(path: Path) -> Callable[[Tensor], Any]:
    onnxruntime = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]


FORMATS: dict[str, WeightsFormat | GraphFormat] = {
    "state_dict": WeightsFormat(".pt", _write_state_dict, lambda path: torch.load(path, weights_only=True)),
    "safetensors": WeightsFormat(
        ".safetensors", _write_safetensors, _read_safetensors, ("safetensors",), "safetensors"
    ),
    "onnx": GraphFormat(".onnx", _write_onnx, _read_onnx, ("onnx", "onnxruntime"), "onnx"),
    "torch_export": GraphFormat(".pt2", _write_torch_export, _read_torch_export),
    "torchscript": GraphFormat(".torchscript", _write_torchscript, lambda path: torch.jit.load(str(path))),
}
