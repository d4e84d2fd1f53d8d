"""An unpickler that makes arrays, numbers and plain containers and refuses everything else.

A pickle is a program: it may call anything that it can name. Here it can name what is in the table below, which stands
for numpy's and torch's own functions without being them: no code of numpy, of torch's unpickler or of a class that the
file names ever runs. What the table makes is built of tensors, lists, dictionaries, strings and numbers.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import IO, Any, Protocol

import torch
from torch import Tensor

# numpy's names of types to torch's
_DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "u8": torch.uint64,
    "b1": torch.bool,
}


class RefusedPickleError(ValueError):
    """The file names something that is neither an array nor a plain container."""


class Storages(Protocol):
    """Where the numbers of torch's tensors are: what a pickle of torch refers to by its persistent ids."""

    def __call__(self, reference: Any) -> Tensor: ...


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of numpy arrays, torch tensors and plain containers, written by Python 2 too.

    Arrays come as :class:`Array`, see :func:`as_tensor`; tensors as tensors.

    Args:
        file: The pickle.
        storages: For a pickle of torch. Default: ``None``, a pickle with tensors of torch is refused.

    Raises:
        RefusedPickleError: While loading, if the file names anything else. Nothing of the file has run then.
    """

    def __init__(self, file: IO[bytes], storages: Storages | None = None) -> None:
        super().__init__(file, encoding="latin1")
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy._core."):
            module = module.replace("numpy._core.", "numpy.core.", 1)
        if module == "__builtin__":
            module = "builtins"
        if (module, name) not in _ADMITTED:
            raise RefusedPickleError(
                f"it names {module}.{name}, and only arrays, tensors and plain containers are read: anything else "
                "could run code. Save the state dict alone where the file came from."
            )
        admitted = _ADMITTED[module, name]
        # a fresh object each time: a pickle may set attributes on what it names
        return partial(admitted) if callable(admitted) and not isinstance(admitted, type) else admitted

    def persistent_load(self, pid: Any) -> Tensor:
        if self._storages is None:
            raise RefusedPickleError("it refers to tensors that are in no torch file.")
        return self._storages(pid)


class Array:
    """A numpy array or number as it is in a pickle, in steps: what it is first, its values later."""

    __slots__ = ("tensor",)

    def __init__(self) -> None:
        self.tensor: Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        self.tensor = array_of(data, dtype, shape, is_fortran=bool(is_fortran))


class DType:
    """A numpy dtype as it is in a pickle."""

    __slots__ = ("name", "order")

    def __init__(self, name: Any) -> None:
        if not isinstance(name, str):
            raise RefusedPickleError("it has an array of unknown type.")
        self.order = name[0] if name[:1] in "<>=|" else "="
        self.name = name.lstrip("<>=|")
        if self.name not in _DTYPES:
            raise RefusedPickleError(f"it has an array of type {name!r}, and arrays must be of numbers.")

    def __setstate__(self, state: Any) -> None:
        _, order, subdtype, names, fields, *_ = state
        if subdtype is not None or names is not None or fields is not None:
            raise RefusedPickleError("it has an array of structures, and arrays must be of numbers.")
        self.order = order


def as_tensor(value: Any) -> Any:
    """The tensor of an :class:`Array`; anything else as it is."""
    return value.tensor if isinstance(value, Array) and value.tensor is not None else value


def array_of(data: Any, dtype: Any, shape: Any, *, is_fortran: bool) -> Tensor:
    """A tensor from the bytes of a numpy array.

    Raises:
        RefusedPickleError: If these are not the type, the shape and as many bytes.
    """
    if isinstance(data, str):
        data = data.encode("latin1")  # bytes of Python 2
    if not isinstance(data, (bytes, bytearray)) or not isinstance(dtype, DType) or not _is_shape(shape):
        raise RefusedPickleError("it has an array of objects, and arrays must be of numbers.")
    element = _DTYPES[dtype.name]
    count = 1
    for side in shape:
        count *= side
    if len(data) != count * element.itemsize:
        raise RefusedPickleError(f"it has an array of {len(data)} bytes that should have {count * element.itemsize}.")
    if count == 0:
        return torch.empty(shape, dtype=element)
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if dtype.order == ">":
        raw = raw.reshape(-1, element.itemsize).flip(1).flatten()
    flat = raw.view(element)
    if not is_fortran:
        return flat.reshape(shape)
    return flat.reshape(shape[::-1]).permute(*range(len(shape))[::-1]).contiguous()


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)


def _reconstruct(kind: Any, shape: Any, code: Any) -> Array:
    return Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    array = Array()
    array.tensor = array_of(data, dtype, shape, is_fortran=order == "F")
    return array


def _scalar(dtype: Any, data: Any = None) -> Array:
    array = Array()
    array.tensor = array_of(data, dtype, (), is_fortran=False)
    return array


def _dtype(name: Any, align: Any = False, copy: Any = False) -> DType:
    return DType(name)


def _encode(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes in pickles that Python 2 can read."""
    if not isinstance(text, str) or encoding != "latin1":
        raise RefusedPickleError(f"it has text in the encoding {encoding!r}, and bytes are written as 'latin1'.")
    return text.encode("latin1")


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Tensor) or not _is_shape(size) or not _is_shape(stride) or type(offset) is not int:
        raise RefusedPickleError("it has a tensor that is none.")
    return storage.as_strided(size, stride, offset)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _values(*values: Any) -> tuple[Any, ...]:
    """A time or a span of time: what it was made of."""
    return values


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


_NUMPY: dict[tuple[str, str], Callable[..., Any] | str] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}
_STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_TORCH: dict[tuple[str, str], Any] = {
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **{("torch.cuda", name): dtype for name, dtype in _STORAGES.items()},
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch.torch_version", "TorchVersion"): str,
}
_PLAIN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): _empty_dict,
    ("builtins", "dict"): dict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "bytearray"): bytearray,
    ("builtins", "bytes"): bytes,
    ("datetime", "datetime"): _values,
    ("datetime", "timedelta"): _values,
}
_ADMITTED = {**_NUMPY, **_TORCH, **_PLAIN}
