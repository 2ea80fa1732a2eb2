"""Compare and swap at any fsspec URL: of several writers that saw the same bytes, only one replaces them.

Not for large files, and not for reading: that is `eiwtrain.storage`.
"""

from __future__ import annotations

import errno
import fcntl
import time
from pathlib import Path
from typing import Any

from eiwtrain import storage
from eiwtrain.storage.retry import StorageError, retrying

_SETTLE_SECONDS = 1.0  # between a put without a condition and the look at whose it is
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def swap(url: str, expected: bytes | None, data: bytes) -> bool:
    """Put `data` at `url` if `expected` is there (None: if nothing is), and return whether `data` is there now.

    `data` must be bytes that no other call writes, for example with a random id in them: a put may be carried out
    though its answer is lost, so `data` that is already there counts as put by this call.

    How far the condition holds:

    - S3: the put carries the condition and the server decides (If-None-Match: AWS since August 2024; If-Match: since
      November 2024, with botocore 1.35.69 or later; SeaweedFS, R2, Ozone and others too). A server that ignores the
      condition silently gives less than the last entry of this list.
    - A local path: under `flock` of a file beside it, `.NAME.lock`, which stays. It holds between the processes of a
      machine, and between machines where the file system hands locks to its server: NFS as it is mounted by default,
      not with `nolock` or `local_lock`.
    - Elsewhere (other schemes, servers and file systems that refuse conditions or locks): put, wait a second, and look
      whose bytes are there. At most one of the writers that start within this second gets True. A writer that is held
      up for longer between its look and its put overwrites the one that got True, which learns of it at its next call.

    Raises:
        StorageError: it failed for too long or for good; `data` may be there, or may still appear.
    """
    fs, path = storage.filesystem(url)
    try:
        if storage.is_local(url):
            swapped = retrying(url, lambda: _under_lock(Path(path), expected, data))
        elif hasattr(fs, "call_s3") and _has_conditions(fs):
            swapped = retrying(url, lambda: _on_condition(fs, path, expected, data))
        else:
            swapped = None
    except (FileNotFoundError, NotADirectoryError) as e:
        raise StorageError(f"{url}: {type(e).__name__}: {e}") from e
    return _put_and_look(url, expected, data) if swapped is None else swapped


def keeps_conditions(url: str) -> bool | None:
    """Return whether two writers of `url`, at which there must be a file of a caller's own, are kept apart: True by the
    storage itself; None where `swap` has to put and look; False by a server that ignores the condition of a put.

    Raises:
        StorageError: it failed for too long or for good.
    """
    fs, path = storage.filesystem(url)
    if storage.is_local(url):
        found = Path(path).read_bytes()
        return None if retrying(url, lambda: _under_lock(Path(path), found, found)) is None else True
    if not hasattr(fs, "call_s3") or not _has_conditions(fs):
        return None
    bucket, key, _ = fs.split_path(path)

    def is_refused(**condition: str) -> bool | None:
        try:
            fs.call_s3("put_object", Bucket=bucket, Key=key, Body=b"ignored", **condition)
        except OSError as e:
            status = _status(e)[0]
            if status in (412, 501):
                return True if status == 412 else None
            raise
        return False

    answers = [
        retrying(url, lambda: is_refused(IfNoneMatch="*")),
        retrying(url, lambda: is_refused(IfMatch=f'"{0:032}"')),  # the tag of other bytes
    ]
    return False if False in answers else None if None in answers else True


def _under_lock(path: Path, expected: bytes | None, data: bytes) -> bool | None:
    """Do as `swap`; return None if the file system has no locks, raise BlockingIOError if the lock is held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in _NO_LOCKS:
                return None
            raise
        try:
            found = path.read_bytes()
        except FileNotFoundError:
            found = None
        if found == expected != data:
            for stray in path.parent.glob(f".{path.name}.*.tmp"):  # left by a writer that was killed here
                stray.unlink(missing_ok=True)
            storage.write_bytes(str(path), data)
            return True
        return found == data


def _has_conditions(fs: Any) -> bool:
    """Return whether the S3 client sends conditions: s3fs drops what its botocore does not know."""
    return "IfMatch" in fs.s3.meta.service_model.operation_model("PutObject").input_shape.members


def _on_condition(fs: Any, path: str, expected: bytes | None, data: bytes) -> bool | None:
    """Do as `swap`; return None if the server has no conditions."""
    bucket, key, _ = fs.split_path(path)
    found, condition = None, {"IfNoneMatch": "*"}
    try:  # the tag first: if the bytes are replaced before they are read, the tag is the old one
        condition = {"IfMatch": fs.call_s3("head_object", Bucket=bucket, Key=key)["ETag"]}
        found = fs.cat_file(path)
    except FileNotFoundError:
        pass
    if found != expected or found == data:
        return bool(found == data)
    try:
        fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
    except OSError as e:
        status, code = _status(e)
        if status == 501:
            return None
        if status != 412 and code != "NoSuchKey":
            raise
        try:  # another writer was faster, or an earlier try of this put that was given up
            return bool(fs.cat_file(path) == data)
        except FileNotFoundError:
            return False
    return True


def _status(e: OSError) -> tuple[Any, Any]:
    """Return HTTP status and code of the S3 server's answer behind an error of s3fs."""
    answer = getattr(e.__cause__, "response", {})
    return answer.get("ResponseMetadata", {}).get("HTTPStatusCode"), answer.get("Error", {}).get("Code")


def _put_and_look(url: str, expected: bytes | None, data: bytes) -> bool:
    found = read(url)
    if found == expected != data:
        storage.write_bytes(url, data)
        time.sleep(_SETTLE_SECONDS)
        found = read(url)
    return found == data


def read(url: str) -> bytes | None:
    """Return the bytes at `url`; None if there is nothing."""
    try:
        return storage.read_bytes(url)
    except FileNotFoundError:
        return None
