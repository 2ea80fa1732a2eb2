"""Processes that outlive the program that started them, are found again by pid and start time, and are killed with all
their descendants.

Not for what the processes are: `cluster.local` knows that.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_MARK = "EIWTRAIN_CLUSTER_PROCESS"  # in the environment of what is started, with the name of its log
_END_SECONDS = 10.0  # within which the kernel ends what was sent SIGKILL
_SAME_SECONDS = 2.0  # by which a start time may seem to differ when the clock was set; no pid comes back so soon


@dataclass(frozen=True)
class Process:
    """A process of this machine; a later one that was given the same pid is another process.

    Attributes:
        name: what it is, for people.
        pid: also its session's id, where it was started by `spawn`.
        started: seconds since the epoch, as psutil's `create_time`.
        mark: a value in the environment of its descendants, also of those whose parent has ended; may be empty.
    """

    name: str
    pid: int
    started: float
    mark: str = ""
    _popen: subprocess.Popen[bytes] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, name: str, pid: int) -> Process:
        """Return the living process of that pid."""
        return cls(name, pid, psutil.Process(pid).create_time())

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < _SAME_SECONDS
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def family(self) -> list[psutil.Process]:
        """Return it and its living descendants, also those whose parent has ended, in whatever session they are."""
        found = []
        if self.alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                leader = psutil.Process(self.pid)
                found = [leader, *leader.children(recursive=True)]
        if self.mark:  # children() misses those whose parent has ended, this those that overwrite it with a title
            found += [p for p in psutil.process_iter() if self._marked(p)]
        return list({p.pid: p for p in found}.values())

    def _marked(self, process: psutil.Process) -> bool:
        try:
            return bool(process.environ().get(_MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE)
        except (psutil.Error, OSError):
            return False

    def kill(self) -> None:
        """Kill it and all its descendants by SIGKILL, whatever their groups and sessions; return when they are gone."""
        family = self.family()
        for process in family:  # first stopped, so that none is born meanwhile
            _send(process, signal.SIGSTOP)
        family = list({p.pid: p for p in [*family, *self.family()]}.values())
        for process in family:
            _send(process, signal.SIGKILL)
        if self._popen is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(_END_SECONDS)
        psutil.wait_procs(family, _END_SECONDS)

    def terminate(self) -> None:
        """Send SIGTERM to it alone; return at once."""
        if self.alive:
            _send(psutil.Process(self.pid), signal.SIGTERM)

    def stop(self, seconds: float) -> None:
        """Send SIGTERM, and SIGKILL to what is left after `seconds`."""
        family = self.family()
        self.terminate()
        end = time.monotonic() + seconds
        while self.alive and time.monotonic() < end:
            if self._popen is not None:
                self._popen.poll()
            time.sleep(0.05)
        self.kill()
        for process in family:
            _send(process, signal.SIGKILL)
        psutil.wait_procs(family, _END_SECONDS)


def spawn(name: str, command: Sequence[str], env: Mapping[str, str], log: Path) -> Process:
    """Start a process in a session of its own, which a terminal's Ctrl-C and hangup do not reach.

    Args:
        log: its output goes there, from the file's beginning.
    """
    mark = str(log)
    with log.open("wb") as output:
        popen = subprocess.Popen(
            command,
            env={**env, _MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Process(name, popen.pid, psutil.Process(popen.pid).create_time(), mark, popen)


def _send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # psutil looks at the start time before it sends
        process.send_signal(number)
