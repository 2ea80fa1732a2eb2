"""Bytes that lie in one piece: in a file at any URL, or in a packed file that is unpacked first. Not what they mean.

A packed file is unpacked once on each machine, whole, into a file of the temporary folder that all processes there
share, in `eiwtrain-unpacked-UID`. It stays for the next run; remove it when the data set is written.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from data_prep.formats.unpickle import load_batch
from eiwtrain import storage
from eiwtrain.data.manifest import DataError
from eiwtrain.storage.private import file_lock, private_folder

_CHECKSUM = ".sha256"  # suffix of the file beside an unpacked one that says what it is
_known: dict[Path, tuple[int, ...]] = {}  # unpacked files that this process has compared with their checksum
GZIP, PICKLE = "\0gzip", "\0pickle"  # no names of members
ALWAYS_UNPACKED = 1 << 28  # bytes that anything may unpack to
_MOST_TIMES = 20  # its size to which a larger one may unpack: photographs hardly shrink
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # lzma takes gigabytes of memory if a file asks for it
_AT_ONCE = 1 << 22  # bytes a read of a file that is read from end to end
_AHEAD = (1 << 12, 1 << 16, 1 << 22)  # bytes read ahead: at least, at first, at most
_DENSE, _SPARSE = 8, 5  # reads from one block; a member of a tar takes two


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Some bytes of a file; calling it reads them, so it can be the loader of an item.

    Attributes:
        file: a URL, or a packed file.
        offset: the first byte.
        size: how many bytes; -1 for a whole file whose size is not known, which can only be called.
    """

    file: str | PackedFile
    offset: int = 0
    size: int = -1

    def __call__(self) -> bytes:
        """Read all bytes of the range.

        Raises:
            DataError: it cannot be read. A source that changes or breaks while it is read must not become rejects, or
                another run would give another data set.
        """
        url = self.url()
        try:
            return storage.read_bytes(url) if self.size < 0 else storage.read_range(url, self.offset, self.size)
        except (OSError, storage.StorageError) as e:
            cause = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
            raise DataError(f"source {url} cannot be read: {cause}") from None

    def open(self) -> BinaryIO:
        """Open the range as a file; every read is retried as `eiwtrain.storage` does."""
        return io.BufferedReader(RangeReader(self), _AT_ONCE)

    def url(self) -> str:
        """Return the URL of the file, which is unpacked now if it has to be."""
        return self.file if isinstance(self.file, str) else str(unpacked(self.file))

    def within(self, offset: int, size: int) -> ByteRange:
        """Return the part of this range that begins `offset` bytes after its own beginning."""
        return ByteRange(self.file, self.offset + offset, size)

    def name(self) -> str:
        """Return the name of the file for errors."""
        return self.file if isinstance(self.file, str) else self.file.name()


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A file that exists only once `inside` is unpacked.

    Attributes:
        inside: a gzip file, a zip, or a pickled batch.
        member: a name in a zip; `GZIP` for the content of a gzip file, `PICKLE` for the pixels of a batch, row by row.
        crc: CRC-32 of the bytes (for a gzip file the one it records itself); differs when the archive has changed.
    """

    inside: ByteRange
    member: str
    crc: int

    def name(self) -> str:
        """Return the name of the file for errors."""
        return self.inside.name() + ("" if self.member in (GZIP, PICKLE) else f"/{self.member}")


def unpacked(packed: PackedFile) -> Path:
    """Return the local file with the bytes of `packed`, which are unpacked unless they already were.

    One process of the machine unpacks and the others wait; the file appears whole or not at all.

    Raises:
        DataError: the archive is damaged.
        StorageError: the disk is full, the folder belongs to somebody else, or the archive cannot be read.
    """
    folder = private_folder("eiwtrain-unpacked", "TMPDIR")
    path = folder / _file_name(packed)
    if _is_as_unpacked(path):
        return path
    try:
        with file_lock(path.with_suffix(".lock")):
            if not _is_as_unpacked(path):
                part = path.with_suffix(".part")
                part.unlink(missing_ok=True)
                try:
                    with open(part, "xb") as out:  # a link is not followed
                        _unpack(packed, out)
                    path.unlink(missing_ok=True)  # before its checksum is another's
                    storage.write_bytes(str(path.with_suffix(_CHECKSUM)), storage.sha256_file(part).encode())
                    part.replace(path)
                finally:
                    part.unlink(missing_ok=True)  # what a failure leaves fills the disk
    except OSError as e:
        cause = e.strerror or e
        raise storage.StorageError(f"{packed.name()} cannot be unpacked to {folder}: {cause}") from None
    return path


def _is_as_unpacked(path: Path) -> bool:
    """Return whether the file is there with the bytes that were unpacked. Each process reads it once to know."""
    try:
        about = path.lstat()
        state = about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns
        if _known.get(path) != state:
            expected = path.with_suffix(_CHECKSUM).read_text()
            if not stat.S_ISREG(about.st_mode) or storage.sha256_file(path) != expected:
                return False
            _known[path] = state
    except (OSError, UnicodeDecodeError):
        return False
    return True


@lru_cache(maxsize=64)
def _file_name(packed: PackedFile) -> str:
    return hashlib.sha256(repr(packed).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _unpack(packed: PackedFile, out: BinaryIO) -> None:
    inside = packed.inside
    if packed.member == PICKLE:
        with inside.open() as file:
            out.write(np.ascontiguousarray(load_batch(file, inside.name())["data"]).data)
    elif packed.member == GZIP:
        try:
            with inside.open() as file, gzip.GzipFile(fileobj=file) as content:
                _copy(content, out, inside)
        except (gzip.BadGzipFile, EOFError, zlib.error) as e:
            raise DataError(f"{inside.name()}: the gzip file is damaged ({e})") from None
    else:
        with opened_zip(inside) as archive, archive.open(packed.member) as content:
            _copy(cast(BinaryIO, content), out, inside)


def _copy(content: BinaryIO | gzip.GzipFile, out: BinaryIO, packed: ByteRange) -> None:
    """Write the unpacked content of `packed`, as far as it may be long."""
    written = 0
    while block := content.read(_AT_ONCE):
        written += len(block)
        check_unpacked(packed, written)
        out.write(block)


def check_unpacked(packed: ByteRange, size: int, times: int = _MOST_TIMES, always: int = ALWAYS_UNPACKED) -> None:
    """Check that `packed` may unpack to `size` bytes: to `always` bytes, or to so many times its own size.

    Raises:
        DataError: it may not.
    """
    if size > max(always, times * packed.size):
        raise DataError(
            f"{packed.name()}: its {packed.size:,} bytes unpack to {size:,} or more, over {times} times as many; "
            "not unpacked: images do not shrink like that"
        )


def check_members(packed: ByteRange, members: Sequence[zipfile.ZipInfo], **bounds: int) -> None:
    """Check the members of a zip before any is read: that they share no bytes, and do not unpack to far too many.

    Raises:
        DataError: they do.
    """
    if sum(info.compress_size for info in members) > packed.size:
        raise DataError(f"{packed.name()}: its members overlap, so that it unpacks to more than it holds; not unpacked")
    check_unpacked(packed, sum(info.file_size for info in members), **bounds)


@contextmanager
def opened_zip(file: ByteRange) -> Iterator[zipfile.ZipFile]:
    """Open a zip; damage is a DataError, also where it is found while the zip is read."""
    try:
        with file.open() as content, zipfile.ZipFile(content) as archive:
            check_members(file, archive.infolist())
            for info in archive.infolist():
                if info.flag_bits & 1 or info.compress_type not in _METHODS:
                    raise DataError(f"{file.name()}: '{info.filename}' is encrypted, or not compressed by deflate")
            yield archive
    except DataError:
        raise
    except (zipfile.BadZipFile, EOFError, zlib.error, ValueError, NotImplementedError, struct.error) as e:
        raise DataError(f"{file.name()}: not a zip, or damaged ({e})") from None


class RangeReader(io.RawIOBase):
    """A `ByteRange` as a file that is read ahead in blocks.

    Blocks are large where reads are close together, and small where reads are far apart.
    """

    def __init__(self, file: ByteRange) -> None:
        self._url, self._offset, self._size = file.url(), file.offset, file.size
        self._at = 0
        self._block, self._from = b"", 0
        self._ahead, self._reads = _AHEAD[1], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = (0, self._at, self._size)[whence] + offset
        if at < 0:
            raise OSError("before the beginning")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        n = min(len(buffer), self._size - self._at)
        if n <= 0:
            return 0
        skip = self._at - self._from
        if not 0 <= skip <= len(self._block) - n:
            self._fetch(n)
            skip = 0
        buffer[:n] = self._block[skip : skip + n]
        self._at += n
        self._reads += 1
        return n

    def _fetch(self, n: int) -> None:
        """Read a block of at least `n` bytes at the position."""
        if self._reads > _DENSE:
            self._ahead = min(2 * self._ahead, _AHEAD[2])
        elif self._reads < _SPARSE:
            self._ahead = max(self._ahead // 2, _AHEAD[0])
        length = min(max(n, self._ahead), self._size - self._at)
        try:
            self._block = storage.read_range(self._url, self._offset + self._at, length)
        except FileNotFoundError as e:
            raise storage.StorageError(f"{self._url}: {type(e).__name__}: {e}") from None
        self._from, self._reads = self._at, 0
