"""Bytes at any fsspec URL: read, publish atomically, retry what is transient, checksum.

Not for formats: what the bytes mean is the business of `eiwtrain.data.manifest` and `eiwtrain.checkpoint`.
A URL without a scheme is a local path.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import fsspec

T = TypeVar("T")

_CHUNK = 1 << 20  # bytes a read while hashing or copying
_ATTEMPTS = 6  # with doubling waits from 0.5 s: about 16 s in all, on top of the client's own retries
_attempts: ContextVar[int] = ContextVar("attempts", default=_ATTEMPTS)
_NETWORK_WORDS = ("Connect", "Timeout", "HTTPClient", "Disconnected", "Payload")
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class StorageError(RuntimeError):
    """Storage cannot be reached or refuses; the message names the URL and the cause in one line."""


def is_local(url: str) -> bool:
    """Whether `url` is a path of this machine's file system."""
    return "://" not in url or url.startswith("file://")


def absolute(url: str) -> str:
    """A local path made absolute; any other URL as it is, without a trailing slash."""
    if is_local(url):
        return str(Path(url.removeprefix("file://")).expanduser().absolute())
    return url.rstrip("/")


def join(url: str, *parts: str) -> str:
    """`url/part/part`, with single slashes."""
    return "/".join([url.rstrip("/"), *(p.strip("/") for p in parts)])


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path inside it.

    Call it inside the process that uses it: remote file systems do not survive a fork.

    Raises:
        StorageError: the scheme is unknown or its package is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as e:
        raise StorageError(f"{url}: {e}") from None


def retrying(what: str, call: Callable[[], T]) -> T:
    """`call()`, again after a growing, jittered wait when it fails in a way that may pass.

    Raises:
        StorageError: it failed for good, or `_ATTEMPTS` times; the cause is in the message.
        FileNotFoundError: as `call` raised it (callers tell "absent" from "broken").
    """
    attempts = _attempts.get()
    for attempt in range(attempts):
        try:
            return call()
        except FileNotFoundError:
            raise
        except Exception as e:
            if not _may_pass(e) or attempt == attempts - 1:
                raise StorageError(f"{what}: {type(e).__name__}: {' '.join(str(e).split())[:300]}") from e
            time.sleep(0.5 * 2**attempt * random.uniform(0.7, 1.3))
    raise AssertionError("unreachable")


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """In this context nothing is tried twice, beyond what the storage's own client does."""
    token = _attempts.set(1)
    try:
        yield
    finally:
        _attempts.reset(token)


def _may_pass(e: Exception) -> bool:
    """Whether another try may succeed: the network's failures, not refusals. botocore's are no OSErrors."""
    if isinstance(e, OSError):
        return not isinstance(e, _FINAL)
    name = type(e).__name__
    return type(e).__module__.split(".")[0] in ("botocore", "aiohttp") and any(w in name for w in _NETWORK_WORDS)


def exists(url: str) -> bool:
    """Whether a file or folder is at `url`."""
    fs, path = filesystem(url)
    return retrying(url, lambda: fs.exists(path))


def listdir(url: str) -> list[str]:
    """Names directly under `url`, sorted; empty where there is nothing."""
    fs, path = filesystem(url)
    fs.invalidate_cache()
    try:
        entries = retrying(url, lambda: fs.ls(path, detail=False))
    except FileNotFoundError:
        return []
    names = {e.rstrip("/").rsplit("/", 1)[-1] for e in entries if e.rstrip("/") != path.rstrip("/")}
    return sorted(names)


def size(url: str) -> int:
    """Bytes of the file at `url`.

    Raises:
        FileNotFoundError: nothing is there.
    """
    fs, path = filesystem(url)
    fs.invalidate_cache()
    return int(retrying(url, lambda: fs.size(path)))


def read_bytes(url: str) -> bytes:
    """The whole file at `url`.

    Raises:
        FileNotFoundError: nothing is there.
        StorageError: it cannot be read.
    """
    fs, path = filesystem(url)
    return retrying(url, lambda: fs.cat_file(path))


def write_bytes(url: str, data: bytes) -> None:
    """Publish `data` at `url`: a reader sees the old bytes, or none, or all of the new ones, never a part."""
    fs, path = filesystem(url)
    if is_local(url):
        _replace(Path(path), lambda temp: temp.write_bytes(data))
    else:  # an object store's put is atomic by itself
        _put(url, lambda: fs.pipe_file(path, data))


def put_file(local: str | os.PathLike[str], url: str) -> None:
    """Publish the local file at `url`, atomically as `write_bytes`."""
    fs, path = filesystem(url)
    if is_local(url):
        _replace(Path(path), lambda temp: _copy(Path(local), temp))
    else:
        _put(url, lambda: fs.put_file(str(local), path))


def get_file(url: str, local: str | os.PathLike[str]) -> None:
    """Copy the file at `url` to the local path, which appears whole or not at all.

    Raises:
        FileNotFoundError: nothing is at `url`.
        StorageError: it cannot be read.
    """
    fs, path = filesystem(url)
    _replace(Path(local), lambda temp: retrying(url, lambda: fs.get_file(path, str(temp))))


def delete(url: str) -> None:
    """Remove the file or the folder with all in it; absent is fine."""
    fs, path = filesystem(url)
    try:
        retrying(url, lambda: fs.rm(path, recursive=True))
    except FileNotFoundError:
        return


def check_writable(url: str) -> None:
    """Write, read back and delete a small file under `url`; a local folder that was not there is not left.

    Raises:
        StorageError: one of the three failed, with the cause in one line.
    """
    folder = Path(filesystem(url)[1])
    made = [p for p in (folder, *folder.parents) if is_local(url) and not p.exists()]
    probe = join(url, f".probe-{uuid.uuid4().hex}")
    write_bytes(probe, b"eiwtrain")
    if read_bytes(probe) != b"eiwtrain":
        raise StorageError(f"{url}: what was written could not be read back")
    delete(probe)
    with contextlib.suppress(OSError):  # somebody else may have put a file there meanwhile
        for path in made:
            path.rmdir()


@contextlib.contextmanager
def local_folder(url: str) -> Iterator[str]:
    """The folder at `url` as a local path: itself, or for the time of the context a copy of the files in it.

    Raises:
        StorageError: there is nothing, or it cannot be read.
    """
    if is_local(url):
        yield absolute(url)
        return
    with tempfile.TemporaryDirectory() as copy:
        names = listdir(url)
        if not names:
            raise StorageError(f"{url}: no such folder")
        for name in names:
            get_file(join(url, name), Path(copy, name))
        yield copy


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a local file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _put(url: str, call: Callable[[], Any]) -> None:
    try:
        retrying(url, call)
    except FileNotFoundError as e:  # no such bucket
        raise StorageError(f"{url}: {' '.join(str(e).split())}") from e


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as src, open(target, "wb") as dst:
        while chunk := src.read(_CHUNK):
            dst.write(chunk)


def _replace(target: Path, write: Callable[[Path], Any]) -> None:
    """Write a sibling temporary file, flush it to disk and rename it onto `target`."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StorageError(f"{target}: {type(e).__name__}: {e}") from e
    temp = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
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
