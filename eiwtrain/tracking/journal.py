"""The curves of a run as a file of JSON lines beside its checkpoints: the points that MLflow has, for pandas and jq.

A line holds points that were measured together: `{"step": 120, "time": 1763847222.123, CURVE: 0.001, ...}`, with
Unix time in seconds; a value that is not finite is null. Nothing is read from the file to go on: what MLflow has
decides, and a file that differs is put right. Not for images and tags.
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
_PUBLISH_SHARE = 20.0  # and so many times as long as the last one took
_CHUNK = 1 << 20  # bytes a read


class Row(NamedTuple):
    """A line of the journal: points of one step and time."""

    time: int
    """Unix time in milliseconds, as MLflow has it."""
    step: int
    values: dict[str, float | None]


class Recorded(NamedTuple):
    """What the tracking store has, as of now."""

    last: Mapping[str, tuple[int, int]]
    """(step, time) of the last point of each curve."""
    read: Mapping[str, list[Point]]
    """All points of the curves that have been read already, and may have had a gap."""
    history: Callable[[str], list[Point]]
    """Reads all points of a curve."""


def agreed(rows: Callable[[], Iterable[Row]], recorded: Recorded) -> Iterator[Row]:
    """Rows with exactly the points that the store has, in the order of their times. Points that a full backlog has
    dropped may be there besides, until the next start.

    Where a curve's last point in the store is among the rows, those before it are right, and those behind it never
    reached the store. Where it is not, the curve is read from the store.

    Args:
        rows: gives the rows of the journal as it is, each time it is called.
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
    """Neighbours of one step and time as one row."""
    for (t, step), same in groupby(points, key=lambda p: (p.time, p.step)):
        yield Row(t, step, {p.curve: p.value for p in same})


def read(path: Path) -> Iterator[Row]:
    """The rows of a journal, up to the first that is not whole, as the last one of a killed process; none where there
    is no file."""
    damage = (ValueError, KeyError, TypeError, AttributeError, OverflowError)
    with contextlib.suppress(FileNotFoundError, *damage), open(path, "rb") as file:
        for line in file:
            values = json.loads(line)
            row = Row(round(1000 * values.pop("time")), values.pop("step"), values)
            if type(row.step) is not int or not all(v is None or type(v) in (int, float) for v in values.values()):
                raise ValueError
            yield row


def to_line(row: Row) -> bytes:
    """A row as JSON, with the end of the line."""
    finite = {c: v if v is not None and v - v == 0 else None for c, v in row.values.items()}
    return json.dumps({"step": row.step, "time": row.time / 1000, **finite}, allow_nan=False).encode() + b"\n"


class Journal:
    """Writes the journal; `append` waits for a local file system alone.

    On a local file system the file itself grows, and it is replaced at the start, so that another attempt that still
    writes does not write into it. In remote storage it is published whole, at most once a minute. Storage that fails is
    tried again.

    Args:
        url: of the file.
        warn: is given a line for people, from any thread.
        guard: called in the background thread before each publication; it may wait, or raise to end all writing.
    """

    def __init__(
        self, url: str, warn: Callable[[str], None] = print, guard: Callable[[], object] = lambda: None
    ) -> None:
        self._url, self._warn, self._guard = url, warn, guard
        self._local = storage.is_local(url)
        self._changed = threading.Condition()
        self._file: Any = None  # once it agrees with the store
        self._waiting = bytearray()
        self._written, self._published = 0, -1  # bytes
        self._not_before = 0.0
        self._urgent = self._failing = self._closed = self._abandoned = False
        self._over = self._refused = False  # the background work, and by the guard
        self._thread: threading.Thread | None = None

    def begin(self, recorded: Recorded) -> None:
        """Make the file agree with what the store has, in the background. What is appended waits for it."""
        self._thread = threading.Thread(target=self._work, args=(recorded,), daemon=True, name="journal")
        self._thread.start()

    def append(self, points: Iterable[Point]) -> None:
        """Add points that the store is going to have."""
        with self._changed:
            self._waiting += b"".join(to_line(row) for row in joined(points))
            self._write()

    def flush(self, seconds: float) -> None:
        """Wait until all is written, and published, at most so long, and not for storage that fails."""
        with self._changed:
            self._urgent = True
            self._write()
            self._changed.wait_for(lambda: self._failing or self._settled(), seconds)
            self._urgent = False

    def close(self, seconds: float) -> None:
        """As `flush`, for the last time."""
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
        except Exception:  # the guard's, of which the tracker tells
            self._refused = True
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _done(self, act: Callable[[], None]) -> bool:
        """Act; False if it failed, which is told once. Raises what the guard raises."""
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
                file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # nothing stays of it, even after SIGKILL
                file.writelines(lines)
        with self._changed:
            self._file, self._written = file, os.fstat(file.fileno()).st_size
            self._write()

    def _write(self) -> None:
        """What waits, into the local file; what does not fit on the disk goes on waiting."""
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
        """Wait for one; False if there will be none."""
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
        """Wait until it may be tried again; False when nobody waits for it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._abandoned, max(0.0, self._not_before - time.monotonic()))
            return not self._abandoned

    def _settled(self) -> bool:
        written = self._file is not None and not self._waiting
        return self._thread is None or self._over or (written and (self._local or self._published >= self._written))

    def _say_failing(self, e: Exception) -> None:
        if not self._failing:
            self._warn(f"{self._url} cannot be written ({cause_line(e)}); will go on trying")
        self._failing = True


def _when(row: Row) -> tuple[int, int]:
    return row.time, row.step


def _content(descriptor: int, size: int) -> Iterator[bytes]:
    for start in range(0, size, _CHUNK):
        yield os.pread(descriptor, min(_CHUNK, size - start), start)
