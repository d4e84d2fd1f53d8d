"""The weights in a file of any of the formats in which they are published, without running anything of it."""

from __future__ import annotations

import importlib
import importlib.util
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ws_algorithm.checkpoints.numpy_files import load_numpy_file
from ws_algorithm.checkpoints.run_formulas import recorded_formulas
from ws_algorithm.checkpoints.torch_files import LEGACY_START, load_torch_file
from ws_algorithm.checkpoints.unpickling import ArrayUnpickler, RefusedPickleError, as_tensor

# Where the weights are in what was saved, by the names that the sources give them
_WRAPPERS = ("state_dict", "model", "blobs")
# What a flat pickle of Detectron has beside weights
_NO_WEIGHTS = ("weight_order", "cfg")
_ZIP_START = b"PK\x03\x04"


@dataclass(frozen=True)
class PublishedFile:
    """The weights of a file, and what else in it tells how they were trained.

    Args:
        weights: Tensors by the names of the source.
        config: The text of mmdetection's config, ``None`` without one.
        of_trainer: Whether a Trainer of Composer has written the file, with the algorithms of its run.
    """

    weights: dict[str, Tensor]
    config: str | None
    of_trainer: bool


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a published checkpoint; nothing that the file holds is run.

    The content says which format it is, not the name: ``.pth.tar`` is no tar. Formats: ``torch.save``, old and new;
    pickles of numpy arrays, of Python 2 too, as Detectron writes them; ``numpy.savez``; safetensors. Weights may be
    alone or under ``"state_dict"``, ``"model"``, ``"blobs"`` or, in a checkpoint of Composer, ``"state"``.

    torch files are read with ``weights_only=True``. Those with more in them than it admits, and other pickles, are read
    by an unpickler that admits numbers, strings, arrays, tensors and plain containers, and nothing else.

    Args:
        path: The file.

    Returns:
        Tensors by the names of the source, on the CPU, without gradients.

    Raises:
        ValueError: If there is no such file, it is of none of these formats, names anything that could run, or holds no
            weights, or those of a run or of a conversion of this package, which have other ways in. The message names
            what was refused.
    """
    return read_published(path).weights


def read_published(path: str | Path) -> PublishedFile:
    """:func:`read_checkpoint`, with what else the file tells."""
    content = _content_of(path)
    weights = _weights_in(content, str(path))
    of_trainer = isinstance(content, Mapping) and isinstance(content.get("state"), Mapping)
    return PublishedFile(weights, _config_in(content), of_trainer)


def _content_of(path: str | Path) -> Any:
    place = Path(path)
    if not place.is_file():
        raise ValueError(f"`path` (={str(path)!r}) must be a file, and there is none. Is the path right?")
    try:
        return _load(place)
    except RefusedPickleError as error:
        raise ValueError(f"`path` (={str(path)!r}) is refused: {error}") from error
    except OSError:
        raise  # the disk's own message is about the path
    except Exception as error:  # unpicklers take text for instructions and fail in any way
        raise ValueError(
            f"`path` (={str(path)!r}) must be a file of weights by torch.save, pickle, numpy.savez or safetensors, and "
            "it is not: it is of another format, or cut off."
        ) from error


def _config_in(content: Any) -> str | None:
    """The text under ``"meta"``: of mmdetection 1 and 2 as ``"config"``, of 3 as ``"cfg"``."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    texts = [meta.get(key) for key in ("config", "cfg")] if isinstance(meta, Mapping) else []
    return next((text for text in texts if isinstance(text, str)), None)


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    with open(path, "rb") as file:
        if tarfile.is_tarfile(file):  # before all else: torch unpacks what looks like its format of 2016
            raise RefusedPickleError("it is a tar archive, and no weights are published as one. Unpack it first.")
        file.seek(0)
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                is_numpy = all(name.endswith(".npy") for name in archive.namelist())
            return load_numpy_file(path) if is_numpy else load_torch_file(path)
        file.seek(0)
        start = file.read(len(LEGACY_START))
        if start == LEGACY_START or start.startswith(_ZIP_START):  # of a zip archive without its end
            return load_torch_file(path)
        file.seek(0)
        return ArrayUnpickler(file).load()


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    if importlib.util.find_spec("safetensors") is None:
        raise RefusedPickleError('its format needs safetensors: pip install "ws-algorithm[safetensors]".')
    return importlib.import_module("safetensors.torch").load_file(path)


def _weights_in(content: Any, path: str) -> dict[str, Tensor]:
    """The state dict in what was read; ``ValueError`` if there is none, or one that has a way in of its own."""
    if isinstance(content, Mapping):
        if "ws_algorithm" in content:
            raise ValueError(f"`path` (={path!r}) is converted already: give it to a recipe as `model.pretrained`.")
        if isinstance(content.get("state"), Mapping):
            _check_algorithms(content["state"], path)
            content = content["state"]
        for key in _WRAPPERS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if isinstance(content, Mapping):
        found = {str(key): as_tensor(value) for key, value in content.items() if key not in _NO_WEIGHTS}
        others = [key for key, value in found.items() if not isinstance(value, Tensor)]
        if found and not others:
            return {key: tensor.detach() for key, tensor in found.items()}
        named = f"; {', '.join(map(repr, others[:3]))} are no tensors" if others else ""
    else:
        named = f"; it holds a {type(content).__name__}"
    wrappers = ", ".join(map(repr, _WRAPPERS))
    raise ValueError(f"`path` (={path!r}) must hold tensors by name, alone or under {wrappers}{named}.")


def _check_algorithms(state: Mapping[Any, Any], path: str) -> None:
    """Refuse the run of another formula than Composer's, which is not in the names of its weights."""
    if any(formula is not None for formula in recorded_formulas(state.get("algorithms"))):
        raise ValueError(
            f"`path` (={path!r}) is of a run of this package, whose formula its folder knows: `ws-algorithm "
            "export` writes its weights, and `load_path` continues from it."
        )
