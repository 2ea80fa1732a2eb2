"""Copies of a checkpoint's parts on the workers' machines, which a restart reads instead of storage.

A copy counts only if it has the size and the SHA-256 that the checkpoint's manifest gives: whatever else lies in the
folder costs a restart time, and nothing more. Copies of one checkpoint of a run are kept. Not for which parts a rank
copies (`eiwtrain.checkpoints.writer`), nor for who reads them (`eiwtrain.train.restore`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

from eiwtrain import storage
from eiwtrain.checkpoints.format import FOLDER, Checkpoint, Part
from eiwtrain.storage.private import private_folder

_SPARE = 0.1  # of the disk that stays free: others may have files in /dev/shm, and die when it is full
_ABANDONED = 86400.0  # seconds without a new copy after which a run's copies are deleted when another run begins
_RUN = re.compile(r"[0-9a-f]{32}$")


def open_folder(near: str, root: str) -> Path:
    """Return this machine's folder for copies of the run at `root`, which nobody else can write or read. Delete what
    other runs have left there and not touched for long.

    Args:
        near: the folder of `checkpoint.near`, which is made if it is not there.

    Raises:
        StorageError: somebody else could put files there, or it cannot be made.
    """
    try:
        Path(near).mkdir(0o755, parents=True, exist_ok=True)
        own = private_folder("eiwtrain-near", "checkpoint.near", Path(near))
        folder = own / storage.sha256_bytes(root.encode())[:32]
        folder.mkdir(mode=0o700, exist_ok=True)
        for other in own.iterdir():
            if other != folder and _RUN.match(other.name) and time.time() - other.lstat().st_mtime > _ABANDONED:
                shutil.rmtree(other, ignore_errors=True)
    except (OSError, ValueError) as e:  # ValueError: a zero byte
        raise storage.StorageError(
            f"checkpoint.near: {near} cannot be used: {getattr(e, 'strerror', None) or e}"
        ) from None
    return folder


def ward(nodes: Sequence[str], rank: int) -> int | None:
    """Return the rank of which this rank copies the part, too, so that it outlives its node: one on another node, and
    for each rank another; None if there is no such rank left.

    Args:
        nodes: a name of the node of each rank.
    """
    ranks = range(len(nodes))

    def apart(shift: int) -> int:
        return sum(nodes[r] != nodes[r - shift] for r in ranks)

    other = (rank - max(ranks[1:], key=apart, default=0)) % len(nodes)
    return other if nodes[other] != nodes[rank] else None


def write(folder: Path, of: Checkpoint, part: Part, pieces: Iterable[bytes | memoryview]) -> None:
    """Copy a part into the run's folder, whole or not at all.

    Raises:
        OSError: it cannot be written, or would leave too little room on the disk.
    """
    disk = shutil.disk_usage(folder)
    if disk.free - part.bytes < _SPARE * disk.total:
        raise OSError(errno.ENOSPC, f"{part.bytes:,} bytes would leave less than {_SPARE:.0%} of {folder} free")
    place = folder / _name(of)
    place.mkdir(mode=0o700, exist_ok=True)
    temp = place / f".{uuid.uuid4().hex}.tmp"
    try:
        with open(temp, "xb", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o600)) as f:
            f.writelines(pieces)
        temp.replace(place / part.name)
    finally:
        temp.unlink(missing_ok=True)


def held(folder: Path, of: Checkpoint) -> list[int]:
    """Return the numbers of a checkpoint's parts of which a file of the right size is here; its bytes are not read."""
    found = []
    for number, part in enumerate(of.parts):
        with contextlib.suppress(OSError):
            about = (folder / _name(of) / part.name).lstat()
            if stat.S_ISREG(about.st_mode) and about.st_size == part.bytes:
                found.append(number)
    return found


def read(folder: Path, of: Checkpoint, part: Part) -> bytes | None:
    """Return the bytes of a part, verified; None if there is no copy, or it is not what was written. Such a copy is
    deleted."""
    path = folder / _name(of) / part.name
    try:  # a link is not followed, and a pipe would block
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as f:
            about = os.fstat(f.fileno())
            data = f.read(part.bytes) if stat.S_ISREG(about.st_mode) and about.st_size == part.bytes else b""
        if storage.sha256_bytes(data) == part.sha256:
            return data
    except FileNotFoundError:
        return None
    except OSError:
        pass
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def keep_only(folder: Path, of: Checkpoint) -> None:
    """Delete the run's copies of all other checkpoints."""
    for place in folder.iterdir():
        if FOLDER.match(place.name) and place.name != _name(of):
            shutil.rmtree(place, ignore_errors=True)  # other ranks of this machine delete them, too


def remove(near: str, root: str) -> None:
    """Delete all copies of the run on this machine, as far as that is possible."""
    with contextlib.suppress(storage.StorageError):
        shutil.rmtree(open_folder(near, root), ignore_errors=True)


def _name(of: Checkpoint) -> str:
    return of.url.rstrip("/").rpartition("/")[2]
