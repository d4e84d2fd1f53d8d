"""Pickles as Python 2 and its numpy wrote them: every text and every array's memory is a string of bytes."""

from __future__ import annotations

import pickle
import struct
from typing import IO, Any


def write_like_python_2(content: Any, file: IO[bytes]) -> None:
    _LegacyPickler(file, protocol=2).dump(content)


# The one that is written in Python, because the other's rules for ``bytes`` cannot be changed
_Pickler: Any = pickle._Pickler  # pyright: ignore[reportAttributeAccessIssue]


class _LegacyPickler(_Pickler):
    dispatch = dict(_Pickler.dispatch)

    def save_string(self, content: Any) -> None:
        data = content.encode("latin1") if isinstance(content, str) else content
        if len(data) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) + data)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(content)

    dispatch[str] = dispatch[bytes] = save_string

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or obj.__qualname__}\n".encode())
        self.memoize(obj)

    dispatch[type] = save_global
