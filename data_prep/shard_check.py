"""Check one shard byte by byte and pixel by pixel: the unit of work of `data_prep.verify`. Not for repairing it."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_prep.decode import Pixels
from data_prep.pixels import digest
from eiwtrain import storage
from eiwtrain.data.manifest import MANIFEST_NAME, DataError, Sidecar, read_sidecar, sidecar_from_json
from eiwtrain.data.shards import Shard, shard_name, sidecar_name
from eiwtrain.terminal.lines import one_line, printable

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x5d\0\0\x80", b"\x28\xb5\x2f\xfd")
_HEADER = {  # fields that are equal in every header: nothing depends on the machine or the moment
    "mtime": 0,
    "uid": 0,
    "gid": 0,
    "mode": 0o644,
    "uname": "",
    "gname": "",
    "type": tarfile.REGTYPE,
    "linkname": "",
}

Row = tuple[int, int, int, str]  # of the index: label, offset, size, digest


@dataclass(frozen=True)
class ShardCheck:
    """All that a worker needs to check one shard: plain data that can be pickled.

    Attributes:
        number: of the shard within its split.
        shard: from the manifest.
        plan, resolution, encoding: from the manifest.
        classes: number of classes.
    """

    url: str
    split: str
    number: int
    shard: Shard
    plan: str
    resolution: int
    encoding: str
    classes: int


@dataclass(frozen=True)
class ShardFound:
    """The problems of one shard, a line each.

    Attributes:
        sidecar: without labels, offsets and sizes; None where it cannot be used.
    """

    check: ShardCheck
    problems: tuple[str, ...]
    sidecar: Sidecar | None


class Problems:
    """Lines about files. Lines of one kind about one file are shortened to the first and a count."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[str]] = {}

    def add(self, file: str, problem: str, kind: str | None = None) -> None:
        self._found.setdefault((file, kind if kind is not None else problem), []).append(
            printable(f"{file}: {problem}")
        )

    def lines(self) -> list[str]:
        return [
            first if not others else f"{first} (and {len(others):,} more like it)"
            for first, *others in self._found.values()
        ]


def verify_shard(check: ShardCheck) -> ShardFound:
    """Check one shard with its sidecar. A file that cannot be read is a problem like others: nothing is raised."""
    found = Problems()
    expected = shard_name(check.split, check.number)
    if check.shard.name != expected:
        found.add(MANIFEST_NAME, f"shard {check.number} of split '{check.split}' is {check.shard.name}, not {expected}")
    sidecar = _check_sidecar(check, found)
    try:
        with _local_file(storage.join(check.url, check.shard.name)) as path:
            _check_tar(check, path, sidecar, found)
    except FileNotFoundError:
        found.add(check.shard.name, "is not there")
    except (OSError, storage.StorageError) as e:
        found.add(check.shard.name, f"cannot be read ({e})")
    kept = replace(sidecar, labels=(), offsets=(), sizes=()) if sidecar is not None else None
    return ShardFound(check, tuple(found.lines()), kept)


def read_image(data: bytes, encoding: str, resolution: int) -> Pixels:
    """Decode a stored image to uint8 (resolution, resolution, 3).

    Raises:
        ValueError: the image is anything else; the message is one line, to be read after the image's name.
    """
    try:
        if encoding == "npy":
            pixels = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        else:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                mode, size = image.mode, image.size
                fits = size == (resolution, resolution)
                pixels = np.asarray(image) if fits else np.empty((0, 0, 3), np.uint8)  # not decoded: it may be huge
    except UnidentifiedImageError:
        raise ValueError("is no PNG") from None
    except Exception as e:  # both decoders raise errors of many types
        raise ValueError(f"cannot be decoded ({type(e).__name__}: {one_line(e)})") from None
    if encoding == "png" and not fits:
        raise ValueError(f"is {size[0]}x{size[1]} pixels, not {resolution}x{resolution}")
    if encoding == "png" and mode != "RGB":
        raise ValueError(f"has mode {mode}, not RGB")
    if pixels.shape != (resolution, resolution, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"is {pixels.dtype} {pixels.shape}, not uint8 {(resolution, resolution, 3)}")
    return pixels


def _check_sidecar(check: ShardCheck, found: Problems) -> Sidecar | None:
    """Return the sidecar, or None where it is too damaged for further checks."""
    name = sidecar_name(check.shard.name)
    try:
        text = read_sidecar(check.url, check.shard.name)
    except DataError:
        found.add(name, "is not there")
        return None
    except storage.StorageError as e:
        found.add(name, f"cannot be read ({e})")
        return None
    if storage.sha256_bytes(text) != check.shard.sidecar_sha256:
        found.add(name, "has another SHA-256 than the manifest says")
    try:
        sidecar = sidecar_from_json(text, name)
    except DataError as e:
        found.add(name, str(e).removeprefix(f"{name}: "))
        return None
    for field in ("name", "samples", "bytes", "sha256"):
        here, there = getattr(sidecar.shard, field), getattr(check.shard, field)
        if here != there:
            found.add(name, f"{field} is {here}, in the manifest {there}")
    if sidecar.plan != check.plan:
        found.add(name, "is of another plan than the manifest")
    return sidecar


def _check_tar(check: ShardCheck, path: Path, sidecar: Sidecar | None, found: Problems) -> None:
    """Compare the tar with the manifest and the sidecar: its bytes, the files that webdataset reads, their headers."""
    name, size = check.shard.name, path.stat().st_size
    if size != check.shard.bytes:
        found.add(name, f"has {size:,} bytes, in the manifest {check.shard.bytes:,}")
    elif storage.sha256_file(path) != check.shard.sha256:
        found.add(name, "has another SHA-256 than the manifest says")
    rows: dict[str, Row] = {}
    if sidecar is not None:
        columns = (sidecar.labels, sidecar.offsets, sidecar.sizes, sidecar.digests)
        rows = dict(zip(sidecar.keys, zip(*columns, strict=True), strict=True))
    names, end = [], 0
    with open(path, "rb") as tar:
        if tar.read(8).startswith(_COMPRESSED):  # webdataset would unpack it, however large that is
            found.add(name, "is compressed, and no plain tar")
            return
        for member, data in _read_files(path, name, found):
            names.append(member)
            if not _check_header(name, tar, end, member, found):
                return
            key, _, kind = member.partition(".")
            if kind == check.encoding:
                _check_image(check, member, end + tarfile.BLOCKSIZE, data, rows.get(key), found)
            elif kind == "json":
                _check_about(check, member, data, rows.get(key), found)
            end += tarfile.BLOCKSIZE + -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if sidecar is not None:
            _compare_names(check, sidecar, names, found)
        _check_end(name, tar, end, found)


def _read_files(path: Path, name: str, found: Problems) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of each file in the tar as the webdataset library reads them, as far as it can.

    webdataset shares no code with the writer and the trainer, so a tar that only they understand is found here.
    """
    from webdataset.tariterators import tar_file_iterator  # imports torch, which takes seconds

    count = 0
    with open(path, "rb") as tar:
        try:
            for file in tar_file_iterator(tar):
                yield file["fname"], file["data"]
                count += 1
        except (tarfile.TarError, ValueError, RecursionError) as e:
            cause = str(e).partition(" @ ")[0]  # webdataset appends the file object
            found.add(name, f"cannot be followed after {count} members ({cause})")


def _check_header(name: str, tar: BinaryIO, start: int, member: str, found: Problems) -> bool:
    """Check the header at byte `start`; return False where it is not that of `member`, which moves all that follows."""
    tar.seek(start)
    try:
        header = tarfile.TarInfo.frombuf(tar.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except tarfile.TarError:
        header = tarfile.TarInfo()
    if header.name != member:
        found.add(name, f"has no plain header of {member} at byte {start}")
        return False
    for field, expected in _HEADER.items():
        if (value := getattr(header, field)) != expected:
            found.add(name, f"{member} has {field} {value!r} in its header, not {expected!r}", field)
    return True


def _compare_names(check: ShardCheck, sidecar: Sidecar, names: list[str], found: Problems) -> None:
    expected = [f"{key}.{kind}" for key in sidecar.keys for kind in (check.encoding, "json")]
    missing, surplus = Counter(expected) - Counter(names), Counter(names) - Counter(expected)
    for name in missing:
        found.add(check.shard.name, f"{name} is in the index and not in the tar", "missing")
    for name in surplus:
        found.add(check.shard.name, f"{name} is in the tar more often than in the index", "surplus")
    if names != expected and not missing and not surplus:
        here, there = next((n, e) for n, e in zip(names, expected, strict=True) if n != e)
        found.add(check.shard.name, f"members are in another order than in the index: {here} where {there} should be")


def _check_image(check: ShardCheck, member: str, start: int, data: bytes, row: Row | None, found: Problems) -> None:
    name = check.shard.name
    if row is not None and (start, len(data)) != row[1:3]:
        found.add(name, f"{member} has {len(data)} bytes at {start}, in the index {row[2]} at {row[1]}", "place")
    try:
        pixels = read_image(data, check.encoding, check.resolution)
    except ValueError as e:
        found.add(name, f"{member} {e}", "image")
        return
    if row is not None and digest(pixels) != row[3]:
        found.add(name, f"{member} has other pixels than those of the digest in the index", "digest")


def _check_about(check: ShardCheck, member: str, data: bytes, row: Row | None, found: Problems) -> None:
    name = check.shard.name
    about: Any
    try:
        about = json.loads(data)
    except (ValueError, RecursionError):
        about = None
    label, source = (about.get("label"), about.get("source")) if isinstance(about, dict) else (None, None)
    if type(label) is not int or not isinstance(source, str) or not source:
        found.add(name, f"{member} has no label and source", "about")
        return
    if row is not None and label != row[0]:
        found.add(name, f"{member} has label {label}, in the index {row[0]}", "label")
    if not -1 <= label < check.classes:
        found.add(name, f"{member} has label {label}, but there are {check.classes} classes", "class")


def _check_end(name: str, tar: BinaryIO, end: int, found: Problems) -> None:
    """Check what follows the last member: zeros, at least two blocks, up to a whole number of records."""
    tar.seek(end)
    rest = tar.read()
    if rest.strip(b"\0"):
        found.add(name, f"has bytes after its last member that are no member, from byte {end} on")
    elif len(rest) < 2 * tarfile.BLOCKSIZE or (end + len(rest)) % tarfile.RECORDSIZE:
        found.add(name, "does not end as a tar does: it is cut off")


@contextlib.contextmanager
def _local_file(url: str) -> Iterator[Path]:
    """Give the local file itself, or a copy of a remote one for the time of the context."""
    if storage.is_local(url):
        yield Path(url)
        return
    with tempfile.TemporaryDirectory(prefix="data-prep-") as folder:
        path = Path(folder, "shard.tar")
        storage.get_file(url, path)
        yield path
