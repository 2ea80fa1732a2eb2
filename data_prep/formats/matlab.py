"""Loads a MATLAB file within a bound, as a small one can hold gigabytes. For the names of the classes of ImageNet."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from eiwtrain.data.manifest import DataError
from eiwtrain.terminal.lines import one_line

_HEADER = 128  # bytes ahead of the first element
_COMPRESSED = 15  # type of an element that holds another one, compressed
_MOST = 1 << 26  # bytes of all elements; ImageNet's classes take a few millions


def load_matlab(data: bytes, what: str) -> dict[str, Any]:
    """Return the variables of a MATLAB file by name; dimensions of 1 are left out.

    Raises:
        DataError: it is another file, is damaged, or unpacks to far too much.
    """
    import scipy.io

    try:
        if _unpacked(data) <= _MOST:
            loaded: dict[str, Any] = scipy.io.loadmat(io.BytesIO(data), squeeze_me=True, struct_as_record=True)
            return loaded
    except Exception as e:  # scipy raises anything
        raise DataError(f"{what} is damaged ({type(e).__name__}: {one_line(e)})") from None
    raise DataError(f"{what}: its {len(data):,} bytes unpack to over {_MOST:,}; it is not loaded")


def _unpacked(data: bytes) -> int:
    """Return the bytes of all elements, those that are compressed unpacked; once these are too many, so far."""
    order = ">" if data[_HEADER - 2 : _HEADER] == b"MI" else "<"
    size, at = len(data), _HEADER
    while at + 8 <= len(data) and size <= _MOST:
        kind, length = struct.unpack_from(f"{order}II", data, at)
        if kind == _COMPRESSED:
            size += len(zlib.decompressobj().decompress(data[at + 8 : at + 8 + length], _MOST + 1))
        at += 8 + length
    return size
