"""Keep files of a remote data set on local disk, within a bound and shared by all processes of the node.

A file is checked when it arrives. What a disk does to it later is found by the reader, image by image, which has it
dropped and fetched again. Not for local data sets, which are read in place; only a note that their checksum was right
is kept here.
"""

from __future__ import annotations

import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eiwtrain import storage
from eiwtrain.data.manifest import DataError, Sidecar, read_sidecar, sidecar_from_json
from eiwtrain.data.shards import Shard, sidecar_name
from eiwtrain.storage.private import file_lock, private_folder

DEFAULT_CACHE_BYTES = 64 << 30
_KEPT = re.compile(r"[0-9a-f]{64}\.(tar|json)")
_HALF = re.compile(r"[0-9a-f]{64}\.(tar|json)\.[0-9a-f]{32}\.part|\..+\.[0-9a-f]{32}\.tmp")
_ABANDONED = 3600.0  # seconds after which a partial download counts as left by a killed process
_TRIES = 3  # of a sidecar that another process evicts, or that is damaged, before it is read

_log = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """Return the folder of `private_folder` for fetched shards."""
    return private_folder("eiwtrain-cache", "data.cache_dir")


class ShardCache:
    """Hold files by their checksum; remove the least recently used ones when a new one would exceed `limit` bytes.

    One shard is always kept, however small the limit. Shards that other processes are downloading can exceed the limit
    for that moment.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def path(self, shard: Shard) -> Path:
        """Return the local path of the shard, whether or not it is there."""
        return self.folder / f"{shard.sha256}.tar"

    def fetch(self, url: str, shard: Shard) -> Path:
        """Return the local path of a shard of the data set at `url`; download and verify it where it is not here yet.

        Raises:
            DataError: it is missing, or its size or checksum is not the manifest's.
            StorageError: storage cannot be reached.
        """
        return self._fetch(
            storage.join(url, shard.name), self.path(shard), shard.bytes, lambda part: check_shard(part, shard)
        )

    def has(self, shard: Shard) -> bool:
        """Return whether the shard is on this machine."""
        return _size(self.path(shard)) == shard.bytes

    def drop_damaged(self, shard: Shard) -> None:
        """Delete the local copy of a shard if its checksum is no longer the manifest's."""
        path = self.path(shard)
        with self._lock(f"fetch-{path.name[:3]}"), suppress(FileNotFoundError):
            try:
                check_shard(path, shard)
            except DataError as e:
                self._drop(path, str(e))

    def sidecar(self, url: str, shard: Shard) -> Sidecar:
        """Return the verified sidecar of a shard, cached like it if the data set is remote. Raises as `fetch`."""
        where = storage.join(url, sidecar_name(shard.name))
        if storage.is_local(url):
            return storage.read_twice(DataError, lambda: _sidecar_in_place(url, shard))
        path = self.folder / f"{shard.sidecar_sha256}.json"
        for _ in range(_TRIES):
            self._fetch(where, path, None, lambda part: _check_sidecar(part.read_bytes(), shard))
            with suppress(FileNotFoundError):  # another process may evict it in between
                text = path.read_bytes()
                try:
                    _check_sidecar(text, shard)
                    return sidecar_from_json(text, where)
                except DataError as e:
                    if storage.sha256_bytes(text) == shard.sidecar_sha256:
                        raise
                    self._drop(path, str(e))
        raise storage.StorageError(f"data.cache_dir {self.folder} does not keep {path.name} as it is written there")

    def _fetch(self, url: str, path: Path, size: int | None, check: Callable[[Path], None]) -> Path:
        """Bring the file of `size` bytes (None: not known) at `url` to `path` and check it; if it arrives damaged,
        fetch it once more."""
        began = time.monotonic()
        with self._lock(f"fetch-{path.name[:3]}"), storage.waited(time.monotonic() - began):
            for last in (False, True):
                if (there := _size(path)) is not None:
                    if size in (None, there):
                        break
                    self._drop(path, f"{there} bytes, and {size} arrived")
                with self._lock("evict"):
                    self._evict(size or 0)
                part = self.folder / f"{path.name}.{uuid.uuid4().hex}.part"
                try:
                    storage.get_file(url, part)
                    check(part)
                    part.replace(path)
                except FileNotFoundError:
                    folder, _, name = url.rpartition("/")
                    what = "shard" if name.endswith(".tar") else "sidecar"
                    raise DataError(f"{what} {name} is missing from {folder}") from None
                except DataError:
                    if last:
                        raise
                finally:
                    part.unlink(missing_ok=True)
            touch(path)
        return path

    def verify_local(self, path: Path, shard: Shard) -> None:
        """Check a shard that is read in place: its size every time, its checksum once a node and change of the file.

        Raises:
            DataError: it is missing, or its size or checksum is not the manifest's.
        """
        try:
            stat = path.stat()
        except OSError as e:
            raise DataError(f"shard {shard.name} is missing from {path.parent}: {e.strerror}") from None
        seen = self.folder / f"{shard.sha256}.ok"
        # the last two change with any replacement, whatever time it is given
        state = f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
        with suppress(OSError, UnicodeDecodeError):
            if stat.st_size == shard.bytes and seen.read_text() == state:
                return
        storage.read_twice(DataError, lambda: check_shard(path, shard))
        with suppress(OSError, storage.StorageError):  # without the note, other processes just check again
            storage.write_bytes(str(seen), state.encode())

    def forget(self, shard: Shard) -> None:
        """Have a shard that is read in place checked again at its next `verify_local`."""
        with suppress(OSError):
            (self.folder / f"{shard.sha256}.ok").unlink()

    def _drop(self, path: Path, why: str) -> None:
        """Delete a local copy that is not what arrived; it counts as a fault of storage."""
        path.unlink(missing_ok=True)
        storage.count_faults(1)
        _log.warning("data.cache_dir: %s is no longer what was fetched (%s); it is fetched again", path, why)

    def _evict(self, incoming: int) -> None:
        """Make room for `incoming` bytes. Partial downloads count; those that a killed process left are deleted."""
        files = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                stat = entry.stat()
                if _KEPT.fullmatch(entry.name):  # the folder may hold other files, which are somebody's
                    files.append((stat.st_mtime, stat.st_size, entry.path))
                elif _HALF.fullmatch(entry.name):
                    if time.time() - stat.st_mtime > _ABANDONED:
                        Path(entry.path).unlink(missing_ok=True)
                    else:
                        incoming += stat.st_size
        total = incoming + sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                return
            Path(path).unlink(missing_ok=True)  # processes that have it mapped keep reading
            total -= size

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with file_lock(self.folder / f"{name}.lock"):
                yield
        except OSError as e:
            raise storage.StorageError(f"data.cache_dir {self.folder} cannot be used: {e.strerror or e}") from None


def check_shard(path: Path, shard: Shard) -> None:
    """Compare a local file with the size and checksum of the shard in the manifest.

    Raises:
        DataError: they differ; the message names the shard and the difference.
    """
    size = path.stat().st_size
    if size != shard.bytes:
        raise DataError(f"shard {shard.name} is damaged or replaced: {size} bytes, the manifest says {shard.bytes}")
    found = storage.sha256_file(path)
    if found != shard.sha256:
        raise DataError(
            f"shard {shard.name} is damaged or replaced: sha256 is {found[:12]}..., "
            f"the manifest says {shard.sha256[:12]}..."
        )


def _check_sidecar(text: bytes, shard: Shard) -> None:
    if storage.sha256_bytes(text) != shard.sidecar_sha256:
        raise DataError(f"shard {shard.name}: its sidecar is not the one of the manifest, or damaged")


def _size(path: Path) -> int | None:
    """Return the size of a file in bytes; None if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _sidecar_in_place(url: str, shard: Shard) -> Sidecar:
    text = read_sidecar(url, shard.name)
    _check_sidecar(text, shard)
    return sidecar_from_json(text, storage.join(url, sidecar_name(shard.name)))


def touch(path: Path) -> None:
    """Mark a cached file as just used."""
    with suppress(FileNotFoundError):
        os.utime(path)
