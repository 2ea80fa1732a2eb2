"""A bounded queue of measurements that the tracking store has not confirmed. Not for how or where they are logged.

Points of curves, tags and images wait here, in order, between the training loop and the thread that logs them. A
checkpoint holds the queue as JSON: if an attempt dies before it has logged its points, the next attempt logs them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from sys import intern
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK = 1000  # points taken at once
MOST_POINTS = 100_000  # in the queue: about 10 MB of memory, and 5 MB of JSON
MOST_IMAGES = 6  # in the queue: the newest, from two evaluations
_GATHER_SECONDS = 5.0  # for which points wait, to be logged together with later ones


class Point(NamedTuple):
    """One point of a curve. A store that receives an equal point again must keep one of them."""

    curve: str
    step: int
    time: int
    """Unix time in milliseconds."""
    value: float


class Picture(NamedTuple):
    """An image and the step it shows."""

    name: str
    step: int
    image: Image


@dataclass(frozen=True)
class Chunk:
    """The next things to log: points, tags or a picture; the other two fields are empty."""

    points: list[Point] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    picture: Picture | None = None


class Backlog:
    """A queue between one thread that puts and one that takes.

    A chunk that was taken still counts as waiting until `done` is called.

    Args:
        saved: the `to_json` of an earlier attempt; its points come first. It names images without holding them:
            `lost_pictures` has their names and steps.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        saved = saved or {}
        self._changed = threading.Condition()
        self.earlier = [Point(k, step, t, float(v)) for step, t, curves in saved.get("points", ()) for k, v in curves]
        """Points of earlier attempts that may be missing in the store."""
        self.lost_pictures: list[tuple[str, int]] = [(name, step) for name, step in saved.get("images", ())]
        self.dropped = 0
        """Number of points that were dropped, the oldest first, because too many waited."""
        self._points: deque[Point] = deque()
        self._tags: dict[str, str] = dict(saved.get("tags", {}))
        self._pictures: deque[Picture] = deque(maxlen=MOST_IMAGES)
        self._taken: Chunk | None = None
        self._logged: dict[str, int] = {}
        self._accepted: Callable[[list[Point]], None] | None = None
        self._since = time.monotonic()  # when the oldest waiting entry was put
        self._pictures_after = 0.0
        self._hurry = self._closed = self._abandoned = False

    def put(
        self, points: Collection[Point] = (), tags: Mapping[str, str] | None = None, picture: Picture | None = None
    ) -> None:
        """Queue points of steps that are not logged yet, tags (the newest value of each counts), and an image."""
        with self._changed:
            if self._abandoned:
                return
            if not self._points and not self._tags:
                self._since = time.monotonic()
            new = [p._replace(curve=intern(p.curve)) for p in points if p.step > self._logged.get(p.curve, -1)]
            self._points.extend(new)
            if self._accepted is not None:
                self._accepted(new)
            self._tags.update(tags or {})
            if picture is not None:
                self._pictures.append(picture)
            while self._points and len(self.earlier) + len(self._points) > MOST_POINTS:
                self._points.popleft()
                self.dropped += 1
            self._changed.notify_all()

    def skip_logged(
        self,
        last: Mapping[str, int],
        logged: Mapping[str, Collection[int]],
        accepted: Callable[[list[Point]], None] | None = None,
    ) -> None:
        """Skip the points that the store has already. Call it once, before the first `take`.

        A point of this attempt is skipped up to the last step that the store has of its curve. Points of earlier
        attempts are looked up one by one, because the store may have a gap where they belong.

        Args:
            last: the last step of every curve in the store.
            logged: all steps of each curve of which an earlier point is at or before the last step.
            accepted: receives all points that wait now, and later the points of each `put` that are not skipped,
                even if they are dropped afterwards; it must not wait.
        """
        with self._changed:
            missing = [p for p in self.earlier if p.step not in logged.get(p.curve, ())]
            self._logged = dict(last)
            for p in self.earlier:
                self._logged[p.curve] = max(p.step, self._logged.get(p.curve, -1))
            own = (p for p in self._points if p.step > self._logged.get(p.curve, -1))
            self._points = deque([*missing, *own])
            self.earlier = []
            self._accepted = accepted
            if accepted is not None:
                accepted(list(self._points))
            self._changed.notify_all()

    def take(self) -> Chunk | None:
        """Wait for a chunk that is worth a call. Return None once the backlog is closed and empty, or abandoned."""
        with self._changed:
            while not self._abandoned:
                now = time.monotonic()
                urgent = self._hurry or self._closed or now >= self._since + _GATHER_SECONDS
                if len(self._points) >= CHUNK or (self._points and urgent):
                    self._since = now
                    self._taken = Chunk(points=[self._points.popleft() for _ in range(min(CHUNK, len(self._points)))])
                elif self._tags and urgent:
                    self._taken, self._tags = Chunk(tags=self._tags), {}
                elif self._pictures and now >= self._pictures_after:
                    self._taken = Chunk(picture=self._pictures.popleft())
                elif self._closed and not self._pictures:
                    return None
                else:
                    due = [self._since + _GATHER_SECONDS] if self._points or self._tags else []
                    due += [self._pictures_after] if self._pictures else []
                    self._changed.wait(max(0.0, min(due) - now) if due else None)
                    continue
                return self._taken
            return None

    def done(self) -> None:
        """Report that the chunk taken last is logged, or refused for good."""
        with self._changed:
            self._taken = None
            self._changed.notify_all()

    def put_back(self, seconds: float) -> None:
        """Put the image that was taken last back, to be tried after `seconds`, unless newer ones fill its place."""
        with self._changed:
            picture = self._taken.picture if self._taken is not None else None
            if picture is not None and len(self._pictures) < MOST_IMAGES:
                self._pictures.appendleft(picture)
            self._taken = None
            self._pictures_after = time.monotonic() + seconds
            self._changed.notify_all()

    def wait(self, seconds: float, enough: Callable[[], bool]) -> None:
        """Have all that waits logged at once. Return when it is, or when `enough()`, which is called at each change."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._empty() or enough(), seconds)
            self._hurry = False

    def touch(self) -> None:
        """Have `wait` call its `enough` again."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Announce that nothing more will be put; all that waits can then be taken at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """Drop all that waits, and everything that is put later."""
        with self._changed:
            self._abandoned = True
            self.earlier, self._taken, self._tags = [], None, {}
            self._points.clear()
            self._pictures.clear()
            self._changed.notify_all()

    def pause(self, seconds: float) -> bool:
        """Sleep; return False, at once, when the backlog is abandoned."""
        with self._changed:
            return not self._changed.wait_for(lambda: self._abandoned, seconds)

    @property
    def waiting(self) -> tuple[int, int]:
        """Number of points and number of images that are not logged."""
        with self._changed:
            pictures = len(self._pictures) + (self._taken is not None and self._taken.picture is not None)
            taken = len(self._taken.points) if self._taken is not None else 0
            return taken + len(self.earlier) + len(self._points), pictures

    def to_json(self) -> dict[str, Any]:
        """Return all that is not logged, for a later attempt; empty when nothing waits.

        `points` are [step, time, [[curve, value], ...]], with NaN and infinities as strings, `tags` a mapping, and
        `images` [name, step].
        """
        with self._changed:
            points, taken = self._all_points(), self._taken or Chunk()
            tags = taken.tags | self._tags
            pictures = [p for p in (taken.picture, *self._pictures) if p is not None]
        groups = groupby(points, key=lambda p: (p.step, p.time))
        rows = [[step, t, [[p.curve, _number(p.value)] for p in group]] for (step, t), group in groups]
        saved = {"points": rows, "tags": tags, "images": [[p.name, p.step] for p in pictures]}
        return {kind: content for kind, content in saved.items() if content}

    def _all_points(self) -> list[Point]:
        return [*(self._taken.points if self._taken is not None else ()), *self.earlier, *self._points]

    def _empty(self) -> bool:
        return not (self._taken or self.earlier or self._points or self._tags or self._pictures)


def _number(value: float) -> float | str:
    return value if value - value == 0 else str(value)  # "nan", "inf", "-inf": float() reads them
