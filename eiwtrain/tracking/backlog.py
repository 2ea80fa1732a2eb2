"""What a run has measured and its tracking store has not confirmed: kept in order, bounded, and written down.

Points of curves, tags and images wait here between the training loop and the thread that logs them. What waits goes
into a checkpoint as JSON, so that the points of an attempt that died before it could log them reach the store by the
next. Nothing here knows how or where things are logged.
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

BATCH = 1000  # points taken at once
MOST_POINTS = 100_000  # that wait: about 10 MB of memory, and 5 MB of JSON
MOST_IMAGES = 6  # that wait: the newest, of two evaluations
_GATHER_SECONDS = 5.0  # how long points wait for others to be logged with


class Point(NamedTuple):
    """One point of a curve. A store that is given the same four again shall keep one."""

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
class Batch:
    """What is to be logged next: one kind of things at a time, whichever is not empty."""

    points: list[Point] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    picture: Picture | None = None


class Backlog:
    """A queue between one thread that puts and one that takes.

    What was taken counts as waiting until `done` is called.

    Args:
        saved: what `to_json` of an earlier attempt gave; it comes first. The images it names are not in it:
            `lost_pictures` has their names and steps.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        saved = saved or {}
        self._changed = threading.Condition()
        self.earlier = [Point(k, step, t, float(v)) for step, t, curves in saved.get("points", ()) for k, v in curves]
        """Points of earlier attempts that the store may lack."""
        self.lost_pictures: list[tuple[str, int]] = [(name, step) for name, step in saved.get("images", ())]
        self.dropped = 0
        """Points that were dropped, the oldest first, because too many waited."""
        self._points: deque[Point] = deque()
        self._tags: dict[str, str] = dict(saved.get("tags", {}))
        self._pictures: deque[Picture] = deque(maxlen=MOST_IMAGES)
        self._taken: Batch | None = None
        self._logged: dict[str, int] = {}
        self._accepted: Callable[[list[Point]], None] | None = None
        self._since = time.monotonic()  # when the oldest of what waits came
        self._pictures_after = 0.0
        self._hurry = self._closed = self._abandoned = False

    def put(
        self, points: Collection[Point] = (), tags: Mapping[str, str] | None = None, picture: Picture | None = None
    ) -> None:
        """Queue points that are beyond what is logged already, tags (the newest value of each counts), an image."""
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

    def reconcile(
        self,
        last: Mapping[str, int],
        logged: Mapping[str, Collection[int]],
        accepted: Callable[[list[Point]], None] | None = None,
    ) -> None:
        """Forget what the store has: call it once, before the first `take`.

        Own points are passed over up to the last step that the store has of their curve. Earlier ones are looked up
        one by one, because the store may have a gap where they belong.

        Args:
            last: the last step of every curve that the store has.
            logged: all steps of those curves that have an earlier point at or before their last step.
            accepted: is given all points that wait now, and from then on those of each `put` that are not passed over,
                whether or not they are dropped later; it must not wait.
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

    def take(self) -> Batch | None:
        """Wait for a batch worth a call; None when the backlog is closed and empty, or given up."""
        with self._changed:
            while not self._abandoned:
                now = time.monotonic()
                urgent = self._hurry or self._closed or now >= self._since + _GATHER_SECONDS
                if len(self._points) >= BATCH or (self._points and urgent):
                    self._since = now
                    self._taken = Batch(points=[self._points.popleft() for _ in range(min(BATCH, len(self._points)))])
                elif self._tags and urgent:
                    self._taken, self._tags = Batch(tags=self._tags), {}
                elif self._pictures and now >= self._pictures_after:
                    self._taken = Batch(picture=self._pictures.popleft())
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
        """What was taken last is logged, or refused for good."""
        with self._changed:
            self._taken = None
            self._changed.notify_all()

    def put_back(self, seconds: float) -> None:
        """The image that was taken last is to be tried again after a while, unless newer ones fill its place."""
        with self._changed:
            picture = self._taken.picture if self._taken is not None else None
            if picture is not None and len(self._pictures) < MOST_IMAGES:
                self._pictures.appendleft(picture)
            self._taken = None
            self._pictures_after = time.monotonic() + seconds
            self._changed.notify_all()

    def wait(self, seconds: float, enough: Callable[[], bool]) -> None:
        """Hurry what waits, and return when all of it is logged or `enough()`, which is asked at each change."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._empty() or enough(), seconds)
            self._hurry = False

    def touch(self) -> None:
        """Have a `wait` ask again whether it is enough."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """No more is put; what waits is taken at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """Forget all that waits, and whatever comes."""
        with self._changed:
            self._abandoned = True
            self.earlier, self._taken, self._tags = [], None, {}
            self._points.clear()
            self._pictures.clear()
            self._changed.notify_all()

    def pause(self, seconds: float) -> bool:
        """Sleep; False, and at once, when the backlog was given up."""
        with self._changed:
            return not self._changed.wait_for(lambda: self._abandoned, seconds)

    @property
    def waiting(self) -> tuple[int, int]:
        """Number of points and of images that are not logged."""
        with self._changed:
            pictures = len(self._pictures) + (self._taken is not None and self._taken.picture is not None)
            taken = len(self._taken.points) if self._taken is not None else 0
            return taken + len(self.earlier) + len(self._points), pictures

    def to_json(self) -> dict[str, Any]:
        """What is not logged, for a later attempt: `points` as [step, time, [[curve, value], ...]], `tags`, and of
        `images` name and step alone. Numbers that JSON does not know are strings. Empty when nothing waits."""
        with self._changed:
            points, taken = self._all_points(), self._taken or Batch()
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
