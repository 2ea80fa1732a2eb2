"""Finds the rows of pixels in batch files, in which many images of one size lie, and reads one in a worker.

A row that lies in its file uncompressed is read by its offset, at any URL. A file that is compressed, or pickled so
that rows do not lie in one piece, is unpacked once on each machine (see `data_prep.formats.ranges`).

Not for what batches mean: that is in `data_prep.sources.cifar10` and `downsampled`.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.formats.ranges import GZIP, PICKLE, ByteRange, PackedFile, opened_zip, unpacked
from data_prep.formats.unpickle import StoredArray, load_batch
from data_prep.items import Item, LazyItems, join_items
from eiwtrain.data.manifest import DataError
from eiwtrain.storage import StorageError
from eiwtrain.terminal.lines import one_line

_LOCAL_HEADER = 30  # bytes of a zip's local header before the name
_GZIP_LEAST = 20  # bytes of a gzip file of nothing


@dataclass(frozen=True, slots=True)
class Row:
    """Loads an image from its planes of red, green and blue, `side` x `side` bytes each."""

    planes: ByteRange
    side: int

    def __call__(self) -> npt.NDArray[np.uint8]:
        planes = np.frombuffer(self.planes(), np.uint8).reshape(3, self.side, self.side)
        return np.ascontiguousarray(planes.transpose(1, 2, 0))  # as encoders need it


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Images of one size that lie in a file as rows of pixels, at equal distances.

    Attributes:
        name: of the batch; the same on every machine.
        rows: begins with the pixels of the first image.
        stride: bytes from one row to the next.
        side: height and width of the images, in pixels.
        labels: class indices, -1 for none.
    """

    name: str
    rows: ByteRange
    stride: int
    side: int
    labels: npt.NDArray[np.int64]

    def item(self, row: int) -> Item:
        """Return the image of a row, counted from 0."""
        size = 3 * self.side**2
        load = Row(self.rows.within(row * self.stride, size), self.side)
        return Item(int(self.labels[row]), f"{self.name}/{row}", size, load)


def batch_items(batches: Sequence[RowBatch]) -> LazyItems:
    """Return the images of batches, one batch after the other."""
    return join_items([LazyItems(batch.item, range(len(batch.labels))) for batch in batches])


def gunzipped(file: ByteRange) -> ByteRange:
    """Return the content of a gzip file, which is unpacked at once.

    Raises:
        DataError: it is not a gzip file, or damaged.
    """
    if file.size < _GZIP_LEAST or file.within(0, 2)() != b"\x1f\x8b":
        raise DataError(f"{file.name()}: not a gzip file")
    packed = PackedFile(file, GZIP, int.from_bytes(file.within(file.size - 8, 4)(), "little"))
    return ByteRange(packed, 0, unpacked(packed).stat().st_size)


def zip_members(file: ByteRange) -> dict[str, ByteRange]:
    """Return the files in a zip by name; those that are compressed are unpacked when they are first read.

    Raises:
        DataError: it is not a zip.
    """
    with opened_zip(file) as archive:
        members = [info for info in archive.infolist() if not info.is_dir()]
    return {info.filename: _zip_member(file, info) for info in members}


def _zip_member(file: ByteRange, info: zipfile.ZipInfo) -> ByteRange:
    if info.compress_type != zipfile.ZIP_STORED:
        return ByteRange(PackedFile(file, info.filename, info.CRC), 0, info.file_size)
    lengths = file.within(info.header_offset + _LOCAL_HEADER - 4, 4)()  # of name and extra field, which follow
    start = _LOCAL_HEADER + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return file.within(info.header_offset + start, info.file_size)


def pickled_batch(file: ByteRange, name: str) -> RowBatch:
    """Read a batch that is a pickled dict with `data`, uint8 (N, 3 * side**2), and `labels`, N integers.

    Raises:
        DataError: it is not such a batch, or a pickle that must not be loaded (see `unpickle.load_batch`).
    """
    with file.open() as opened:
        batch = load_batch(opened, file.name(), leave=True)
    data, labels = (_known(batch, key, file) for key in ("data", "labels"))
    if isinstance(labels, StoredArray):
        labels = np.frombuffer(_stored(file, labels)(), labels.dtype).reshape(labels.shape)
    if isinstance(data, StoredArray):
        return _batch(file, name, _stored(file, data), data.shape, data.dtype, labels)
    if not isinstance(data, np.ndarray):
        raise DataError(f"{file.name()}: its data is a {type(data).__name__}, not an array")
    packed = PackedFile(file, PICKLE, zlib.crc32(np.ascontiguousarray(data).data))
    return _batch(file, name, ByteRange(packed, 0, data.nbytes), data.shape, data.dtype, labels)


def npz_batch(file: ByteRange, name: str) -> RowBatch:
    """Read a batch that is an npz file of the arrays of `pickled_batch`.

    Raises:
        DataError: it is not such a batch.
    """
    members = zip_members(file)
    data, labels = (_known(members, f"{key}.npy", file) for key in ("data", "labels"))
    shape, fortran_order, dtype, start = _npy_header(file, data)
    of_labels, _, kind, first = _npy_header(file, labels)
    if of_labels != shape[:1] or kind.kind not in "iu" or labels.size - first != prod(of_labels) * kind.itemsize:
        raise _no_labels(file, shape)
    numbers = np.frombuffer(labels.within(first, labels.size - first)(), kind)
    if fortran_order:
        raise DataError(f"{file.name()}: its rows do not lie in one piece; save it again in C order")
    return _batch(file, name, data.within(start, data.size - start), shape, dtype, numbers)


def _npy_header(file: ByteRange, array: ByteRange) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return the shape of an array in .npy format, whether it is in Fortran order, its dtype and its first byte."""
    try:
        with array.open() as opened:
            version = np.lib.format.read_magic(opened)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            return (*read(opened), opened.tell())
    except (DataError, OSError, StorageError):
        raise
    except Exception as e:  # the header is read as Python
        raise DataError(f"{file.name()}: it holds no plain arrays ({one_line(e)})") from None


def _batch(file: ByteRange, name: str, rows: ByteRange, shape: tuple[int, ...], dtype: Any, labels: Any) -> RowBatch:
    side = isqrt(shape[1] // 3) if len(shape) == 2 else 0
    if np.dtype(dtype) != np.uint8 or side == 0 or shape[1] != 3 * side**2 or rows.size != shape[0] * shape[1]:
        raise DataError(
            f"{file.name()}: its data is {np.dtype(dtype)} {tuple(shape)} in {rows.size} bytes, not uint8 "
            f"(N, 3 * side * side)"
        )
    if type(labels) in (list, tuple) and all(type(n) is int and abs(n) < 1 << 63 for n in labels):
        labels = np.array(labels, np.int64)  # of anything else numpy could make far more than there is in the file
    if not isinstance(labels, np.ndarray) or labels.shape != shape[:1] or labels.dtype.kind not in "iu":
        raise _no_labels(file, shape)
    return RowBatch(name, rows, shape[1], side, labels.astype(np.int64))


def _no_labels(file: ByteRange, shape: tuple[int, ...]) -> DataError:
    return DataError(f"{file.name()}: its labels are not {shape[0] if shape else 0} integers, one for each image")


def _known(of: Mapping[str, Any], key: str, file: ByteRange) -> Any:
    if key not in of:
        there = ", ".join(f"{name!r:.40}" for name in list(of)[:5] if isinstance(name, str))
        raise DataError(f"{file.name()}: it holds no '{key}', only {there or 'nothing that has a name'}")
    return of[key]


def _stored(file: ByteRange, array: StoredArray) -> ByteRange:
    return file.within(array.offset, prod(array.shape) * np.dtype(array.dtype).itemsize)
