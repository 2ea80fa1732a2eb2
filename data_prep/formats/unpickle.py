"""Batches of pixels out of pickle files, without trusting them: arrays and plain values, nothing that runs code.

For the python batches of CIFAR-10 and of downsampled ImageNet. Not for pickles in general.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from enum import Enum
from math import prod
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from eiwtrain.data.manifest import DataError

LARGE = 1 << 10  # bytes


class StoredArray(NamedTuple):
    """An array in C order that was left in the file: its first byte there, its shape and its dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


def load_batch(data: bytes | BinaryIO, what: str, leave: bool = False) -> dict[str, Any]:
    """The dict that is pickled in `data`, a whole file or one that is open at its start.

    Text of Python 2 is taken for Latin-1, which loses nothing; keys come as text. Whatever would have to be imported
    is refused but for what numpy's arrays are made with, and of that only the names are used: no function of a
    pickle's choice is ever called.

    Args:
        data: the pickle.
        what: names it in errors.
        leave: large arrays (of `LARGE` bytes) that lie in `data` in one piece, and in C order, are not read and come
            as `StoredArray`.

    Raises:
        DataError: it is cut off, damaged, no dict, or names anything else than arrays and plain values.
    """
    file = _File(io.BytesIO(data) if isinstance(data, bytes) else data)
    try:
        batch = _Unpickler(file, leave).load()
        if type(batch) is not dict:
            raise _Refused(f"a {type(batch).__name__} is pickled in it, not a dict")
        return {_key(key): _finished(value, file) for key, value in batch.items()}
    except _Refused as e:
        raise DataError(f"{what}: {e}") from None
    except OSError:
        raise
    except Exception as e:  # a damaged pickle stumbles over anything
        cause = " ".join(str(e).split())[:200]
        raise DataError(f"{what}: no pickled batch, or a damaged one ({type(e).__name__}: {cause})") from None


class _Refused(ValueError):
    """Not to be loaded; the message is one line."""


class _Name(Enum):
    """Stand-ins for all that a batch may name: they are told apart, never called."""

    RECONSTRUCT = "_reconstruct"
    FROMBUFFER = "_frombuffer"
    SCALAR = "scalar"
    NDARRAY = "ndarray"
    DTYPE = "dtype"
    ENCODE = "encode"
    BYTES = "bytes"


_ADMITTED = {
    (module, name.value): name
    for name, modules in {
        _Name.RECONSTRUCT: ("numpy.core.multiarray", "numpy._core.multiarray"),
        _Name.SCALAR: ("numpy.core.multiarray", "numpy._core.multiarray"),
        _Name.FROMBUFFER: ("numpy.core.numeric", "numpy._core.numeric"),
        _Name.NDARRAY: ("numpy",),
        _Name.DTYPE: ("numpy",),
        _Name.ENCODE: ("_codecs",),  # as Python 3 puts bytes in protocols that have none
        _Name.BYTES: ("__builtin__",),  # and an empty one
    }.items()
    for module in modules
}
_NUMBERS = re.compile(r"b1|[iu][1248]|f[248]")  # as numpy codes dtypes


class _InFile(NamedTuple):
    """Bytes that were passed over."""

    offset: int
    size: int


class _DType:
    """A dtype in the making."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
            raise _Refused(f"an array of dtype {code!r:.40}; only plain numbers are admitted")
        self.dtype = np.dtype(code)

    def set(self, state: Any) -> None:
        if state[1] not in ("|", "<", ">", "="):
            raise _Refused("an array without a byte order")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array in the making."""

    def __init__(self) -> None:
        self.set((1, (0,), _DType("u1"), False, b""))

    def set(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 knows no bytes
        if not isinstance(dtype, _DType) or not isinstance(raw, (bytes, bytearray, _InFile)):
            raise _Refused("an array without a dtype or without bytes")
        if type(shape) is not tuple or not all(type(n) is int and n >= 0 for n in shape):
            raise _Refused("an array without a shape")
        size = raw.size if isinstance(raw, _InFile) else len(raw)
        if size != prod(shape) * dtype.dtype.itemsize:
            raise _Refused(f"{size} bytes for an array of shape {str(shape)[:80]} and dtype {dtype.dtype}")
        self.shape, self.dtype, self.raw, self.c_order = shape, dtype.dtype, raw, not fortran


_CHECKED = 1 << 16  # bytes, from which on a read is held against the file's size first


class _File:
    """A file that says so when it is cut off, before room is made for what it does not hold."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = file.seek(0, io.SEEK_END)
        file.seek(0)
        self.readline = file.readline

    def read(self, size: int) -> bytes:
        if size > _CHECKED:
            self._file.seek(self.skip(size))
        data = self._file.read(size)
        if len(data) < size:
            raise EOFError("it is cut off")
        return data

    def skip(self, size: int) -> int:
        """Pass over so many bytes; returns the offset of the first."""
        start = self._file.tell()
        if size > self._size - start:
            raise EOFError("it is cut off")
        self._file.seek(size, io.SEEK_CUR)
        return start

    def read_at(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self.read(size)


class _Opcodes(dict[int, Callable[[Any], None]]):
    """What is done for each opcode; one that is not among them ends the loading."""

    def __missing__(self, opcode: int) -> Callable[[Any], None]:
        raise _Refused(f"it is no pickle of arrays and plain values (opcode {opcode:#04x}); it is not loaded")


class _Unpickler(pickle._Unpickler):
    """The unpickler that is written in Python, as joblib and dill extend it: there the opcodes can be chosen."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    dispatch = _Opcodes(
        (opcode[0], pickle._Unpickler.dispatch[opcode[0]])
        for opcode in (
            *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP, pickle.NONE),
            *(pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2),
            *(pickle.LONG, pickle.LONG1, pickle.LONG4, pickle.FLOAT, pickle.BINFLOAT, pickle.STRING),
            *(pickle.SHORT_BINSTRING, pickle.SHORT_BINBYTES, pickle.UNICODE, pickle.BINUNICODE),
            *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.TUPLE, pickle.EMPTY_TUPLE, pickle.TUPLE1),
            *(pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS),
            *(pickle.EMPTY_DICT, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.PUT, pickle.BINPUT),
            *(pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GET, pickle.BINGET, pickle.LONG_BINGET),
        )
    )

    def __init__(self, file: _File, leave: bool) -> None:
        super().__init__(file, fix_imports=False, encoding="latin1")
        self._source, self._leave = file, leave

    def find_class(self, module: str, name: str) -> _Name:
        if (module, name) not in _ADMITTED:
            named = ascii(f"{module}.{name}"[:100])[1:-1]
            raise _Refused(f"it wants {named}, which is no array and no plain value; it is not loaded")
        return _ADMITTED[module, name]

    def _frame(self) -> None:
        self.read(8)  # a frame's length; its bytes follow as they would without it

    def _raw(self, size: int) -> bytes | _InFile:
        if self._leave and size >= LARGE:
            return _InFile(self._source.skip(size), size)
        return self.read(size)

    def _bytes(self) -> None:
        self.append(self._raw(int.from_bytes(self.read(4), "little")))

    def _long_bytes(self) -> None:
        self.append(self._raw(int.from_bytes(self.read(8), "little")))

    def _text(self) -> None:
        raw = self._raw(int.from_bytes(self.read(4), "little"))
        self.append(raw.decode("latin1") if isinstance(raw, bytes) else raw)

    def _reduce(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        made: Any
        if name is _Name.RECONSTRUCT and arguments[0] is _Name.NDARRAY:
            made = _Array()
        elif name is _Name.FROMBUFFER:
            raw, dtype, shape, order = arguments
            if order not in ("C", "F"):
                raise _Refused(f"an array in order {order!r:.40}")
            made = _Array()
            made.set((1, shape, dtype, order == "F", raw))
        elif name is _Name.SCALAR:
            scalar = _Array()
            scalar.set((1, (), arguments[0], False, arguments[1]))
            made = _finished(scalar, self._source).item()
        elif name is _Name.DTYPE:
            made = _DType(*arguments)
        elif name is _Name.ENCODE and arguments[1] == "latin1":
            made = str.encode(arguments[0], "latin1")
        elif name is _Name.BYTES and arguments == ():
            made = b""
        else:
            raise _Refused("it calls what is no constructor of an array; it is not loaded")
        self.append(made)

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, (_Array, _DType)):
            raise _Refused(f"it sets the state of a {type(target).__name__}; it is not loaded")
        target.set(state)

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _update(self.stack[-1], [key, value])

    def _setitems(self) -> None:
        items = self.pop_mark()
        _update(self.stack[-1], items)

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        _update(self.stack[-1], items)

    for _opcode, _do in {
        pickle.FRAME: _frame,
        pickle.BINSTRING: _text,
        pickle.BINBYTES: _bytes,
        pickle.BINBYTES8: _long_bytes,
        pickle.BYTEARRAY8: _long_bytes,
        pickle.REDUCE: _reduce,
        pickle.BUILD: _build,
        pickle.DICT: _dict,
        pickle.SETITEM: _setitem,
        pickle.SETITEMS: _setitems,
    }.items():
        dispatch[_opcode[0]] = _do


def _update(target: Any, items: list[Any]) -> None:
    if type(target) is not dict or not all(isinstance(key, (str, bytes, int)) for key in items[::2]):
        raise _Refused("a dict whose keys are neither text nor numbers")  # to hash nested tuples can take for ever
    target.update(zip(items[::2], items[1::2], strict=True))


def _key(key: Any) -> Any:
    return key.decode("latin1") if isinstance(key, bytes) else key


def _finished(value: Any, file: _File) -> Any:
    """An array in the making as the array, read-only, or where it was left; anything else as it is."""
    if isinstance(value, _Array):
        if isinstance(value.raw, _InFile) and value.c_order:
            return StoredArray(value.raw.offset, value.shape, value.dtype.str)
        raw = file.read_at(*value.raw) if isinstance(value.raw, _InFile) else value.raw
        array = np.frombuffer(raw, value.dtype).reshape(value.shape, order="C" if value.c_order else "F")
        array.flags.writeable = False
        return array
    return file.read_at(*value) if isinstance(value, _InFile) else value
