"""Bytes at any fsspec URL: read, publish atomically, retry what is transient, checksum.

Not for formats: `eiwtrain.data.manifest` and `eiwtrain.checkpoints` know what the bytes mean. URLs: see `urls`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from eiwtrain.storage.removal import delete
from eiwtrain.storage.retry import StorageError, retrying
from eiwtrain.storage.urls import absolute, filesystem, is_local, is_s3, join
from eiwtrain.terminal.lines import one_line

_LARGE = 100 << 20  # bytes from which s3fs uploads in parts
_TEMP_NAME = 200  # bytes of a name that its temporary file repeats: a file system takes 255 in all
_PART_TRIES = 5  # tries of each such part by the client: one that fails must not cost the others


def exists(url: str) -> bool:
    """Return whether a file or folder is at `url`."""
    fs, path = filesystem(url)
    if is_local(url):
        return bool(fs.exists(path))
    try:
        retrying(url, lambda: fs.info(path))
    except FileNotFoundError:
        return False
    return True


def listdir(url: str) -> list[str]:
    """Return the names directly under `url`, sorted; empty where there is nothing."""
    fs, path = filesystem(url)
    try:
        entries = retrying(url, lambda: fs.ls(path, detail=False))
    except FileNotFoundError:
        return []
    return sorted({e.rstrip("/").rsplit("/", 1)[-1] for e in entries if e.rstrip("/") != path.rstrip("/")})


def size(url: str) -> int:
    """Return the size in bytes of the file at `url`.

    Raises:
        FileNotFoundError: nothing is there.
    """
    fs, path = filesystem(url)
    return int(retrying(url, lambda: fs.size(path)))


def read_bytes(url: str, most: int | None = None) -> bytes:
    """Return the whole file at `url`.

    Args:
        most: bytes that it may have, for a file that somebody else may have written; None: any number.

    Raises:
        FileNotFoundError: nothing is there.
        StorageError: it cannot be read, has more bytes, or is no file but a pipe or a device.
    """
    if is_local(url):
        return retrying(url, lambda: _read(absolute(url), most))
    fs, path = filesystem(url)

    def read() -> bytes:
        size = fs.size(path)
        if most is not None and size > most:
            raise StorageError(f"{url}: it has {size:,} bytes, and such a file has at most {most:,}")
        data: bytes = fs.cat_file(path)
        _check_length(len(data), size)
        return data

    return retrying(url, read)


def read_range(url: str, start: int, length: int) -> bytes:
    """Return exactly `length` bytes of the file at `url`, from byte `start` on.

    Raises:
        FileNotFoundError: nothing is there.
        StorageError: it cannot be read, or ends before `start + length`.
    """
    if length == 0:  # an HTTP range cannot be empty
        return b""
    fs, path = filesystem(url)

    def read() -> bytes:
        data: bytes
        if is_local(url):
            with open(path, "rb") as f:
                f.seek(start)
                data = f.read(length)
        else:
            data = fs.cat_file(path, start=start, end=start + length)
        if len(data) != length and (size := fs.size(path)) < start + length:
            raise StorageError(f"{url}: it has {size} bytes, and bytes {start} to {start + length - 1} were asked for")
        _check_length(len(data), length)
        return data

    return retrying(url, read)


def find(url: str) -> list[tuple[str, int]]:
    """Return (path relative to `url`, bytes) of every file in the folder `url` and those below it, sorted by path;
    empty where there is nothing. Links are followed; dangling links are left out.

    Raises:
        StorageError: a folder cannot be read.
    """
    fs, path = filesystem(url)
    if is_local(url):
        return sorted(_walk(Path(path)))
    try:
        found = retrying(url, lambda: fs.find(path, detail=True))
    except FileNotFoundError:
        return []
    top = path.rstrip("/") + "/"
    # a name that ends in a slash is a store's placeholder for a folder
    return sorted((n.removeprefix(top), int(f["size"])) for n, f in found.items() if n.startswith(top) and n[-1] != "/")


def write_bytes(url: str, data: bytes) -> None:
    """Publish `data` at `url`: a reader sees the old bytes, or none, or all of the new ones, never a part."""
    fs, path = filesystem(url, _PART_TRIES if len(data) >= _LARGE else 1)
    if is_local(url):
        _replace(Path(path), lambda temp: temp.write_bytes(data))
    else:  # a put to an object store is atomic
        _put(url, lambda: fs.pipe_file(path, data))


def write_pieces(url: str, pieces: Callable[[], Iterable[bytes | memoryview]]) -> None:
    """Publish bytes as `write_bytes` does, one piece after another; `pieces` is called again at each try.

    On a local file system and on S3 the pieces are never all copied into one.
    """
    if is_local(url):
        _replace(Path(absolute(url)), lambda temp: _write(temp, pieces()))
        return

    def put() -> None:
        data = _Joined(list(pieces()))
        in_parts = len(data) >= _LARGE
        fs, path = filesystem(url, _PART_TRIES if in_parts else 1)
        fs.pipe_file(path, data if in_parts and is_s3(url) else data[:])

    _put(url, put)


def put_file(local: str | os.PathLike[str], url: str) -> None:
    """Publish the local file at `url`, atomically as `write_bytes` does."""
    fs, path = filesystem(url, _PART_TRIES if Path(local).stat().st_size >= _LARGE else 1)
    if is_local(url):
        _replace(Path(path), lambda temp: shutil.copyfile(local, temp))
    else:
        _put(url, lambda: fs.put_file(str(local), path))


def get_file(url: str, local: str | os.PathLike[str]) -> None:
    """Copy the file at `url` to the local path, which appears whole or not at all.

    Raises:
        FileNotFoundError: nothing is at `url`.
        StorageError: it cannot be read.
    """
    fs, path = filesystem(url)

    def get(temp: Path) -> None:
        size = fs.size(path)
        fs.get_file(path, str(temp))
        _check_length(temp.stat().st_size, size)

    _replace(Path(local), lambda temp: retrying(url, lambda: get(temp)))


def check_writable(url: str) -> None:
    """Write, read back and delete a small file under `url`; a local folder that was not there is deleted again.

    Raises:
        StorageError: one of the three failed, with the cause in one line.
    """
    folder = Path(filesystem(url)[1])
    try:
        made = [p for p in (folder, *folder.parents) if is_local(url) and not p.exists()]
    except (OSError, ValueError) as e:  # a name that is too long, or that no file can have
        raise StorageError(f"{url}: {type(e).__name__}: {e}") from None
    probe = join(url, f".probe-{uuid.uuid4().hex}")
    try:
        write_bytes(probe, b"eiwtrain")
        if read_bytes(probe) != b"eiwtrain":
            raise StorageError(f"{url}: what was written could not be read back")
        delete(probe)
    except StorageError as e:
        failure = StorageError(str(e).replace(probe, url))
        failure.passing = e.passing
        raise failure from None
    with contextlib.suppress(OSError):  # another process may have put a file there meanwhile
        for path in made:
            path.rmdir()


def check_file_writable(url: str) -> None:
    """Check as `check_writable` does that a file can be written at `url`, where no folder may be.

    Raises:
        StorageError: it cannot be written.
    """
    if not is_local(url):
        scheme, _, path = url.partition("://")
        check_writable(f"{scheme}://{path.rpartition('/')[0]}")
        return
    file = Path(absolute(url))
    try:
        if file.is_dir():
            raise StorageError(f"{url}: this is a folder; give the name of a file")
    except (OSError, ValueError) as e:  # the name is too long, or none that a file can have
        raise StorageError(f"{url}: {type(e).__name__}: {e}") from None
    check_writable(str(file.parent))


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a local file in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def without_nan(content: Any) -> Any:
    """Return JSON data with null where a number is not finite, for which JSON has no word."""
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


class _Joined:
    """Pieces that look like one, for a client that asks for the length and for slices."""

    def __init__(self, pieces: list[bytes | memoryview]) -> None:
        self._pieces = pieces

    def __len__(self) -> int:
        return sum(len(p) for p in self._pieces)

    def __getitem__(self, where: slice) -> bytes:
        start, stop, _ = where.indices(len(self))
        cut, begin = [], 0
        for piece in self._pieces:
            cut.append(piece[max(0, start - begin) : max(0, stop - begin)])
            begin += len(piece)
        return b"".join(cut)


def _read(path: str, most: int | None) -> bytes:
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as f:  # a pipe would block
        about = os.fstat(f.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise StorageError(f"{path}: this is no regular file")
        if most is not None and about.st_size > most:
            raise StorageError(f"{path}: it has {about.st_size:,} bytes, and such a file has at most {most:,}")
        return f.read()


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    with open(path, "wb") as f:
        f.writelines(pieces)


def _check_length(came: int, expected: int) -> None:
    if came != expected:
        raise ConnectionError(f"{came} bytes came where there should be {expected}")


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    def fail(e: OSError) -> None:
        if not isinstance(e, (FileNotFoundError, NotADirectoryError)):
            raise StorageError(f"{e.filename}: {type(e).__name__}: {e.strerror}") from e

    for folder, _, names in os.walk(root, onerror=fail, followlinks=True):
        for name in names:
            file = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):
                about = file.stat()
                if stat.S_ISREG(about.st_mode):
                    yield file.relative_to(root).as_posix(), about.st_size


def _put(url: str, call: Callable[[], Any]) -> None:
    try:
        retrying(url, call)
    except FileNotFoundError as e:  # the bucket does not exist, and the store does not say so
        raise StorageError(f"{url}: {one_line(e, limit=None)}") from e


def _replace(target: Path, write: Callable[[Path], Any]) -> None:
    """Write a sibling temporary file, flush it to disk and rename it onto `target`."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as e:  # ValueError: a zero byte
        raise StorageError(f"{target}: {type(e).__name__}: {e}") from e
    name = os.fsdecode(os.fsencode(target.name)[:_TEMP_NAME])
    temp = target.with_name(f".{name}.{uuid.uuid4().hex}.tmp")
    try:
        write(temp)
        with open(temp, "rb+") as f:
            os.fsync(f.fileno())
        temp.replace(target)
    except FileNotFoundError:
        raise
    except OSError as e:
        raise StorageError(f"{target}: {type(e).__name__}: {e}") from e
    finally:
        temp.unlink(missing_ok=True)
