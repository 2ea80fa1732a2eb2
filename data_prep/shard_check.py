"""One shard read back, byte by byte and pixel by pixel: the unit of work of `data_prep.verify`. Mends nothing."""

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

from data_prep.pixels import Pixels, digest
from eiwtrain import storage
from eiwtrain.data.manifest import (
    MANIFEST_NAME,
    DataError,
    Shard,
    Sidecar,
    read_sidecar,
    shard_name,
    sidecar_from_json,
    sidecar_name,
)

_HEADER = {  # what the header of every member has in common: nothing of the machine or the moment
    "mtime": 0,
    "uid": 0,
    "gid": 0,
    "mode": 0o644,
    "uname": "",
    "gname": "",
    "type": tarfile.REGTYPE,
    "linkname": "",
    "pax_headers": {},
}


@dataclass(frozen=True)
class ShardCheck:
    """All that a worker needs to check one shard: plain and picklable.

    Attributes:
        number: of the shard within its split.
        shard: as the manifest has it.
        plan, resolution, encoding: of the manifest.
        classes: how many there are.
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
    """What is wrong with one shard, a line each.

    Attributes:
        sidecar: without labels, offsets and sizes; None where it cannot be used.
    """

    check: ShardCheck
    problems: tuple[str, ...]
    sidecar: Sidecar | None


class Problems:
    """Lines about files, of which those of one kind about one file are told by the first."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[str]] = {}

    def add(self, file: str, problem: str, kind: str | None = None) -> None:
        self._found.setdefault((file, kind if kind is not None else problem), []).append(f"{file}: {problem}")

    def lines(self) -> list[str]:
        return [
            first if not others else f"{first} (and {len(others):,} more like it)"
            for first, *others in self._found.values()
        ]


def verify_shard(check: ShardCheck) -> ShardFound:
    """Check one shard with its sidecar. What cannot be read is a problem like others: nothing is raised."""
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
    """A stored image, decoded: uint8 (resolution, resolution, 3).

    Raises:
        ValueError: it is not just that; the message is one line that goes on from the image's name.
    """
    try:
        if encoding == "npy":
            pixels = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        else:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                mode, pixels = image.mode, np.asarray(image)
    except UnidentifiedImageError:
        raise ValueError("is no PNG") from None
    except Exception as e:  # both decoders raise whatever they stumble over
        raise ValueError(f"cannot be decoded ({type(e).__name__}: {' '.join(str(e).split())[:200]})") from None
    if encoding == "png" and mode != "RGB":
        raise ValueError(f"has mode {mode}, not RGB")
    if pixels.shape != (resolution, resolution, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"is {pixels.dtype} {pixels.shape}, not uint8 {(resolution, resolution, 3)}")
    return pixels


def _check_sidecar(check: ShardCheck, found: Problems) -> Sidecar | None:
    """The sidecar, where it can be used for more."""
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
    name, size = check.shard.name, path.stat().st_size
    if size != check.shard.bytes:
        found.add(name, f"has {size:,} bytes, in the manifest {check.shard.bytes:,}")
    elif storage.sha256_file(path) != check.shard.sha256:
        found.add(name, "has another SHA-256 than the manifest says")
    members = _walk(path, name, found)
    rows: dict[str, tuple[int, int, int, str]] = {}
    if sidecar is not None:
        _compare_names(check, sidecar, [m.name for m in members], found)
        columns = (sidecar.labels, sidecar.offsets, sidecar.sizes, sidecar.digests)
        rows = dict(zip(sidecar.keys, zip(*columns, strict=True), strict=True))
    with open(path, "rb") as tar:
        for member in members:
            for field, expected in _HEADER.items():
                if (value := getattr(member, field)) != expected:
                    found.add(name, f"{member.name} has {field} {value!r} in its header, not {expected!r}", field)
            key, _, kind = member.name.partition(".")
            tar.seek(member.offset_data)
            data = tar.read(min(member.size, size))
            if kind == check.encoding:
                _check_image(check, member, data, rows.get(key), found)
            elif kind == "json":
                _check_about(check, member, data, rows.get(key), found)
        _check_end(name, tar, members, found)


def _walk(path: Path, name: str, found: Problems) -> list[tarfile.TarInfo]:
    """The members as far as they can be followed."""
    members = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                members.append(member)
    except (tarfile.TarError, ValueError) as e:
        found.add(name, f"cannot be followed after {len(members)} members ({e})")
    return members


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


def _check_image(
    check: ShardCheck, member: tarfile.TarInfo, data: bytes, row: tuple[int, int, int, str] | None, found: Problems
) -> None:
    name = check.shard.name
    if row is not None and (member.offset_data, member.size) != row[1:3]:
        here = f"{member.size} bytes at {member.offset_data}"
        found.add(name, f"{member.name} has {here}, in the index {row[2]} at {row[1]}", "place")
    try:
        pixels = read_image(data, check.encoding, check.resolution)
    except ValueError as e:
        found.add(name, f"{member.name} {e}", "image")
        return
    if row is not None and digest(pixels) != row[3]:
        found.add(name, f"{member.name} has other pixels than those of the digest in the index", "digest")


def _check_about(
    check: ShardCheck, member: tarfile.TarInfo, data: bytes, row: tuple[int, int, int, str] | None, found: Problems
) -> None:
    name = check.shard.name
    about: Any
    try:
        about = json.loads(data)
    except ValueError:
        about = None
    label, source = (about.get("label"), about.get("source")) if isinstance(about, dict) else (None, None)
    if type(label) is not int or not isinstance(source, str) or not source:
        found.add(name, f"{member.name} does not tell a label and a source", "about")
        return
    if row is not None and label != row[0]:
        found.add(name, f"{member.name} has label {label}, in the index {row[0]}", "label")
    if not -1 <= label < check.classes:
        found.add(name, f"{member.name} has label {label}, but there are {check.classes} classes", "class")


def _check_end(name: str, tar: BinaryIO, members: list[tarfile.TarInfo], found: Problems) -> None:
    """After its last member a tar has zeros: at least two blocks, and until its size is a whole number of records."""
    end = 0
    if members:
        end = members[-1].offset_data + -(-members[-1].size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    tar.seek(end)
    rest = tar.read()
    if rest.strip(b"\0"):
        found.add(name, f"has bytes after its last member that are no member, from byte {end} on")
    elif len(rest) < 2 * tarfile.BLOCKSIZE or (end + len(rest)) % tarfile.RECORDSIZE:
        found.add(name, "does not end as a tar does: it is cut off")


@contextlib.contextmanager
def _local_file(url: str) -> Iterator[Path]:
    """The file itself, or for the time of the context a copy of it."""
    if storage.is_local(url):
        yield Path(url)
        return
    with tempfile.TemporaryDirectory(prefix="data-prep-") as folder:
        path = Path(folder, "shard.tar")
        storage.get_file(url, path)
        yield path
