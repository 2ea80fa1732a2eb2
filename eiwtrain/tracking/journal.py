"""The curves of a run as a file of JSON lines beside its checkpoints: the points in MLflow, for pandas and jq.

A line holds points that were measured together: `{"step": 120, "time": 1763847222.123, CURVE: 0.001, ...}`, with
Unix time in seconds; a value that is not finite is null. No attempt resumes from the file: the points in MLflow decide,
and a file that differs is corrected. Not for images and tags.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from eiwtrain import storage
from eiwtrain.tracking.backlog import Point
from eiwtrain.tracking.store import cause_line

_RETRY_SECONDS = 5.0
_PUBLISH_SECONDS = 60.0  # at least, between two uploads
_PUBLISH_SHARE = 20.0  # and at least this many times as long as the last upload took
_READ_BYTES = 1 << 20


class Row(NamedTuple):
    """A line of the journal: the points of one step and time."""

    time: int
    """Unix time in milliseconds, as MLflow has it."""
    step: int
    values: dict[str, float | None]


class Recorded(NamedTuple):
    """The present content of the tracking store."""

    last: Mapping[str, tuple[int, int]]
    """(step, time) of the last point of each curve."""
    read: Mapping[str, list[Point]]
    """All points of the curves that were read already, as they may have a gap."""
    history: Callable[[str], list[Point]]
    """Returns all points of a curve."""


def agreed(rows: Callable[[], Iterable[Row]], recorded: Recorded) -> Iterator[Row]:
    """Yield rows with exactly the points in the store, ordered by time.

    If the rows hold the last point of a curve in the store, the points before it are right, and the points after it
    never reached the store. If they do not, the curve is read from the store. Points that a full backlog has dropped
    may remain until the next start.

    Args:
        rows: returns the rows of the present journal, at each call.
    """
    last, read, history = recorded
    found = {c for row in rows() for c in row.values if last.get(c) == (row.step, row.time)} - set(read)
    points = [p for c in last if c not in found for p in (read[c] if c in read else history(c)) if p.step <= last[c][0]]
    kept = (Row(t, s, {c: v for c, v in old.items() if c in found and s <= last[c][0]}) for t, s, old in rows())
    fetched = joined(sorted(points, key=lambda p: (p.time, p.step)))
    merged = groupby(heapq.merge(kept, fetched, key=_when), key=_when)
    rows_of = (Row(t, s, {c: v for row in same for c, v in row.values.items()}) for (t, s), same in merged)
    return (row for row in rows_of if row.values)


def joined(points: Iterable[Point]) -> Iterator[Row]:
    """Join neighbouring points of one step and time into a row."""
    for (t, step), same in groupby(points, key=lambda p: (p.time, p.step)):
        yield Row(t, step, {p.curve: p.value for p in same})


def read(path: Path) -> Iterator[Row]:
    """Yield the rows of a journal, if it exists, up to the first damaged line, as a killed process may leave one."""
    damage = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
    with contextlib.suppress(FileNotFoundError, *damage), open(path, "rb") as file:
        for line in file:
            values = json.loads(line)
            row = Row(round(1000 * values.pop("time")), values.pop("step"), values)
            if type(row.step) is not int or not all(v is None or type(v) in (int, float) for v in values.values()):
                raise ValueError
            yield row


def to_line(row: Row) -> bytes:
    """Return a row as JSON, with the end of the line."""
    finite = {c: v if v is not None and v - v == 0 else None for c, v in row.values.items()}
    return json.dumps({"step": row.step, "time": row.time / 1000, **finite}, allow_nan=False).encode() + b"\n"


class Journal:
    """Writes the journal; `append` never waits for remote storage.

    On a local file system the file itself grows. It is replaced at the start, so that an older attempt that still
    writes does not write into it. In remote storage the whole file is published at most once a minute. Storage that
    fails is retried.

    Args:
        url: of the file.
        warn: prints a line for the user; called in any thread.
        guard: called in the background thread before each publication; it may wait, or raise to stop all writing.
    """

    def __init__(
        self, url: str, warn: Callable[[str], None] = print, guard: Callable[[], object] = lambda: None
    ) -> None:
        self._url, self._warn, self._guard = url, warn, guard
        self._local = storage.is_local(url)
        self._changed = threading.Condition()
        self._file: Any = None  # open once it agrees with the store
        self._waiting = bytearray()
        self._written, self._published = 0, -1  # bytes
        self._not_before = 0.0
        self._urgent = self._failing = self._closed = self._abandoned = False
        self._over = self._refused = False  # the background work is over; the guard has stopped it
        self._thread: threading.Thread | None = None

    def begin(self, recorded: Recorded) -> None:
        """Make the file agree with the store, in the background. Appended points wait for it."""
        self._thread = threading.Thread(target=self._work, args=(recorded,), daemon=True, name="journal")
        self._thread.start()

    def append(self, points: Iterable[Point]) -> None:
        """Add points that the store will receive."""
        with self._changed:
            self._waiting += b"".join(to_line(row) for row in joined(points))
            self._write()

    def flush(self, seconds: float) -> None:
        """Wait for at most `seconds` until all is written and published, and not for storage that fails."""
        with self._changed:
            self._urgent = True
            self._write()
            self._changed.wait_for(lambda: self._failing or self._settled(), seconds)
            self._urgent = False

    def close(self, seconds: float) -> None:
        """Wait as `flush` does, then write no more."""
        with self._changed:
            self._closed = self._urgent = True
            self._write()
        if self._thread is not None:
            self._thread.join(seconds)
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
            behind = bool(self._waiting) or (not self._local and self._published < self._written)
            if self._file is not None and not (self._thread and self._thread.is_alive()):
                self._file.close()
                self._file = None
        if behind and self._thread is not None and not self._refused:
            self._warn(f"{self._url} lacks the last points; the next attempt adds them from MLflow")

    def _work(self, recorded: Recorded) -> None:
        try:
            done = False
            while not done and self._pause():
                done = self._done(lambda: self._open(recorded))
            while not self._local and self._publication_is_due():
                self._done(self._publish)
        except Exception:  # raised by the guard, which the tracker reports
            self._refused = True
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _done(self, act: Callable[[], None]) -> bool:
        """Call `act`; return False if it fails, with one warning. Raises all that the guard raises."""
        self._guard()
        try:
            with storage.impatient():
                act()
        except Exception as e:
            self._not_before = time.monotonic() + _RETRY_SECONDS
            self._say_failing(e)
            with self._changed:
                self._changed.notify_all()
            return False
        self._failing = False
        return True

    def _open(self, recorded: Recorded) -> None:
        with tempfile.TemporaryDirectory() as folder:
            before = Path(storage.absolute(self._url)) if self._local else Path(folder, "before")
            if not self._local:
                with contextlib.suppress(FileNotFoundError):
                    storage.get_file(self._url, before)
            lines = map(to_line, agreed(lambda: read(before), recorded))
            if self._local:
                storage.write_pieces(self._url, lambda: lines)
                file: Any = open(before, "ab", buffering=0)  # noqa: SIM115
            else:
                file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # deleted by the system, even after SIGKILL
                file.writelines(lines)
        with self._changed:
            self._file, self._written = file, os.fstat(file.fileno()).st_size
            self._write()

    def _write(self) -> None:
        """Write the waiting lines into the local file; bytes that do not fit on the disk keep waiting."""
        try:
            while self._waiting and self._file is not None:
                n = self._file.write(self._waiting)
                del self._waiting[:n]
                self._written += n
        except OSError as e:
            self._say_failing(e)
        else:
            if self._local and self._file is not None:
                self._failing = False
        self._changed.notify_all()

    def _publication_is_due(self) -> bool:
        """Wait until a publication is due; return False if there will be none."""
        with self._changed:
            while not self._abandoned:
                behind = self._published < self._written
                if self._closed and not behind:
                    break
                wait = 0.0 if self._urgent and not self._failing else self._not_before - time.monotonic()
                if behind and wait <= 0:
                    return True
                self._changed.wait(wait if behind else None)
            return False

    def _publish(self) -> None:
        began, size = time.monotonic(), self._written
        storage.write_pieces(self._url, lambda: _content(self._file.fileno(), size))
        took = time.monotonic() - began
        with self._changed:
            self._published = size
            self._not_before = time.monotonic() + max(_PUBLISH_SECONDS, _PUBLISH_SHARE * took)
            self._changed.notify_all()

    def _pause(self) -> bool:
        """Wait until the next try is due; return False when nobody waits for it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._abandoned, max(0.0, self._not_before - time.monotonic()))
            return not self._abandoned

    def _settled(self) -> bool:
        written = self._file is not None and not self._waiting
        return self._thread is None or self._over or (written and (self._local or self._published >= self._written))

    def _say_failing(self, e: Exception) -> None:
        if not self._failing:
            self._warn(f"{self._url} cannot be written ({cause_line(e)}); will keep trying")
        self._failing = True


def _when(row: Row) -> tuple[int, int]:
    return row.time, row.step


def _content(descriptor: int, size: int) -> Iterator[bytes]:
    for start in range(0, size, _READ_BYTES):
        yield os.pread(descriptor, min(_READ_BYTES, size - start), start)
