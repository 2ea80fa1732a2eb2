"""Finds where the values of an LMDB data file lie by reading its B-tree page by page, from any fsspec URL.

Not for writing, nor for anything but the one plain table of keys and values that LSUN's files hold. Why not liblmdb: it
maps the file, which therefore has to be local, and dies (SIGBUS) if the file is cut off; and its Python binding reads
every value to find its size, which is all of the file. The layout is that of LMDB 0.9 on 64-bit little-endian machines:
`MDB_page`, `MDB_node` and `MDB_meta` of its mdb.c, data version 1.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from data_prep.formats.ranges import ByteRange
from eiwtrain import storage
from eiwtrain.data.manifest import DataError

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_HEADER = struct.Struct("<QHHHH")  # page number, padding, flags, end of the node offsets, start of the nodes
_TABLE = "IHHQQQQQ"  # page size, flags, depth, branch pages, leaf pages, overflow pages, entries, root
_META = struct.Struct("<IIQQ" + 2 * _TABLE + "QQ")  # magic, version, address, size, free list, table, last page, number
_NODE = struct.Struct("<HHHH")  # low and high half of a value's size or a page number, flags, bytes of the key
_NUMBER = struct.Struct("<Q")
_BRANCH, _LEAF = 0x01, 0x02  # of a page
_TYPES = 0x2F  # bits of a page's flags that say what it is
_BIG = 0x01  # of a node: the number of the page where the value begins stands in place of the value
_MOST_LEVELS = 32  # of a tree, LMDB's own limit
_READING = 32  # pages read side by side: on a network nearly all of the time is waiting
_BATCH = 4096  # pages held at once


@dataclass(frozen=True)
class Values:
    """Places of the values of a table, in the order of their keys, in columns: 20 bytes each and the key's own.

    Attributes:
        keys: all of them end to end.
        ends: where each key ends in `keys`.
        starts: first byte of each value in the file that holds the data file.
        sizes: of the values, in bytes.
    """

    keys: bytearray = field(default_factory=bytearray)
    ends: array[int] = field(default_factory=lambda: array("Q"))
    starts: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("I"))

    def __len__(self) -> int:
        return len(self.sizes)

    def key(self, row: int) -> bytes:
        """Return the key of a row, counted from 0."""
        return bytes(self.keys[self.ends[row - 1] if row else 0 : self.ends[row]])


def list_values(file: ByteRange) -> Values:
    """List all values of the table in an LMDB data file, without reading any of them.

    Raises:
        DataError: it is not such a file, holds more than a plain table, is cut off or damaged.
        StorageError: it cannot be read.
    """
    table = _table(file)
    values = Values()
    if table.entries == 0:
        return values
    if table.depth > _MOST_LEVELS:
        raise _damaged(file, f"a tree of {table.depth:,} levels")
    numbers = [table.root]
    seen = {table.root}
    for _ in range(table.depth - 1):
        below: list[int] = []
        for page in _pages(file, table, numbers, _BRANCH):
            for number in page.children():
                if number in seen:
                    raise _damaged(file, f"page {number:,} is in its tree twice")
                seen.add(number)
                below.append(number)
        numbers = below
    taken = 0
    for page in _pages(file, table, numbers, _LEAF):
        taken += page.append_to(values)
        if taken > file.size or len(values) > table.entries:
            raise _damaged(file, "its values overlap, or are more than it says")
    if len(values) != table.entries:
        raise _damaged(file, f"{len(values):,} entries, not {table.entries:,} as it says")
    return values


class _Table(NamedTuple):
    page_size: int
    depth: int
    pages: int
    entries: int
    root: int


def _table(file: ByteRange) -> _Table:
    """Return the table as the last transaction left it: of two meta pages the newer one counts."""
    first = _meta(file, 0)
    page_size = first[4]
    if page_size not in {1 << n for n in range(9, 17)}:
        raise _damaged(file, f"pages of {page_size} bytes")
    second = _meta(file, page_size)
    newer = max(first, second, key=lambda meta: int(meta[-1]))
    _, _, depth, branches, leaves, _, entries, root = newer[12:20]
    return _Table(page_size, depth, branches + leaves, entries, root)


def _meta(file: ByteRange, start: int) -> tuple[int, ...]:
    if file.size < start + _HEADER.size + _META.size:
        raise DataError(f"{file.name()}: {file.size:,} bytes are too few for the data file of an LMDB")
    meta = _META.unpack(storage.read_range(file.url(), file.offset + start + _HEADER.size, _META.size))
    if meta[0] != _MAGIC:
        raise DataError(f"{file.name()}: not the data file of an LMDB of a 64-bit little-endian machine")
    if meta[1] != _VERSION:
        raise DataError(f"{file.name()}: an LMDB of data version {meta[1]}; this reads {_VERSION}, that of LMDB 0.9")
    return meta


class _Page(NamedTuple):
    """A branch or leaf page, its number known to be right."""

    file: ByteRange
    number: int
    data: bytes
    nodes: int

    def children(self) -> list[int]:
        """Return the numbers of the pages below a branch page, in the order of the keys."""
        return [low | high << 16 | top << 32 for _, low, high, top, _ in self._nodes()]

    def append_to(self, values: Values) -> int:
        """Add the keys and places of a leaf page's values; return the bytes of these values."""
        page_size, taken = len(self.data), 0
        for at, low, high, flags, key_size in self._nodes():
            end, size = at + _NODE.size + key_size, low | high << 16
            if flags == _BIG and end + _NUMBER.size <= page_size:
                start = _NUMBER.unpack_from(self.data, end)[0] * page_size + _HEADER.size
            elif flags == 0 and end + size <= page_size:
                start = self.number * page_size + end
            elif flags & ~_BIG:
                raise DataError(f"{self.file.name()}: an LMDB of more than single values with their keys; not LSUN's")
            else:
                raise _damaged(self.file, f"page {self.number:,}")
            if start + size > self.file.size:
                raise _cut_off(self.file)
            values.keys.extend(self.data[at + _NODE.size : end])
            values.ends.append(len(values.keys))
            values.starts.append(self.file.offset + start)
            values.sizes.append(size)
            taken += size
        return taken

    def _nodes(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield the offset and the fields of each node; they lie in the page side by side, so that none is longer."""
        room = len(self.data)
        try:
            for at in struct.unpack_from(f"<{self.nodes}H", self.data, _HEADER.size):
                node = _NODE.unpack_from(self.data, at)
                room -= _NODE.size + node[3]
                if room < 0:
                    raise _damaged(self.file, f"page {self.number:,}: its nodes overlap")
                yield at, *node
        except struct.error:
            raise _damaged(self.file, f"page {self.number:,}") from None


def _pages(file: ByteRange, table: _Table, numbers: Sequence[int], kind: int) -> Iterator[_Page]:
    """Read the pages of these numbers, in order."""
    size = table.page_size
    if (max(numbers, default=0) + 1) * size > file.size:
        raise _cut_off(file)

    def read(number: int) -> bytes:
        return storage.read_range(file.url(), file.offset + number * size, size)

    pool = ThreadPoolExecutor(_READING)
    try:
        for first in range(0, len(numbers), _BATCH):
            batch = numbers[first : first + _BATCH]
            for number, data in zip(batch, pool.map(read, batch), strict=True):
                said, _, flags, lower, _ = _HEADER.unpack_from(data)
                if said != number or flags & _TYPES != kind:
                    raise _damaged(file, f"page {number:,}")
                yield _Page(file, number, data, (lower - _HEADER.size) // 2)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a stop does not wait for storage


def _damaged(file: ByteRange, what: str) -> DataError:
    return DataError(f"{file.name()}: a damaged LMDB ({what}); fetch it again")


def _cut_off(file: ByteRange) -> DataError:
    return DataError(f"{file.name()}: the LMDB is cut off: it continues beyond its {file.size:,} bytes; fetch it again")
