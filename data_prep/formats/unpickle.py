"""Batches of pixels out of pickle files, without trusting them: arrays and plain values, nothing that runs code.

For the python batches of CIFAR-10 and of downsampled ImageNet. Not for pickles in general.

A file is first scanned opcode by opcode, which costs no memory for what it only claims to hold. Then the standard
library's unpickler loads what is left of it, and finds no other names than those in `_NAMES`.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from math import prod
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from eiwtrain.data.manifest import DataError
from eiwtrain.storage import StorageError
from eiwtrain.terminal.lines import one_line

LARGE = 1 << 10  # bytes from which on a run of bytes stays in the file until it is known what it is for
_MOST_OPCODES = 1 << 24  # a batch takes a few for each image; at some 64 bytes an object this bounds memory to 1 GB
_SHARED = 256  # bytes; longer values are not used twice, or a small file could grow large in memory
_MOST_DIMENSIONS = 32  # numpy's own limit before version 2
_MOST_LENGTH = 1 << 48  # of a dimension: larger numbers can take long to multiply or to print
_MOST_NESTED = 32  # lists, tuples and dicts in one another: Python hashes and prints them by recursion
_CHECKED = 1 << 16  # bytes from which on a length is compared with the file's size before it is read


class StoredArray(NamedTuple):
    """An array in C order that was left in the file: its first byte there, its shape and its dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


def load_batch(data: bytes | BinaryIO, what: str, leave: bool = False) -> dict[str, Any]:
    """Return the dict that is pickled in `data`, a whole file or one that is open at its start.

    Text of Python 2 is read as Latin-1, which loses nothing; keys are returned as text. Every name that would have to
    be imported is refused, except those that numpy's arrays are made with, and these stand for functions of this
    module: a pickle never chooses a function to call.

    Args:
        data: the pickle.
        what: the name of the file in errors.
        leave: do not read arrays of `LARGE` bytes or more that lie in `data` in one piece and in C order; return
            a `StoredArray` for each.

    Raises:
        DataError: the pickle is cut off, damaged, not a dict, or names anything else than arrays and plain values.
    """
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        small, left = _scan(file)
        batch = _Unpickler(small, encoding="latin1", buffers=left).load()
        if type(batch) is not dict:
            raise _Refused(f"it is a pickled {type(batch).__name__}, not a dict")
        return {_text(key): _finished(value, file, leave) for key, value in batch.items()}
    except _Refused as e:
        raise DataError(f"{what}: {e}") from None
    except (OSError, StorageError):
        raise
    except Exception as e:  # a damaged pickle raises anything
        cause = f"{type(e).__name__}: {one_line(e)}"
        raise DataError(f"{what}: not a pickled batch, or damaged; not loaded ({cause})") from None


class _Refused(ValueError):
    """A pickle that must not be loaded; the message is one line."""


class _Left(NamedTuple):
    """Bytes that the scan left in the file."""

    offset: int
    size: int


def _names(*names: str) -> dict[bytes, pickletools.OpcodeInfo]:
    return {op.code.encode("latin1"): op for op in pickletools.opcodes if op.name in names}


_TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_BYTES = ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8")
_LEAVABLE = ("BINSTRING", "BINBYTES", "BINBYTES8", "BYTEARRAY8")
_MEMO = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}
_SHAREABLE = {*_TEXTS, *_BYTES, "GLOBAL", "STACK_GLOBAL", "REDUCE"}  # never a list, tuple or dict
_OPCODES = _names(
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG"),
    *("LONG1", "LONG4", "FLOAT", "BINFLOAT", "TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST"),
    *("LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE"),
    *("BUILD", *_TEXTS, *_BYTES, *_MEMO[0], *_MEMO[1]),
)
_MAKING = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "LIST", "DICT"}  # others add to what stands before the rest
_LENGTHS = {  # how many bytes say how many follow
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def _scan(file: BinaryIO) -> tuple[BinaryIO, list[_Left]]:
    """Check every opcode; return the pickle without its large runs of bytes, and where these lie.

    In place of a run stands the opcode of an out-of-band buffer (PEP 574). A list, tuple or dict can stand in one place
    only, and not deep inside others, so what is loaded is a tree no larger than the file, quick to walk and to hash.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    small, left = io.BytesIO(), []
    shareable: dict[int, bool] = {}
    last, last_size = "", 0
    depths: list[int] = []  # of what is on the stack: how many lists, tuples and dicts are in one another there
    marks: list[int] = []
    for count in range(_MOST_OPCODES):
        op = _OPCODES.get(code := _read(file, 1, size))
        if op is None:
            raise _Refused(f"it has opcode {code[0]:#04x}, which arrays and plain values do not need; it is not loaded")
        length = 0
        if op.arg is None:
            argument = b""
        elif op.arg.n >= 0:
            argument = _read(file, op.arg.n, size)
        elif op.arg.n == pickletools.UP_TO_NEWLINE:
            argument = file.readline() + (file.readline() if op.name == "GLOBAL" else b"")
            length = len(argument)
        else:
            argument = _read(file, _LENGTHS[op.arg.n], size)
            length = int.from_bytes(argument, "little")
            if op.name in _LEAVABLE and length >= LARGE:
                left.append(_Left(file.tell(), length))
                _skip(file, length, size)
                code, argument = pickle.NEXT_BUFFER, b""
            else:
                argument += _read(file, length, size)
        if op.name in _MEMO[0]:
            number = len(shareable) if op.arg is None else _number(op, argument)
            if number > count:
                raise _Refused(f"it numbers a value {number:,} at opcode {count:,}; it is not loaded")
            shareable[number] = last in _SHAREABLE and last_size < _SHARED
        elif op.name in _MEMO[1] and not shareable.get(_number(op, argument)):
            raise _Refused("it uses a large value, a list, a tuple or a dict twice; it is not loaded")
        last, last_size = op.name, length
        _follow(op, depths, marks)
        if op.name != "FRAME":  # its length would be another now, and it is optional
            small.write(code + argument)
        if op.name == "STOP":
            small.seek(0)
            return small, left
    raise _Refused(f"it has more than {_MOST_OPCODES:,} opcodes; it is not loaded")


def _follow(op: pickletools.OpcodeInfo, depths: list[int], marks: list[int]) -> None:
    """Do to the depths of what is on the stack what an opcode does to the stack."""
    if op.name == "MARK":
        marks.append(len(depths))
        return
    if not op.stack_before and op.stack_after:  # nearly all: a number, a text, a name
        depths.append(0)
        return
    taken = len(op.stack_before)
    if pickletools.stackslice in op.stack_before:  # what is above the mark, and what is named before the mark
        taken = len(depths) - marks.pop() + op.stack_before.index(pickletools.markobject)
    if taken > len(depths):
        raise EOFError("an opcode finds less than it needs")
    inner = depths[len(depths) - taken :]
    del depths[len(depths) - taken :]
    if not op.stack_after:
        return
    first = 1 if op.name in _MAKING else 0
    depth = max([first + n for n in inner[:1]] + [1 + n for n in inner[1:]], default=first)
    if depth > _MOST_NESTED:
        raise _Refused(f"it nests values more than {_MOST_NESTED} deep; it is not loaded")
    depths.append(depth)


def _number(op: pickletools.OpcodeInfo, argument: bytes) -> int:
    return int(argument) if op.name in ("PUT", "GET") else int.from_bytes(argument, "little")


def _read(file: BinaryIO, length: int, size: int) -> bytes:
    """Read `length` bytes; raise before memory is allocated for more than the file, of `size` bytes, holds."""
    if length > _CHECKED:
        start = file.tell()
        _skip(file, length, size)
        file.seek(start)
    data = file.read(length)
    if len(data) < length:
        raise EOFError("it is cut off")
    return data


def _skip(file: BinaryIO, length: int, size: int) -> None:
    if length > size - file.tell():
        raise EOFError("it is cut off")
    file.seek(length, io.SEEK_CUR)


class _DType:
    """A dtype while it is loaded."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            named = f"{code!r:.40}" if isinstance(code, str) else f"given by a {type(code).__name__}"
            raise _Refused(f"an array of dtype {named}; only plain numbers are allowed")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("|", "<", ">", "="):
            raise _Refused("an array without a byte order; it is not loaded")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array while it is loaded."""

    def __init__(self) -> None:
        self.__setstate__((1, (0,), _DType("u1"), False, b""))

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 has no bytes
        if not isinstance(dtype, _DType) or not isinstance(raw, (bytes, bytearray, _Left)):
            raise _Refused("an array without a dtype or without bytes; it is not loaded")
        if (
            type(shape) is not tuple
            or len(shape) > _MOST_DIMENSIONS
            or not all(type(n) is int and 0 <= n <= _MOST_LENGTH for n in shape)
        ):
            raise _Refused("an array without a shape; it is not loaded")
        size = raw.size if isinstance(raw, _Left) else len(raw)
        if size != prod(shape) * dtype.dtype.itemsize:
            raise _Refused(f"{size} bytes for an array of shape {str(shape)[:80]} and dtype {dtype.dtype}")
        self.shape, self.dtype, self.raw = shape, dtype.dtype, raw
        self.order: Literal["C", "F"] = "F" if fortran else "C"
        self._read: npt.NDArray[Any] | None = None

    def finished(self, file: BinaryIO, leave: bool) -> npt.NDArray[Any] | StoredArray:
        """Return the array, read-only, or where it lies."""
        if leave and isinstance(self.raw, _Left) and self.order == "C":
            return StoredArray(self.raw.offset, self.shape, self.dtype.str)
        if self._read is None:
            flat = np.frombuffer(_bytes(self.raw, file), self.dtype)
            self._read = flat.reshape(self.shape, order=self.order)
            self._read.flags.writeable = False
        return self._read


class _Name:
    """A name that a batch may use; called, it makes a value, and nothing can be set on it."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("it sets the state of what it names; it is not loaded")


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _NDARRAY:
        raise _Refused("an array of another class than numpy's ndarray; it is not loaded")
    return _Array()


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, {"C": False, "F": True}[order], raw))
    return array


def _scalar(dtype: Any, raw: Any) -> Any:
    array = _Array()
    array.__setstate__((1, (), dtype, False, raw))
    return np.frombuffer(array.raw, array.dtype).item()  # type: ignore[arg-type]


def _encode(text: Any, codec: Any) -> bytes:
    if type(codec) is not str or codec != "latin1":
        raise _Refused("it encodes text otherwise than as latin1; it is not loaded")
    return str.encode(text, "latin1")


def _empty_bytes() -> bytes:
    return b""


def _never(*arguments: Any) -> Any:
    raise _Refused("it calls ndarray itself; it is not loaded")


_NDARRAY = _Name(_never)
_NAMES = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Name(_DType),
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Name(_reconstruct) for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Name(_scalar) for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Name(_frombuffer) for core in ("core", "_core")},
    ("_codecs", "encode"): _Name(_encode),  # as Python 3 puts bytes in protocols that have none
    ("__builtin__", "bytes"): _Name(_empty_bytes),  # and an empty one
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Name:
        if (module, name) not in _NAMES:
            named = ascii(f"{module}.{name}"[:100])[1:-1]
            raise _Refused(f"it needs {named}, which is neither an array nor a plain value; it is not loaded")
        return _NAMES[module, name]


def _finished(value: Any, file: BinaryIO, leave: bool) -> Any:
    """Return the value with its arrays, and with the bytes that were left in the file."""
    if isinstance(value, _Array):
        return value.finished(file, leave)
    if isinstance(value, _Left):
        return _bytes(value, file)
    if type(value) is dict:
        return {key: _finished(inner, file, leave) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_finished(inner, file, leave) for inner in value)
    return value


def _bytes(raw: bytes | bytearray | _Left, file: BinaryIO) -> bytes | bytearray:
    if not isinstance(raw, _Left):
        return raw
    file.seek(raw.offset)
    return file.read(raw.size)


def _text(key: Any) -> Any:
    return key.decode("latin1") if isinstance(key, bytes) else key
