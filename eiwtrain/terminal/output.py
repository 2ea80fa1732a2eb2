"""Keeps a program running whatever becomes of the reader of its output: one that has gone or stalls, a full disk.

Not for what is printed (`eiwtrain.terminal.console`), nor for processes that write to the same place by themselves.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import queue
import select
import sys
import threading
import time
from typing import Any

_MOST_WAITING = 5000  # lines that wait for a slow reader
_STALL_SECONDS = 1.0  # after which a reader that takes nothing is not waited for: the oldest lines are dropped
_PIECE = 4096  # bytes written at a time, as a sign of life of a slow reader
_LAST_SECONDS = 3.0  # for which the end of the program waits for a reader that takes nothing
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)  # the reader does not come back; a full disk may

_writers: list[Writer] = []


def protect() -> None:
    """Give standard output and standard error of this program to threads that write them, until it ends.

    Afterwards nothing that prints waits or fails: not for a pipe that nobody reads, a terminal that was stopped by
    Ctrl-S or closed, a full disk, or a character that the terminal does not know. Whatever could not be written is
    counted in its place. Call it before anything keeps `sys.stdout` or `sys.stderr`.
    """
    for number in range(3):  # or files that are opened later get the numbers of streams that were closed
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    shared = os.path.sameopenfile(1, 2)  # then lines keep their order
    out = Writer(1)
    err = out if shared else Writer(2)
    for name, writer in (("stdout", out), ("stderr", err)):
        before = getattr(sys, name)
        if before is not None:
            with contextlib.suppress(OSError, ValueError):
                before.flush()
        encoding = getattr(before, "encoding", None) or "utf-8"
        stream: Any = Stream(writer)
        setattr(sys, name, io.TextIOWrapper(stream, encoding, "backslashreplace", newline="\n", line_buffering=True))
        _writers.append(writer)
    atexit.register(drain)


def drain() -> None:
    """Wait until all is written that was printed, but not for a reader that stalls; a program that ends by `os._exit`
    calls it before."""
    for writer in _writers:
        writer.drain()


class Stream(io.RawIOBase):
    """A file whose `write` gives everything to a `Writer`."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def write(self, data: Any) -> int:
        data = bytes(data)
        self._writer.put(data)
        return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._writer.number

    def isatty(self) -> bool:
        return os.isatty(self._writer.number)


class Writer:
    """Writes to a file descriptor in a thread. `put` may be called anywhere, also in a signal handler."""

    def __init__(self, number: int) -> None:
        """
        Args:
            number: the file descriptor.
        """
        self.number = number
        self._waiting: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()  # its `put` is reentrant
        self._lost, self._gone, self._forked = 0, False, False
        self._moved = time.monotonic()  # when the reader last took something, or had nothing to take
        os.register_at_fork(after_in_child=self._fork)
        threading.Thread(target=self._run, daemon=True, name="output").start()

    def put(self, data: bytes) -> None:
        """Have the bytes, a line say, written after those before them."""
        if self._forked:
            self._write(data)
            return
        if self._waiting.empty():
            self._moved = time.monotonic()
        while self._waiting.qsize() >= _MOST_WAITING:
            if time.monotonic() - self._moved < _STALL_SECONDS:
                time.sleep(0.01)
                continue
            with contextlib.suppress(queue.Empty):
                self._waiting.get_nowait()
                self._lost += 1
        self._waiting.put(data)

    def drain(self) -> None:
        """Wait until all is written, or until the reader has taken nothing for _LAST_SECONDS."""
        if self._forked:
            return
        written = threading.Event()
        self._waiting.put(written)
        while not written.wait(0.05):
            if time.monotonic() - self._moved > _LAST_SECONDS:
                return

    def _fork(self) -> None:
        self._forked = True  # without the thread

    def _run(self) -> None:
        while True:
            data = self._waiting.get()
            if isinstance(data, threading.Event):
                data.set()
            else:
                self._write(data)

    def _write(self, data: bytes) -> None:
        """Write it, or count it as lost."""
        if self._gone:
            return
        lost = self._lost
        said = f"\n[{lost} lines of output could not be written]\n".encode() if lost else b""
        rest = memoryview(said + data)
        while rest:
            try:
                rest = rest[os.write(self.number, rest[:_PIECE]) :]
                self._moved = time.monotonic()
            except BlockingIOError:  # another program has made it so
                select.select([], [self.number], [], 1.0)
            except OSError as e:
                self._gone = e.errno in _GONE
                self._lost += 1
                return
        self._lost -= lost
