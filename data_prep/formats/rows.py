"""Batch files, in which many images of one size lie as rows of pixels: where each row is, and how a worker reads it.

A row that lies in its file as it is, is read by its offset, at any URL. What is compressed, or pickled so that rows do
not lie in one piece, is unpacked once per machine, whole, into a file of the temporary folder that all processes
there share, in `eiwtrain-unpacked-UID`. It stays for the next run; remove it when the data set is written.

Not for what batches mean: that is the business of `cifar10` and `downsampled`.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import os
import shutil
import tempfile
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import isqrt, prod
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import numpy.typing as npt

from data_prep.formats.files import Entry
from data_prep.formats.unpickle import StoredArray, load_batch
from data_prep.items import FileImage, Item, RangeImage
from eiwtrain import storage
from eiwtrain.data.manifest import DataError
from eiwtrain.terminal.lines import one_line

_AHEAD = 1 << 22  # bytes a read of a file that is read from end to end
_LOCAL_HEADER = 30  # bytes of a zip's local header before the name
_GZIP_LEAST = 20  # bytes of a gzip file of nothing


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes that lie in one piece in a file at a URL, or in what has to be unpacked first."""

    file: str | Packed
    offset: int
    size: int

    def open(self) -> BinaryIO:
        """For reading at random; every read is retried as `eiwtrain.storage` does."""
        return io.BufferedReader(_PartFile(self.path(), self.offset, self.size), _AHEAD)

    def read(self) -> bytes:
        """All of it."""
        return RangeImage(self.path(), self.offset, self.size)()

    def path(self) -> str:
        """The file it lies in, a URL; unpacked where need be."""
        return _url(self.file)

    def within(self, offset: int, size: int) -> Part:
        """Part of this part."""
        return Part(self.file, self.offset + offset, size)

    def name(self) -> str:
        """For errors."""
        return self.file if isinstance(self.file, str) else self.file.name()


@dataclass(frozen=True, slots=True)
class Packed:
    """Bytes that exist only when `inside` is unpacked.

    Attributes:
        inside: a gzip file, a zip, or a pickled batch.
        member: of a zip, by name; `GZIP` for the content of a gzip file, `PICKLE` for the pixels of a batch, row by
            row.
        crc: CRC-32 of the bytes (of those of the tar that a gzip file holds, as it says itself): tells one state of
            the archive from another.
    """

    inside: Part
    member: str
    crc: int

    def name(self) -> str:
        """For errors."""
        return self.inside.name() + ("" if self.member in (GZIP, PICKLE) else f"/{self.member}")


GZIP, PICKLE = "\0gzip", "\0pickle"  # no names of members


@dataclass(frozen=True, slots=True)
class Row:
    """An image as planes of red, green and blue, `side` x `side` bytes each, in a file from `offset` on."""

    file: str | Packed
    offset: int
    side: int

    def __call__(self) -> npt.NDArray[np.uint8]:
        raw = RangeImage(_url(self.file), self.offset, 3 * self.side**2)()
        planes = np.frombuffer(raw, np.uint8).reshape(3, self.side, self.side)
        return np.ascontiguousarray(planes.transpose(1, 2, 0))  # as encoders want it


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows in a file, at equal distances.

    Attributes:
        name: of the batch, without anything of the machine.
        file, offset: where the first row begins.
        stride: bytes from one row to the next.
        side: height and width of the images, in pixels.
        labels: class indices, -1 for none.
    """

    name: str
    file: str | Packed
    offset: int
    stride: int
    side: int
    labels: npt.NDArray[np.int64]


class BatchItems(Sequence[Item]):
    """The rows of batches, one after the other, as items that are made when they are asked for."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self._ends = list(accumulate(len(batch.labels) for batch in batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        number = bisect_right(self._ends, position)
        batch = self._batches[number]
        row = position - (self._ends[number] - len(batch.labels))
        load = Row(batch.file, batch.offset + row * batch.stride, batch.side)
        return Item(int(batch.labels[row]), f"{batch.name}/{row}", 3 * batch.side**2, load)


def part_of(entry: Entry) -> Part:
    """Where a file that was listed lies.

    Raises:
        DataError: it lies in a zip.
    """
    if isinstance(entry.load, FileImage):
        return Part(entry.load.url, 0, entry.size)
    if isinstance(entry.load, RangeImage):
        return Part(entry.load.url, entry.load.offset, entry.size)
    raise DataError(f"{'/'.join(entry.parts)}: inside a zip it cannot be read in place; unpack the zip")


def gunzipped(part: Part) -> Part:
    """The content of a gzip file, which is unpacked at once.

    Raises:
        DataError: it is no gzip file, or damaged.
    """
    if part.size < _GZIP_LEAST or part.within(0, 2).read() != b"\x1f\x8b":
        raise DataError(f"{part.name()}: no gzip file")
    packed = Packed(part, GZIP, int.from_bytes(part.within(part.size - 8, 4).read(), "little"))
    return Part(packed, 0, unpacked(packed).stat().st_size)


def zip_members(part: Part) -> dict[str, Part]:
    """The files in a zip by name. What is compressed there is unpacked when it is first read.

    Raises:
        DataError: it is no zip.
    """
    with _opened_zip(part) as archive:
        members = [info for info in archive.infolist() if not info.is_dir()]
    return {info.filename: _zip_member(part, info) for info in members}


def _zip_member(part: Part, info: zipfile.ZipInfo) -> Part:
    if info.compress_type != zipfile.ZIP_STORED:
        return Part(Packed(part, info.filename, info.CRC), 0, info.file_size)
    lengths = part.within(info.header_offset + _LOCAL_HEADER - 4, 4).read()  # of name and extra field, which follow
    start = _LOCAL_HEADER + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return part.within(info.header_offset + start, info.file_size)


def pickled_batch(part: Part, name: str) -> Batch:
    """The batch of that name in a pickle of a dict with `data`, uint8 (N, 3 * side**2), and `labels`, N integers.

    Raises:
        DataError: it is none, or no pickle that may be loaded (see `unpickle.load_batch`).
    """
    with part.open() as file:
        batch = load_batch(file, part.name(), leave=True)
    data, labels = (_known(batch, key, part) for key in ("data", "labels"))
    if isinstance(labels, StoredArray):
        labels = np.frombuffer(_stored(part, labels).read(), labels.dtype).reshape(labels.shape)
    if isinstance(data, StoredArray):
        return _batch(part, name, _stored(part, data), data.shape, data.dtype, labels)
    if not isinstance(data, np.ndarray):
        raise DataError(f"{part.name()}: its data are a {type(data).__name__}, not an array")
    packed = Packed(part, PICKLE, zlib.crc32(np.ascontiguousarray(data).data))
    return _batch(part, name, Part(packed, 0, data.nbytes), data.shape, data.dtype, labels)


def npz_batch(part: Part, name: str) -> Batch:
    """The batch of that name in an npz file of arrays as in `pickled_batch`.

    Raises:
        DataError: it is none.
    """
    members = zip_members(part)
    data, labels = (_known(members, f"{key}.npy", part) for key in ("data", "labels"))
    try:
        numbers = np.load(io.BytesIO(labels.read()), allow_pickle=False)
        with data.open() as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, fortran_order, dtype = read(file)
            start = file.tell()
    except (ValueError, KeyError, EOFError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{part.name()}: no plain arrays are in it ({one_line(e)})") from None
    if fortran_order:
        raise DataError(f"{part.name()}: its rows do not lie in one piece; save it again in C order")
    return _batch(part, name, data.within(start, data.size - start), shape, dtype, numbers)


def _batch(part: Part, name: str, rows: Part, shape: tuple[int, ...], dtype: Any, labels: Any) -> Batch:
    side = isqrt(shape[1] // 3) if len(shape) == 2 else 0
    if np.dtype(dtype) != np.uint8 or side == 0 or shape[1] != 3 * side**2 or rows.size != shape[0] * shape[1]:
        raise DataError(
            f"{part.name()}: its data are {np.dtype(dtype)} {tuple(shape)} in {rows.size} bytes, not uint8 "
            f"(N, 3 * side * side)"
        )
    try:
        numbers = np.asarray(labels)
    except ValueError:  # lists of unequal lengths
        numbers = np.empty(0)
    if numbers.shape != shape[:1] or numbers.dtype.kind not in "iu":
        raise DataError(f"{part.name()}: its labels are not {shape[0]} integers, one for each image")
    return Batch(name, rows.file, rows.offset, shape[1], side, numbers.astype(np.int64))


def _known(of: Mapping[str, Any], key: str, part: Part) -> Any:
    if key not in of:
        raise DataError(f"{part.name()}: no '{key}' is in it, only {', '.join(map(repr, list(of)[:5])) or 'nothing'}")
    return of[key]


def _stored(part: Part, array: StoredArray) -> Part:
    return part.within(array.offset, prod(array.shape) * np.dtype(array.dtype).itemsize)


def unpacked(packed: Packed) -> Path:
    """The local file with the bytes of `packed`, which are unpacked unless they were before.

    One process of the machine unpacks and the others wait; the file appears whole or not at all.

    Raises:
        DataError: the archive is damaged.
        StorageError: there is no room, or it cannot be read.
    """
    path = _place(packed, tempfile.gettempdir())
    if path.exists():
        return path
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel, also when this process is killed
            if not path.exists():
                part = path.with_suffix(".part")
                with open(part, "wb") as out:
                    _unpack(packed, out)
                part.replace(path)
    except OSError as e:
        cause = e.strerror or e
        raise storage.StorageError(f"{packed.name()} cannot be unpacked to {folder}: {cause}") from None
    return path


@lru_cache(maxsize=64)
def _place(packed: Packed, temporary: str) -> Path:
    name = hashlib.sha256(repr(packed).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return Path(temporary, f"eiwtrain-unpacked-{os.getuid()}", name)


def _unpack(packed: Packed, out: BinaryIO) -> None:
    inside = packed.inside
    if packed.member == PICKLE:
        with inside.open() as file:
            out.write(np.ascontiguousarray(load_batch(file, inside.name())["data"]).data)
    elif packed.member == GZIP:
        try:
            with inside.open() as file, gzip.GzipFile(fileobj=file) as content:
                shutil.copyfileobj(content, out, _AHEAD)
        except (gzip.BadGzipFile, EOFError, zlib.error) as e:
            raise DataError(f"{inside.name()}: the gzip file is damaged ({e})") from None
    else:
        with _opened_zip(inside) as archive, archive.open(packed.member) as content:
            shutil.copyfileobj(content, out, _AHEAD)


@contextmanager
def _opened_zip(part: Part) -> Iterator[zipfile.ZipFile]:
    try:
        with part.open() as file, zipfile.ZipFile(file) as archive:
            yield archive
    except (zipfile.BadZipFile, EOFError, zlib.error) as e:
        raise DataError(f"{part.name()}: no zip, or a damaged one ({e})") from None


def _url(file: str | Packed) -> str:
    return file if isinstance(file, str) else str(unpacked(file))


class _PartFile(io.RawIOBase):
    """Part of a file at a URL, as a file."""

    def __init__(self, url: str, offset: int, size: int) -> None:
        self._url, self._offset, self._size, self._position = url, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if self._position < 0:
            raise ValueError("a position before the start")
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._position))
        buffer[:size] = RangeImage(self._url, self._offset + self._position, size)()
        self._position += size
        return size
