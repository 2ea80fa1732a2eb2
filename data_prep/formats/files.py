"""Files of a source wherever they lie: in a folder, a tar or a zip, at any fsspec URL. Knows nothing of what they mean.

Archives are listed by their headers and read by offset, remote ones too: nothing is unpacked or copied.
"""

from __future__ import annotations

import io
import os
import posixpath
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.items import IMAGE_SUFFIXES, FileImage, RangeImage
from eiwtrain import storage
from eiwtrain.data.manifest import DataError

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # the first is a member, the second the end of one without members
_LOCAL_HEADER = struct.Struct("<4s22x2H")  # signature, lengths of the name and of the extra field
_UTF8 = 1 << 11  # flag of a zip's member
_NOWHERE = ("", ".", "..")
_LINKS = 8  # rounds, each of which halves the length of a chain of links
_AFTER_END = 1 << 16  # bytes behind the end of a tar that have to be zero; tar pads to 10 KiB
_AHEAD = (1 << 12, 1 << 16, 1 << 22)  # bytes read ahead: at least, at first, at most
_DENSE, _SPARSE = 8, 5  # reads from one block; a member of a tar takes two
# What is read beyond a member, whose local extra field can be longer than the directory says. The directory and its
# end record follow every member, so there are always so many bytes.
_SLACK = 64


class Entry(NamedTuple):
    """A file: the parts of its name below the top, its bytes, and how to load it."""

    parts: tuple[str, ...]
    size: int
    load: Callable[[], bytes]


_NOTHING = Entry((), 0, bytes)


@dataclass(frozen=True, slots=True)
class ZipImage:
    """An image in a zip at any URL: read by its offset, inflated where need be, and checked.

    Attributes:
        header: offset of its local header.
        ahead: likely bytes of that header.
        packed, size: bytes in the zip, and bytes of the image.
        crc: of the image.
    """

    url: str
    header: int
    ahead: int
    packed: int
    size: int
    crc: int
    deflated: bool

    def __call__(self) -> bytes:
        try:
            data = storage.read_range(self.url, self.header, self.ahead + self.packed + _SLACK)
            signature, name, extra = _LOCAL_HEADER.unpack_from(data)
            start = _LOCAL_HEADER.size + name + extra
            if missing := max(0, start + self.packed - len(data)):
                data += storage.read_range(self.url, self.header + len(data), missing)
            image = data[start : start + self.packed]
            if self.deflated:
                image = zlib.decompressobj(-zlib.MAX_WBITS).decompress(image, self.size + 1)
        except (OSError, storage.StorageError, zlib.error) as e:
            raise DataError(f"source {self.url} cannot be read at byte {self.header}: {e}") from None
        if signature != _ZIP[0] or len(image) != self.size or zlib.crc32(image) != self.crc:
            raise DataError(f"source {self.url}: the zip is damaged at byte {self.header}")
        return image


def list_files(url: str, suffixes: Collection[str] = IMAGE_SUFFIXES) -> list[Entry]:
    """The files with these suffixes (in lower case) under the folder, or inside the tar or zip, at `url`, by name.

    Links are followed, except in zips. Files and folders whose names begin with a dot are left out. Of files of the
    same name in an archive the last one counts, as when it is unpacked.

    Raises:
        DataError: nothing is there, or it is neither a folder nor an archive that can be read by offset.
        StorageError: it cannot be reached.
    """
    url, ends = storage.absolute(url), tuple(suffixes)
    fs, path = storage.filesystem(url)
    try:
        about = storage.retrying(url, lambda: fs.info(path))
    except FileNotFoundError:
        raise DataError(f"source {url}: no such folder, tar or zip") from None
    if about["type"] == "directory":
        return _in_order((_in_folder if storage.is_local(url) else _in_bucket)(url, ends))
    head = storage.read_range(url, 0, min(storage.size(url), tarfile.BLOCKSIZE))
    if head.startswith(_ZIP):
        return _in_order(_in_zip(url, ends))
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(f"source {url}: compressed by {name}; uncompress it: only then it can be read by offset")
    try:
        if head.count(b"\0") < tarfile.BLOCKSIZE:  # a tar of nothing is all zeros
            tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError:
        raise DataError(f"source {url}: a file, and neither an uncompressed tar nor a zip") from None
    return list_tar(url, suffixes)


def list_tar(
    url: str, suffixes: Collection[str] = IMAGE_SUFFIXES, offset: int = 0, size: int | None = None
) -> list[Entry]:
    """As `list_files` for a tar; it can lie inside another file, as in another tar, at `offset` with `size` bytes.

    Loaders are `RangeImage`s of the file at `url`. Of a remote tar little more than the headers is read where its
    members are large; they come one after the other, so several tars are better listed side by side, in threads.
    """
    end = storage.size(url) if size is None else offset + size
    return _in_order(_in_tar(url, offset, end, tuple(suffixes)))


def _in_order(found: Iterable[Entry]) -> list[Entry]:
    """By name; of equal names the last."""
    ordered = sorted(found, key=itemgetter(0))
    return [a for a, b in pairwise(chain(ordered, [_NOTHING])) if a.parts != b.parts]


def _parts(name: str) -> tuple[str, ...]:
    """Parts of a name in an archive or a bucket; folders, which many names share, are kept once."""
    *folders, last = [p for p in name.split("/") if p not in _NOWHERE] or [""]
    return (*map(sys.intern, folders), last)


def _wanted(parts: tuple[str, ...], ends: tuple[str, ...]) -> bool:
    return parts[-1].lower().endswith(ends) and not any(p.startswith(".") for p in parts)


def _in_folder(
    folder: str, ends: tuple[str, ...], parts: tuple[str, ...] = (), above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[Entry]:
    """Files of a local folder and those below it; `above` tells the folders above it, to which a link may lead."""
    try:
        about = Path(folder).stat()
        here = (about.st_dev, about.st_ino)
        if here in above:
            return
        with os.scandir(folder) as listing:
            found = [f for f in listing if not f.name.startswith(".")]
        for f in found:
            if f.is_symlink() and not Path(f.path).exists():
                continue
            if f.is_dir():
                yield from _in_folder(f.path, ends, (*parts, f.name), above | {here})
            elif _wanted((f.name,), ends) and f.is_file():
                yield Entry((*parts, f.name), f.stat().st_size, FileImage(f.path))
    except OSError as e:
        raise DataError(f"source {e.filename} cannot be read: {e.strerror}") from None


def _in_bucket(url: str, ends: tuple[str, ...]) -> Iterator[Entry]:
    for name, size in storage.find(url):
        if _wanted(parts := _parts(name), ends):
            yield Entry(parts, size, FileImage(storage.join(url, name)))


def _in_tar(url: str, start: int, end: int, ends: tuple[str, ...]) -> Iterator[Entry]:
    links = {}
    for parts, member, _ in tar_members(url, start, end):
        if member.isreg() and _wanted(parts, ends):
            yield Entry(parts, member.size, RangeImage(url, member.offset_data, member.size))
        elif (member.issym() or member.islnk()) and _wanted(parts, ends):
            folder = posixpath.dirname(member.name) if member.issym() else ""
            links[parts] = _parts(posixpath.normpath(posixpath.join(folder, member.linkname)))
    if not links:
        return
    for _ in range(_LINKS):
        links = {parts: links.get(target, target) for parts, target in links.items()}
    targets = set(links.values())
    found = {parts: m for parts, m, _ in tar_members(url, start, end) if m.isreg() and parts in targets}
    for parts, target in links.items():
        if m := found.get(target):
            yield Entry(parts, m.size, RangeImage(url, m.offset_data, m.size))


def tar_members(
    url: str, start: int, end: int
) -> Iterator[tuple[tuple[str, ...], tarfile.TarInfo, Callable[[], bytes]]]:
    """Yield the members of the tar between two bytes of the file at `url`, in the tar's order: the parts of its name,
    its header with offsets counted from the beginning of that file, and a way to read it before the next one is taken.
    """
    ranged = _Ranged(url, start, end)
    try:
        with tarfile.open(fileobj=ranged, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            # an empty tar is not asked for a second member: Python 3.10 would look before its beginning
            while (tar.firstmember or tar.offset) and (member := tar.next()):  # type: ignore[attr-defined]
                tar.members.clear()  # type: ignore[attr-defined]  # or it keeps them all
                if member.issparse():
                    raise DataError(
                        f"source {url}: '{member.name}' is packed as a sparse file; pack it without --sparse"
                    )
                yield _parts(member.name), member, partial(_read_member, ranged, member)
            ranged.seek(tar.offset)
    except DataError:
        raise
    except (tarfile.TarError, ValueError) as e:
        raise DataError(f"source {url}: a broken tar: {e}") from None
    if ranged.read(_AFTER_END).strip(b"\0"):
        raise DataError(f"source {url}: a broken tar, or several put together: what is at byte {tar.offset}?")


def _read_member(ranged: _Ranged, member: tarfile.TarInfo) -> bytes:
    ranged.seek(member.offset_data)
    return ranged.read(member.size)


def _in_zip(url: str, ends: tuple[str, ...]) -> Iterator[Entry]:
    try:
        end = storage.size(url)
        with zipfile.ZipFile(_Ranged(url, 0, end)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as e:
        raise DataError(f"source {url}: a broken zip: {e}") from None
    for m in members:
        parts = _parts(m.filename)
        if m.filename.endswith("/") or not _wanted(parts, ends):
            continue
        if m.flag_bits & 1 or m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            what = "encrypted" if m.flag_bits & 1 else "compressed by a method other than deflate"
            raise DataError(f"source {url}: '{m.filename}' is {what}; unzip it and give the folder")
        name = m.orig_filename.encode("utf-8" if m.flag_bits & _UTF8 else "cp437")
        ahead = _LOCAL_HEADER.size + len(name) + len(m.extra)
        if not 0 <= m.header_offset <= end - ahead - m.compress_size - _SLACK:
            raise DataError(f"source {url}: a broken zip: '{m.filename}' is said to lie outside it")
        deflated = m.compress_type == zipfile.ZIP_DEFLATED
        load = ZipImage(url, m.header_offset, ahead, m.compress_size, m.file_size, m.CRC, deflated)
        yield Entry(parts, m.file_size, load)


class _Ranged(io.RawIOBase):
    """Bytes `start` to `end` of the file at `url`, as a file; positions count from the beginning of that file.

    Read ahead in blocks: large ones where reads are close together, small ones where there is much between them.
    """

    def __init__(self, url: str, start: int, end: int) -> None:
        self._url, self._at, self._end = url, start, end
        self._block, self._from = b"", start
        self._ahead, self._reads = _AHEAD[1], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = (0, self._at, self._end)[whence] + offset
        if at < 0:
            raise OSError("before the beginning")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        n = min(len(buffer), self._end - self._at)
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
        """The block at the position, of at least `n` bytes."""
        if self._reads > _DENSE:
            self._ahead = min(2 * self._ahead, _AHEAD[2])
        elif self._reads < _SPARSE:
            self._ahead = max(self._ahead // 2, _AHEAD[0])
        length = min(max(n, self._ahead), self._end - self._at)
        try:
            self._block = storage.read_range(self._url, self._at, length)
        except FileNotFoundError as e:
            raise storage.StorageError(f"{self._url}: {type(e).__name__}: {e}") from None
        self._from, self._reads = self._at, 0
