"""Ends a worker that makes no progress, with the stacks of its threads told first.

A rank that hangs leaves the others in a collective that does not end: each of them finds so by itself. The process is
killed, so that Ray sees a dead worker and the attempt starts again. Not for a process that is stopped or gone: the
ranks that wait for it find out, and where there is one rank alone, Ray's health check.
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

_LOOKS = 20  # a limit's parts, after each of which the watchdog looks
_START_SECONDS = 300.0  # at least, up to the first beat: a checkpoint may have to be fetched
_OTHERS_SECONDS = 5.0  # for the other ranks to tell their stacks too, before the first death ends them
_STUCK_SECONDS = 30.0  # after which a process whose interpreter hangs as well is ended without it


class Watchdog:
    """Wants to hear a `beat` every `limit` seconds at least; the first may take longer."""

    def __init__(self, limit: float, tell: Callable[[str], None]) -> None:
        """
        Args:
            limit: seconds.
            tell: is given what happened, with the stacks, in a thread of the watchdog's; may block.
        """
        self._limit, self._allowed, self._tell = limit, max(limit, _START_SECONDS), tell
        self._closed = threading.Event()
        self._main = threading.get_ident()
        self._doing, self._last = "the start", time.monotonic()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self, doing: str) -> None:
        """Progress was made; what follows is `doing`, e.g. "step 12"."""
        self._doing, self._last, self._allowed = doing, time.monotonic(), self._limit
        # C code that holds the interpreter's lock would keep the thread below from running
        faulthandler.dump_traceback_later(self._limit + _STUCK_SECONDS, exit=True, file=2)  # standard error

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(self._limit / _LOOKS):
            if time.monotonic() - self._last > self._allowed:
                break
        else:
            return
        threading.Thread(target=self._tell, args=(self._report(),), daemon=True).start()
        time.sleep(_OTHERS_SECONDS)
        if not self._closed.is_set():
            os.kill(os.getpid(), signal.SIGKILL)

    def _report(self) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sys._current_frames()
        order = sorted(frames, key=lambda ident: ident != self._main)  # the one that hangs first
        stacks = [
            f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frames[ident])).rstrip()
            for ident in order
            if ident != threading.get_ident()
        ]
        return f"no progress for {self._allowed:g} s in {self._doing}\n" + "\n".join(stacks)
