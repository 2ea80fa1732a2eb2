"""A small process that outlives the driver and then tells MLflow how the run ended, if the driver no longer could.

Not for the next start, which looks at all runs again (`tracking.reconcile`), nor for restarting anything.

The driver holds the write end of a pipe, and nobody else does: the pipe ends when the driver has ended, whatever ended
it. The watcher has a session of its own and is no child of the driver: Ctrl-C does not reach it, nor does `ray job
stop`, which kills the driver and all below it. A machine that goes takes it along.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eiwtrain.tracking import Status, TrackedRun

_PATIENCE = 600.0  # seconds for which an MLflow or a storage that is away is tried again
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 15.0
_START_SECONDS = 60.0


class Watcher:
    """The driver's end of the pipe. Without a watcher a run is as well trained, so nothing here raises."""

    def __init__(self, run: TrackedRun, root: str, owner: str) -> None:
        """Start the process.

        Args:
            run: what it is to end.
            root: URL of the run's folder.
            owner: of the lease, this driver's: once it is another's, nothing is written.
        """
        self._starter: subprocess.Popen[bytes] | None = None
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._starter = subprocess.Popen(
                [sys.executable, "-m", "eiwtrain.driver.watcher"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,  # a pipe of the driver's would not end with the driver
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._say(uri=run.uri, experiment_id=run.experiment_id, run_id=run.run_id, root=root, owner=owner)
            self._starter.wait(_START_SECONDS)

    def will_end(self, status: Status, detail: str) -> None:
        """The driver is about to tell MLflow that the run ended so; should it not come to it, the watcher will."""
        self._say(status=status, detail=detail)

    def dismiss(self) -> None:
        """MLflow knows all: the process ends."""
        self._say(done=True)
        if self._starter is not None and self._starter.stdin is not None:
            with contextlib.suppress(OSError):
                self._starter.stdin.close()

    def _say(self, **words: Any) -> None:
        if self._starter is not None and self._starter.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # ValueError: closed already
                self._starter.stdin.write(json.dumps(words).encode() + b"\n")
                self._starter.stdin.flush()


def main() -> None:
    """The process: wait for the end of standard input, then see what is to be done."""
    if os.fork():  # whoever started this waits for its end, and is no parent of what goes on
        os._exit(0)
    told: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        told |= json.loads(line)
    if told and "done" not in told:
        _settle(told, time.time())


def _settle(told: dict[str, Any], ended: float) -> None:
    from eiwtrain import storage, tracking  # not before: idle, this process is to be small
    from eiwtrain.tracking.store import refused

    run = tracking.TrackedRun(told["uri"], told["experiment_id"], told["run_id"])
    give_up, wait = time.monotonic() + _PATIENCE, _FIRST_WAIT
    while True:
        try:
            with storage.impatient():
                tracking.settle(run, told["owner"], told["root"], ended, told.get("status"), told.get("detail", ""))
            return
        except Exception as e:  # whatever it is, nobody is there to be told
            if refused(e) or time.monotonic() + wait > give_up:
                return
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT)


if __name__ == "__main__":
    main()
