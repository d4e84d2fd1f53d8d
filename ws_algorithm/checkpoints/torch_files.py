"""Files of ``torch.save``: by torch with ``weights_only=True``, or by the restricted unpickler where that gives up.

A training checkpoint may hold numpy's numbers or times beside its weights, which torch refuses to read.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ws_algorithm.checkpoints.unpickling import ArrayUnpickler, RefusedPickleError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_START = pickle.dumps(_LEGACY_MAGIC, protocol=2)  # what such a file starts with


def load_torch_file(path: Path) -> Any:
    """What ``torch.save`` wrote, of either of its formats, in memory of the CPU.

    Raises:
        RefusedPickleError: If the file names anything but tensors, arrays and plain containers.
        Exception: Of any kind, if the file is cut off or of another format.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        with open(path, "rb") as file:
            return _load_zip(file) if zipfile.is_zipfile(file) else _load_legacy(file)


def _load_zip(file: IO[bytes]) -> Any:
    """The format since torch 1.6: a pickle and a file for each storage, in a zip archive."""
    with zipfile.ZipFile(file) as archive:
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder = pickled.removesuffix("data.pkl")
        names = set(archive.namelist())
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise RefusedPickleError("it was written on a machine of another byte order.")
        storages: dict[str, Tensor] = {}

        def storage_of(reference: Any) -> Tensor:
            dtype, key, _ = _parts_of(reference)
            if key not in storages:
                content = bytearray(archive.read(f"{folder}data/{key}"))
                storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            return storages[key]

        return ArrayUnpickler(io.BytesIO(archive.read(pickled)), storage_of).load()


def _load_legacy(file: IO[bytes]) -> Any:
    """The format before torch 1.6: five pickles one after the other, then the storages in the order of the last."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if ArrayUnpickler(file).load() != _LEGACY_MAGIC:
        raise RefusedPickleError("it is no file of torch.save.")
    for _ in ("protocol", "system"):
        ArrayUnpickler(file).load()
    storages: dict[str, Tensor] = {}

    def storage_of(reference: Any) -> Tensor:
        dtype, key, count = _parts_of(reference)
        if key not in storages:
            if count * dtype.itemsize > size:
                raise RefusedPickleError("it has a tensor that is longer than the file.")
            storages[key] = torch.empty(count, dtype=dtype)
        view = reference[5] if len(reference) > 5 else None
        return storages[key] if view is None else storages[key][view[1] : view[1] + view[2]]

    content = ArrayUnpickler(file, storage_of).load()
    for key in ArrayUnpickler(file).load():
        _fill(storages[key], file)
    return content


def _fill(storage: Tensor, file: IO[bytes]) -> None:
    (count,) = struct.unpack("<q", file.read(8))
    content = bytearray(file.read(count * storage.dtype.itemsize))
    if count != storage.numel() or len(content) != count * storage.dtype.itemsize:
        raise RefusedPickleError("it is cut off.")
    if count:
        storage.copy_(torch.frombuffer(content, dtype=storage.dtype))


def _parts_of(reference: Any) -> tuple[torch.dtype, str, int]:
    """Type, key and length of a storage that a pickle refers to."""
    kind, dtype, key, _, count, *_ = reference
    if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str) or type(count) is not int:
        raise RefusedPickleError("it is a whole model, not its weights. Save the state dict alone.")
    if count < 0:
        raise RefusedPickleError("it has a tensor of negative length.")
    return dtype, key, count
