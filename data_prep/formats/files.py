"""Lists the files of a source: in a folder, a tar or a zip, at any fsspec URL. Not for what they mean.

Archives are listed by their headers and read by offset, remote ones too: nothing is unpacked or copied.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from data_prep.formats.ranges import ByteRange, RangeReader, check_members
from data_prep.formats.tars import parts_of, tar_members
from data_prep.items import IMAGE_SUFFIXES
from eiwtrain import storage
from eiwtrain.data.manifest import DataError

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # the first is a member, the second the end of one without members
_LOCAL_HEADER = struct.Struct("<4s22x2H")  # signature, lengths of the name and of the extra field
_ALWAYS_UNPACKED = 1 << 30  # bytes that the images of a zip may have together
_MOST_TIMES = 100  # its size that those of a larger zip may have: drawings in formats without compression
_UTF8 = 1 << 11  # flag of a zip's member
_UNICODE_PATH = 0x7075  # extra field of a zip's member: its name in UTF-8
# Folders that systems keep for themselves, as those whose names begin with a dot.
_SYSTEM_FOLDERS = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found")
# Why a file is not among those asked for, whatever its name.
HIDDEN, LINK, LOST, SPECIAL = "hidden", "a link", "a link to a file that is not there", "not a regular file"
REPLACED = "a later file has its name"
_DEEPEST = 200  # folders in one another
_LINKS = 8  # rounds, each of which halves the length of a chain of links
# Bytes that are read beyond a member, whose local extra field can be longer than the directory says. The directory and
# its end record follow every member, so this many bytes are always there.
_SLACK = 64


class FoundFile(NamedTuple):
    """A file: the parts of its name below the top, its size in bytes, how to load it, and why it cannot be used.

    A hidden folder is one file, whose last part is empty.
    """

    parts: tuple[str, ...]
    size: int
    load: Callable[[], bytes]
    flaw: str = ""


@dataclass(frozen=True, slots=True)
class ZipImage:
    """An image in a zip at any URL: read by its offset, inflated if it is compressed, and checked.

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

    def name(self) -> str:
        """Return the zip's URL, as `ByteRange.name` does."""
        return self.url

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


def list_files(
    url: str, suffixes: Collection[str] = IMAGE_SUFFIXES, others: list[FoundFile] | None = None
) -> list[FoundFile]:
    """List the files under the folder, or inside the tar or zip, at `url`, sorted by name.

    Links are followed, except in zips. Files and folders whose names begin with a dot are left out. If an archive has
    several files of one name, the last one counts, as when it is unpacked.

    A backslash separates folders in a zip, and elsewhere if most names have one. A name in a zip that is not marked as
    UTF-8 is read as its Unicode field says, else as UTF-8 if it is that, else as code page 437, which the format names.

    Args:
        url: a path or any fsspec URL.
        suffixes: of the files to list, in lower case.
        others: filled with all other files there, hidden folders as a whole, sorted by name.

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
        return _chosen((_in_folder if storage.is_local(url) else _in_bucket)(url), ends, others)
    head = storage.read_range(url, 0, min(storage.size(url), tarfile.BLOCKSIZE))
    if head.startswith(_ZIP):
        return _chosen(_in_zip(url, ends), ends, others)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(f"source {url}: compressed by {name}; uncompress it: only then it can be read by offset")
    try:
        if head.count(b"\0") < tarfile.BLOCKSIZE:  # a tar of nothing is all zeros
            tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError:
        raise DataError(f"source {url}: a file, and neither an uncompressed tar nor a zip") from None
    return list_tar(ByteRange(url, 0, storage.size(url)), suffixes, others)


def list_tar(
    tar: ByteRange, suffixes: Collection[str] = IMAGE_SUFFIXES, others: list[FoundFile] | None = None
) -> list[FoundFile]:
    """List the files of a tar, as `list_files` does; it can lie inside another file, as in another tar.

    Loaders are `ByteRange`s within `tar`. Of a remote tar little more than the headers is read where its members are
    large; they come one after the other, so several tars are better listed side by side, in threads.
    """
    return _chosen(_in_tar(tar, tuple(suffixes)), tuple(suffixes), others)


def range_of(file: FoundFile) -> ByteRange:
    """Return where a file that was listed lies.

    Raises:
        DataError: it lies in a zip.
    """
    if isinstance(file.load, ByteRange):
        return replace(file.load, size=file.size)
    raise DataError(f"{'/'.join(file.parts)}: inside a zip it cannot be read in place; unpack the zip")


def _chosen(found: Iterable[FoundFile], ends: tuple[str, ...], others: list[FoundFile] | None) -> list[FoundFile]:
    """Sort files by name, return the wanted ones, and put the rest into `others`; of equal names keep the last."""
    files = list(found)
    if 2 * sum("\\" in file.parts[-1] for file in files) > len(files):  # unpacked from a zip of Windows, without care
        files = [file._replace(parts=parts_of("/".join(file.parts).replace("\\", "/"))) for file in files]
    last: dict[tuple[str, ...], FoundFile] = {}
    rest = []
    for file in files:
        if folder := _hidden(file.parts):
            file = FoundFile(folder, 0, file.load, HIDDEN)
        elif file.parts in last:
            rest.append(last[file.parts]._replace(flaw=REPLACED))
        last[file.parts] = file
    wanted: list[FoundFile] = []
    for file in last.values():
        (wanted if not file.flaw and _wanted(file.parts, ends) else rest).append(file)
    if others is not None:
        others.extend(sorted(rest, key=itemgetter(0)))
    return sorted(wanted, key=itemgetter(0))


def _hidden(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Return the hidden file, or the outermost hidden folder that it is in, with an empty last part; () if not."""
    for depth, part in enumerate(parts, 1):
        if part.startswith(".") or (depth < len(parts) and part.lower() in _SYSTEM_FOLDERS):
            return parts if depth == len(parts) else (*parts[:depth], "")
    return ()


def _wanted(parts: tuple[str, ...], ends: tuple[str, ...]) -> bool:
    return parts[-1].lower().endswith(ends) and not _hidden(parts)


def _in_folder(
    folder: str, parts: tuple[str, ...] = (), above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[FoundFile]:
    """Yield the files of a local folder and those below it; `above` are the folders above, where a link may lead."""
    if len(parts) > _DEEPEST:
        raise DataError(f"source {folder}: folders are more than {_DEEPEST} deep in one another")
    try:
        about = Path(folder).stat()
        here = (about.st_dev, about.st_ino)
        if here in above:
            return
        with os.scandir(folder) as listing:
            found = list(listing)
        for f in found:
            name = (*parts, f.name)
            if f.is_symlink() and not Path(f.path).exists():
                yield FoundFile(name, 0, ByteRange(f.path), LOST)
            elif f.is_dir():
                if _hidden((*name, "")):
                    yield FoundFile((*name, ""), 0, ByteRange(f.path), HIDDEN)
                else:
                    yield from _in_folder(f.path, name, above | {here})
            elif f.is_file():
                yield FoundFile(name, f.stat().st_size, ByteRange(f.path))
            else:
                yield FoundFile(name, 0, ByteRange(f.path), SPECIAL)
    except OSError as e:
        raise DataError(f"source {e.filename} cannot be read: {e.strerror}") from None


def _in_bucket(url: str) -> Iterator[FoundFile]:
    """Yield the files below a URL. Keys that differ by empty folders alone, such as `c/0.jpg` and `c//0.jpg`, are
    several files: all but the first keep slashes before their name."""
    same: Counter[tuple[str, ...]] = Counter()
    for name, size in sorted(storage.find(url), key=lambda found: len(found[0])):
        if not name.endswith("/"):  # a folder's own mark
            parts = parts_of(name)
            slashes = "/" * same[parts]
            same[parts] += 1
            yield FoundFile((*parts[:-1], slashes + parts[-1]), size, ByteRange(f"{url}/{name}"))


def _in_tar(tar: ByteRange, ends: tuple[str, ...]) -> Iterator[FoundFile]:
    links = {}
    for member in tar_members(tar):
        header = member.header
        if header.isreg():
            yield FoundFile(member.parts, header.size, member.data)
        elif (header.issym() or header.islnk()) and _wanted(member.parts, ends):
            folder = posixpath.dirname(header.name) if header.issym() else ""
            links[member.parts] = parts_of(posixpath.normpath(posixpath.join(folder, header.linkname)))
        elif not header.isdir():
            yield FoundFile(member.parts, 0, member.data, LINK if header.issym() or header.islnk() else SPECIAL)
    if not links:
        return
    for _ in range(_LINKS):
        links = {parts: links.get(target, target) for parts, target in links.items()}
    targets = set(links.values())
    found = {m.parts: m.data for m in tar_members(tar) if m.header.isreg() and m.parts in targets}
    for parts, target in links.items():
        data = found.get(target)
        yield FoundFile(parts, 0, tar.within(0, 0), LOST) if data is None else FoundFile(parts, data.size, data)


def _in_zip(url: str, ends: tuple[str, ...]) -> Iterator[FoundFile]:
    try:
        end = storage.size(url)
        whole = ByteRange(url, 0, end)
        with zipfile.ZipFile(RangeReader(whole)) as archive:
            members = archive.infolist()
        check_members(whole, members, times=_MOST_TIMES, always=_ALWAYS_UNPACKED)
    except DataError:
        raise
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as e:
        raise DataError(f"source {url}: a broken zip: {e}") from None
    for m in members:
        name, encoded = _zip_name(m)
        if name.endswith(("/", "\\")):
            continue
        parts = parts_of(name.replace("\\", "/"))  # the format allows no backslashes, but some programs write them
        flaw = ""
        if m.flag_bits & 1 or m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            flaw = "encrypted" if m.flag_bits & 1 else "compressed by a method other than deflate"
            if _wanted(parts, ends):
                raise DataError(f"source {url}: '{name}' is {flaw}; unzip it and give the folder")
        ahead = _LOCAL_HEADER.size + encoded + len(m.extra)
        if not 0 <= m.header_offset <= end - ahead - m.compress_size - _SLACK:
            raise DataError(f"source {url}: a broken zip: '{name}' is said to lie outside it")
        deflated = m.compress_type == zipfile.ZIP_DEFLATED
        load = ZipImage(url, m.header_offset, ahead, m.compress_size, m.file_size, m.CRC, deflated)
        yield FoundFile(parts, m.file_size, load, flaw)


def _zip_name(member: zipfile.ZipInfo) -> tuple[str, int]:
    """Return the name of a zip's member, and its length in bytes there."""
    utf8 = bool(member.flag_bits & _UTF8)
    encoded = member.orig_filename.encode("utf-8" if utf8 else "cp437")
    name = member.orig_filename
    if not utf8:
        with contextlib.suppress(UnicodeDecodeError):
            name = (_unicode_path(member.extra, encoded) or encoded).decode()
    return name.partition("\0")[0], len(encoded)


def _unicode_path(extra: bytes, encoded: bytes) -> bytes:
    """Return the name in UTF-8 that a member's extra field holds; b"" if there is none, or it is of another name."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH and field[1:5] == struct.pack("<I", zlib.crc32(encoded)):
            return field[5:]
    return b""
