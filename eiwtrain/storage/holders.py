"""Which process holds a lease, and whether it has ended. Not for the lease itself (`eiwtrain.storage.lease`)."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Holder:
    """A process, so that others on its machine can see whether it still lives."""

    host: str
    pid: int
    machine: str  # boot id and pid namespace; empty where they are not available
    started: int  # clock ticks from the boot to the start of the process; 0 if unknown

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}"


def here() -> Holder:
    """Return this process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        machine = ""
    return Holder(socket.gethostname(), os.getpid(), machine, started(os.getpid()) or 0)


def is_gone(holder: Holder) -> bool:
    """Return whether the process ran on this machine and has ended."""
    this = here()
    if not holder.machine or (holder.host, holder.machine) != (this.host, this.machine):
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, and belongs to another user
        pass
    return holder.started > 0 and started(holder.pid) not in (holder.started, None)


def started(pid: int) -> int | None:
    """Return when the process was started, in clock ticks since the boot; 0 if it has ended and waits to be reaped;
    None if that is not available."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if state in "ZX" else int(fields[18])
