"""Makes batch files as Python 2 wrote them, byte by byte, for the tests of the sources that read such files."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np


def python2_pickle(batch: dict[str, Any]) -> bytes:
    """Pickle a dict of text, lists of integers or text, and uint8 arrays, as Python 2's cPickle does by protocol 2."""
    return b"\x80\x02}(" + b"".join(_text(key) + _value(value) for key, value in batch.items()) + b"u."


def _value(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        return _array(value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_value, value)) + b"e"
    return _text(value) if isinstance(value, str) else b"J" + struct.pack("<i", value)


def _text(text: str) -> bytes:
    raw = text.encode("latin1")
    return b"U" + bytes([len(raw)]) + raw


def _array(array: np.ndarray) -> bytes:
    assert array.dtype == np.uint8
    fortran = not array.flags.c_contiguous
    raw = array.tobytes(order="F" if fortran else "C")
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + b"".join(_value(n) for n in array.shape)
        + {1: b"\x85", 2: b"\x86"}[array.ndim]
        + b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + (b"\x88" if fortran else b"\x89")
        + b"T"
        + struct.pack("<i", len(raw))
        + raw
        + b"tb"
    )
