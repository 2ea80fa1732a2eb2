"""Kills a worker that makes no progress, after reporting the stacks of its threads.

A rank that hangs leaves the others in a collective that never returns, and the watchdog of each rank notices that. The
process is killed, so that Ray sees a dead worker and starts a new attempt. Not for a process that is suspended or gone:
the ranks that wait for it notice, and if there is a single rank, Ray's health check does.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

from eiwtrain.on_ray.session import START_SECONDS

_LOOKS = 20  # checks within each limit
_OTHERS_SECONDS = 5.0  # for other ranks to report their stacks also, before the first death stops them
_STUCK_SECONDS = 30.0  # after which a process whose interpreter hangs also exits without it


class Watchdog:
    """Kills this process unless `beat` is called every `limit` seconds; the first call may take longer."""

    def __init__(self, limit: float, report: Callable[[str], None]) -> None:
        """
        Args:
            limit: seconds between two beats.
            report: receives the event and the stacks as text, in a thread of the watchdog; may block.
        """
        self._limit, self._allowed, self._report = limit, max(limit, START_SECONDS), report
        self._closed = threading.Event()
        self._main = threading.get_ident()
        self._doing, self._last = "the start", time.monotonic()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self, doing: str) -> None:
        """Report progress; the work that follows is `doing`, e.g. "step 12"."""
        self._doing, self._last, self._allowed = doing, time.monotonic(), self._limit
        # C code that holds the interpreter's lock keeps the thread below from running
        faulthandler.dump_traceback_later(self._limit + _STUCK_SECONDS, exit=True, file=2)  # standard error

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(self._limit / _LOOKS):
            if time.monotonic() - self._last > self._allowed:
                break
        else:
            return
        threading.Thread(target=self._report, args=(self._stacks(),), daemon=True).start()
        time.sleep(_OTHERS_SECONDS)
        if not self._closed.is_set():
            os.kill(os.getpid(), signal.SIGKILL)

    def _stacks(self) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sys._current_frames()
        order = sorted(frames, key=lambda ident: ident != self._main)  # first the main thread, which hangs
        stacks = [
            f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frames[ident])).rstrip()
            for ident in order
            if ident != threading.get_ident()
        ]
        return f"no progress for {self._allowed:g} s in {self._doing}\n" + "\n".join(stacks)
