"""Folders and locks in folders that everybody may write, such as the temporary one. Not for what is kept in them."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eiwtrain.storage.retry import StorageError


def private_folder(name: str, setting: str, parent: Path | None = None) -> Path:
    """Return this user's folder `name-UID`, which nobody else can write or read.

    Args:
        name: what the folder is for.
        setting: names another folder; for the error.
        parent: where it is; None: in the machine's temporary folder.

    Raises:
        StorageError: it is a link, or somebody else owns it or may write to it or replace it, who could plant other
            files there; or it cannot be made.
    """
    folder = (parent or Path(tempfile.gettempdir())) / f"{name}-{os.getuid()}"
    try:
        if parent is not None and _others_may_replace(parent.stat()):
            raise StorageError(f"{setting}: others may replace folders in {parent}; name a folder of your own")
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        about = folder.lstat()
        if not stat.S_ISDIR(about.st_mode):
            raise StorageError(f"{setting}: {folder} is a link or a file; delete it, or name another folder")
        if about.st_uid not in (0, os.getuid()):  # root, which can do anything anyway, makes the volumes of containers
            raise StorageError(f"{setting}: {folder} belongs to somebody else; name another folder")
        if about.st_mode & 0o022:
            raise StorageError(
                f"{setting}: others may write to {folder}, and its files may be theirs; delete it, or name another"
            )
        if about.st_uid == os.getuid() and about.st_mode & 0o077:
            opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                os.fchmod(opened, 0o700)
            finally:
                os.close(opened)
    except OSError as e:
        raise StorageError(f"{setting}: {folder} cannot be made or opened: {e.strerror or e}") from None
    return folder


def _others_may_replace(about: os.stat_result) -> bool:
    """Return whether another user than root may rename what this user makes in a folder. In /tmp they may not: it is
    sticky."""
    writable = about.st_mode & 0o022 and not about.st_mode & stat.S_ISVTX
    return bool(writable) or about.st_uid not in (0, os.getuid())


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Let one process of the machine at a time into the block; the lock's file stays. A link is not followed."""
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)  # released by the kernel, also when this process is killed
        yield
    finally:
        os.close(opened)
