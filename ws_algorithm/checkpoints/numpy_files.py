"""Files of ``numpy.savez`` as tensors, without numpy."""

from __future__ import annotations

import ast
import struct
import zipfile
from pathlib import Path

from torch import Tensor

from ws_algorithm.checkpoints.unpickling import DType, RefusedPickleError, array_of


def load_numpy_file(path: Path) -> dict[str, Tensor]:
    """The arrays of an ``.npz`` file by name.

    Raises:
        RefusedPickleError: If an array is not of numbers: those of objects are pickles.
        Exception: Of any kind, if the file is cut off or of another format.
    """
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy"): _array_of(archive.read(name)) for name in archive.namelist()}


def _array_of(content: bytes) -> Tensor:
    if content[:6] != b"\x93NUMPY":
        raise RefusedPickleError("it has a member that is no array.")
    length_format, start = ("<H", 10) if content[6] == 1 else ("<I", 12)
    (length,) = struct.unpack(length_format, content[8:start])
    header = ast.literal_eval(content[start : start + length].decode("latin1"))
    data = content[start + length :]
    return array_of(data, DType(header["descr"]), header["shape"], is_fortran=header["fortran_order"])
