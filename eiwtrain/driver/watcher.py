"""A small process that outlives the driver and then reports to MLflow how the run ended, if the driver no longer could.

Not for the next start, which looks at all runs again (`tracking.end_abandoned`), nor for restarting anything.

Only the driver holds the write end of a pipe: the pipe ends when the driver has ended, whatever ended it. The watcher
has a session of its own and is not a child of the driver: Ctrl-C does not reach it, nor does `ray job stop`, which
kills the driver and all below it. If the machine is lost, so is the watcher.
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

_PATIENCE = 600.0  # seconds for which it tries again while MLflow or storage is away
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 15.0
_START_SECONDS = 60.0


class Watcher:
    """The driver's end of the pipe. A run can do without a watcher, so nothing here raises."""

    def __init__(self, run: TrackedRun, root: str, owner: str) -> None:
        """Start the process.

        Args:
            run: the MLflow run that the process is to end.
            root: URL of the run's folder.
            owner: this driver, in the run's lease: once another driver owns it, nothing is written.
        """
        self._starter: subprocess.Popen[bytes] | None = None
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._starter = subprocess.Popen(
                [sys.executable, "-m", "eiwtrain.driver.watcher"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,  # else a pipe that reads the driver's output would not end with the driver
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._send(uri=run.uri, experiment_id=run.experiment_id, run_id=run.run_id, root=root, owner=owner)
            self._starter.wait(_START_SECONDS)

    def will_end(self, status: Status, detail: str) -> None:
        """Announce that the driver is about to end the run in MLflow so; if it dies first, the watcher does it."""
        self._send(status=status, detail=detail)

    def dismiss(self) -> None:
        """Let the process exit: MLflow has the run's status."""
        self._send(done=True)
        if self._starter is not None and self._starter.stdin is not None:
            with contextlib.suppress(OSError):
                self._starter.stdin.close()

    def _send(self, **words: Any) -> None:
        if self._starter is not None and self._starter.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # ValueError: closed already
                self._starter.stdin.write(json.dumps(words).encode() + b"\n")
                self._starter.stdin.flush()


def main() -> None:
    """Wait for the end of standard input, then end the run if the driver has not."""
    if os.fork():  # the driver waits for the end of this process, and is not the parent of the one that continues
        os._exit(0)
    words: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        words |= json.loads(line)
    if words and "done" not in words:
        _settle(words, time.time())


def _settle(words: dict[str, Any], ended: float) -> None:
    from eiwtrain import storage, tracking  # not earlier: while it waits, this process should be small
    from eiwtrain.tracking.store import refused

    run = tracking.TrackedRun(words["uri"], words["experiment_id"], words["run_id"])
    give_up, wait = time.monotonic() + _PATIENCE, _FIRST_WAIT
    while True:
        try:
            with storage.impatient():
                tracking.settle(run, words["owner"], words["root"], ended, words.get("status"), words.get("detail", ""))
            return
        except Exception as e:  # whatever it is, nobody would read about it
            if refused(e) or time.monotonic() + wait > give_up:
                return
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT)


if __name__ == "__main__":
    main()
