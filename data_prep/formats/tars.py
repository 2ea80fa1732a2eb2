"""Lists the members of a tar by its headers, at any URL, and whether the tar is whole. Not for what members mean."""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from data_prep.formats.ranges import ByteRange, RangeReader
from eiwtrain.data.manifest import DataError
from eiwtrain.terminal.lines import one_line

_NOWHERE = ("", ".", "..")
_BLOCK = tarfile.BLOCKSIZE
_END = 2  # blocks of zeros that end a tar
_AFTER_END = 1 << 16  # bytes behind the end of a tar that are looked at: they have to be zero
# A tar is filled with zeros up to a whole number of records, of so many blocks: 20 with nearly every program, else a
# power of two. More zeros stand where data should be, as in a download that was given its size and then broke off.
_RECORDS = (20, *(1 << n for n in range(13)))


class TarMember(NamedTuple):
    """A member of a tar: the parts of its name, its header, where its data lie, and a way to read them while the tar
    is listed, before the next member is taken, from what was read ahead.
    """

    parts: tuple[str, ...]
    header: tarfile.TarInfo
    data: ByteRange
    read: Callable[[], bytes]


def parts_of(name: str) -> tuple[str, ...]:
    """Split a name in an archive or a bucket; folders, which many names share, are kept once in memory."""
    *folders, last = [p for p in name.split("/") if p not in _NOWHERE] or [""]
    return (*map(sys.intern, folders), last)


def tar_members(tar: ByteRange) -> Iterator[TarMember]:
    """Yield the members of a tar in its own order.

    Raises:
        DataError: it is broken or cut off, or holds a sparse file. What is wrong with its end is found behind the last
            member.
        StorageError: it cannot be reached.
    """
    reader = RangeReader(tar)
    end = -1
    try:
        with tarfile.open(fileobj=reader, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
            # an empty tar is not asked for a second member: Python 3.10 would look before its beginning
            while (archive.firstmember or archive.offset) and (member := archive.next()):  # type: ignore[attr-defined]
                archive.members.clear()  # type: ignore[attr-defined]  # or it keeps them all
                if member.size < 0 or archive.offset <= end:  # it would be listed again and again
                    raise tarfile.ReadError("a member of negative size")
                if member.issparse():
                    raise DataError(
                        f"source {tar.url()}: '{member.name}' is packed as a sparse file; pack it without --sparse"
                    )
                end = archive.offset
                data = tar.within(member.offset_data, member.size)
                yield TarMember(parts_of(member.name), member, data, partial(_read_member, reader, member))
            end = archive.offset
    except DataError:
        raise
    except (tarfile.TarError, ValueError, RecursionError) as e:  # the last for headers of headers of headers
        raise DataError(f"source {tar.url()}: a broken tar: {one_line(e)}") from None
    if problem := _wrong_with_end(reader, tar.size, end):
        raise DataError(f"source {tar.url()}: {problem} (byte {tar.offset + end:,})")


def _read_member(reader: RangeReader, member: tarfile.TarInfo) -> bytes:
    reader.seek(member.offset_data)
    return reader.read(member.size)


def _wrong_with_end(reader: RangeReader, size: int, end: int) -> str:
    """Say what is wrong with that which follows the last member of a tar; "" if it is whole."""
    reader.seek(end)
    if reader.read(_AFTER_END).strip(b"\0"):
        return "a broken tar, or several put together: what follows its last member is not its end"
    blocks = (size - end) // _BLOCK
    if blocks < _END:
        return "a tar that is cut off: behind its last member is no mark of its end; fetch it again"
    if blocks > _END and not any(blocks <= _END - 1 + n and size % (n * _BLOCK) == 0 for n in _RECORDS):
        return f"a tar that ends with {size - end:,} zeros, too many: did a download break off? Fetch it again"
    return ""
