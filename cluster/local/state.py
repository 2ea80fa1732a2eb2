"""Records what runs for a folder's cluster, so that another process can look at it and stop it.

One cluster a folder. Not for how it is started: `cluster.local` does that.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from cluster.local.processes import Process

_STATE = "cluster.json"
_LOCK = "cluster.lock"
TOKEN = "ray-token"
TEMP_PREFIX = "eiwtrain-"  # of the names of the folders that hold Ray's files, and are deleted


class LocalError(RuntimeError):
    """The cluster cannot be started or asked for something; the message says why in one line."""


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Make a folder ready for the start of a cluster in it, lock it meanwhile, and close it to other users.

    Raises:
        LocalError: it cannot hold one, or holds something else, or a cluster of it runs already or is being started.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            names = {path.name for path in folder.iterdir()}
            if names and names.isdisjoint({_STATE, _LOCK, TOKEN}):
                raise LocalError(f"{folder}: holds other files, and would be closed to others; name a new folder")
            folder.chmod(0o700)
            fcntl.flock(held.enter_context((folder / _LOCK).open("w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LocalError(f"{folder}: another `up` is starting its cluster") from None
        except OSError as e:
            raise LocalError(f"{folder}: cannot keep a cluster's files here ({e})") from None
        if any(process.family() for process in read(folder)):
            raise LocalError(f"{folder}: its cluster runs already; `down` ends it")
        forget(folder)
        yield


def record(folder: Path, processes: Sequence[Process], temp: Path | None) -> None:
    """Record what was started.

    Args:
        processes: in the order in which they are to be stopped.
        temp: the folder of Ray's files.
    """
    said = [{"name": p.name, "pid": p.pid, "started": p.started, "mark": p.mark} for p in processes]
    write(folder / _STATE, json.dumps({"temp": str(temp) if temp else None, "processes": said}, indent=1))


def down(folder: str | Path) -> list[str]:
    """Stop what the cluster of a folder still runs, and nothing else; return the names of what was stopped.

    Raises:
        LocalError: what runs is not known, or something does not stop.
    """
    folder = Path(folder).absolute()
    living = [process for process in read(folder) if process.family()]
    for process in living:
        process.kill()
    if left := [f"{p.name} ({p.pid})" for p in living if p.alive]:
        raise LocalError(f"{folder}: these did not end: {', '.join(left)}")
    forget(folder)
    return [process.name for process in living]


def status(folder: str | Path) -> list[tuple[str, int, bool, int]]:
    """Return what was started for the cluster of a folder: name, pid, whether it lives, memory with its descendants'.

    The memory is in bytes, resident; pages that processes share are counted once (PSS) where the system reports that.

    Raises:
        LocalError: what runs is not known.
    """
    return [(p.name, p.pid, p.alive, sum(map(_memory, p.family()))) for p in read(Path(folder).absolute())]


def _memory(process: psutil.Process) -> int:
    try:
        whole = process.memory_full_info()
        return int(getattr(whole, "pss", whole.rss))
    except psutil.Error:
        return 0


def read(folder: Path) -> list[Process]:
    """Return what the last cluster of a folder has started; empty where it was stopped."""
    return [Process(p["name"], p["pid"], p["started"], p["mark"]) for p in _state(folder).get("processes", [])]


def _state(folder: Path) -> dict[str, Any]:
    path = folder / _STATE
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as e:
        raise LocalError(f"{path}: cannot be read, so what runs is not known ({e})") from None


def forget(folder: Path) -> None:
    """Delete the state file and Ray's own files of a cluster that does not run."""
    temp = _state(folder).get("temp")
    if temp and Path(temp).name.startswith(TEMP_PREFIX):
        shutil.rmtree(temp, ignore_errors=True)
    (folder / _STATE).unlink(missing_ok=True)


def write(path: Path, text: str) -> None:
    """Replace a file at once; nobody else may read it.

    Raises:
        LocalError: it cannot be written.
    """
    new = path.with_suffix(".new")
    try:
        new.unlink(missing_ok=True)
        new.touch(0o600)
        new.write_text(text)
        new.replace(path)
    except OSError as e:
        raise LocalError(f"{path}: cannot be written ({e})") from None
