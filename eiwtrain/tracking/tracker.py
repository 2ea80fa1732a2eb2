"""Logging into an MLflow run from a background thread, which training never waits for. Not for its begin and end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from eiwtrain.tracking.backlog import CHUNK, MOST_POINTS, Backlog, Picture, Point
from eiwtrain.tracking.journal import Journal, Recorded
from eiwtrain.tracking.store import TrackedRun, cause_line, client, refused

if TYPE_CHECKING:
    from PIL.Image import Image

_RETRY_SECONDS = 5.0
_FLUSH_SECONDS = 5.0
_DRAIN_SECONDS = 60.0  # for which a closing tracker waits for a server that is away


class Tracker:
    """Logs into a run from a background thread: each step of a curve once and in order, after any number of retries.

    A store that is away, locked or full is retried until it is back; training never waits for it. After a failure the
    same points are sent again, whether or not the store had taken them: MLflow's databases keep one of points that
    are equal in curve, step, time and value. Steps that an earlier attempt has logged are skipped.

    Args:
        run: where to log.
        warn: prints a line for the user; called in the background thread.
        guard: called in the background thread before each write; it may wait, or raise to stop all writing.
        backlog: the `pending` points in the checkpoint from which this attempt resumes.
        journal: URL of a file that receives the same points.
    """

    def __init__(
        self,
        run: TrackedRun,
        warn: Callable[[str], None] = print,
        guard: Callable[[], object] = lambda: None,
        backlog: Mapping[str, Any] | None = None,
        journal: str | None = None,
    ) -> None:
        self._run, self._warn, self._guard = run, warn, guard
        self._client: Any = None  # made in the thread: the import of MLflow and SQLAlchemy takes seconds
        self._backlog = Backlog(backlog)
        self._journal = Journal(journal, warn, guard) if journal is not None else None
        self._refused: set[str] = set()  # curves that the store refuses
        self._away = self._full = self._closed = False
        self._untaken = ""
        self._image_failures = self._caught_up = 0  # failures in a row; points logged since the store was away
        self._thread = threading.Thread(target=self._work, daemon=True, name="tracker")
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Queue one point of each named curve."""
        now = int(time.time() * 1000)
        self._backlog.put(points=[Point(curve, step, now, float(value)) for curve, value in values.items()])
        if self._backlog.dropped and not self._full:
            self._full = True
            self._warn(f"MLflow at {self._run.uri}: more than {MOST_POINTS:,} points wait; the oldest are dropped")

    def image(self, step: int, name: str, image: Image) -> None:
        """Queue an image, which the UI shows under its step. Only the newest few of the waiting images are kept."""
        self._backlog.put(picture=Picture(name, step, image))

    def tags(self, values: Mapping[str, str]) -> None:
        """Queue tags, e.g. the URL of the newest checkpoint."""
        self._backlog.put(tags=values)

    def pending(self) -> dict[str, Any]:
        """Return all that the store has not confirmed, as JSON: the `backlog` of the attempt that resumes from here.

        Waiting images are named, not held. Usually empty, and never more than a few MB.
        """
        return self._backlog.to_json()

    def flush(self) -> None:
        """Wait until the queue is logged, for at most `_FLUSH_SECONDS`, and not for a store that is away."""
        end = time.monotonic() + _FLUSH_SECONDS
        self._backlog.wait(_FLUSH_SECONDS, lambda: self._away or self._image_failures > 1)
        if self._journal is not None:
            self._journal.flush(max(0.0, end - time.monotonic()))

    def lost_images(self, step: int) -> bool:
        """Return whether an earlier attempt had images of this step that the store had not confirmed."""
        return any(s == step for _, s in self._backlog.lost_pictures)

    def close(self, patience: float | None = None) -> str:
        """Wait until the queue is logged, for at most `patience` seconds (default: a minute). May be called twice.

        Returns:
            what the store did not take, in words; empty if it took all.
        """
        if self._closed:
            return self._untaken
        self._closed = True
        patience = _DRAIN_SECONDS if patience is None else patience
        end = time.monotonic() + patience
        self._backlog.close()
        self._thread.join(patience)
        points, images = self._backlog.waiting
        self._backlog.abandon()
        if points or images:
            self._untaken = f"{points:,} points and {images} images"
            self._warn(f"MLflow at {self._run.uri} did not take {self._untaken}")
        if self._journal is not None:
            self._journal.close(max(end - time.monotonic(), min(patience, _FLUSH_SECONDS)))
        return self._untaken

    def _work(self) -> None:
        try:
            self._client = client(self._run.uri)
            if self._until_done(self._look) is not None:
                self._backlog.skip_logged({}, {})
            while (chunk := self._backlog.take()) is not None:
                if chunk.picture is not None:
                    self._log_picture(chunk.picture)
                    continue
                self._log_points(chunk.points) if chunk.points else self._log_tags(chunk.tags)
                self._backlog.done()
                self._say_back(len(chunk.points))
        except _GivenUp:
            pass
        except Exception as e:
            self._warn(f"nothing more is written to MLflow run {self._run.run_id}: {cause_line(e)}")
        finally:
            self._backlog.abandon()

    def _look(self) -> None:
        """Find out what earlier attempts have logged, by one call, and one more for each curve that may have a gap."""
        run = self._client.get_run(self._run.run_id)
        newest = {
            m.key: (m.step, m.timestamp) for m in run.data._metric_objs
        }  # the point with the highest step of each
        last = {curve: step for curve, (step, _) in newest.items()}
        doubtful = {p.curve for p in self._backlog.earlier if p.step <= last.get(p.curve, -1)}
        logged = {curve: self._history(curve) for curve in doubtful}
        steps = {curve: {p.step for p in points} for curve, points in logged.items()}
        if self._journal is not None:
            self._journal.begin(Recorded(newest, logged, self._history))
        self._backlog.skip_logged(last, steps, self._journal.append if self._journal is not None else None)
        with contextlib.suppress(Exception):  # curves do not wait for a store of images that is away
            lost = [f"{n} of step {s:,}" for n, s in self._backlog.lost_pictures if not self._files(n, s)]
            if lost:
                self._warn(f"images that the last attempt could not log: {', '.join(lost)}")

    def _history(self, curve: str) -> list[Point]:
        history = self._client.get_metric_history(self._run.run_id, curve)
        return [Point(curve, m.step, m.timestamp, m.value) for m in history]

    def _log_points(self, points: list[Point]) -> None:
        """Log points; if the store refuses them, log each half, so that only the refused curve is lost."""
        from mlflow.entities import Metric

        wanted = [p for p in points if p.curve not in self._refused]
        if not wanted:
            return
        metrics = [Metric(p.curve, p.value, p.time, p.step) for p in wanted]
        refusal = self._until_done(lambda: self._client.log_batch(self._run.run_id, metrics=metrics, synchronous=True))
        if refusal is not None and len(wanted) > 1:
            self._log_points(wanted[: len(wanted) // 2])
            self._log_points(wanted[len(wanted) // 2 :])
        elif refusal is not None:
            self._refused.add(wanted[0].curve)
            self._warn(f"MLflow at {self._run.uri} refused {wanted[0].curve!r}: {cause_line(refusal)}")

    def _log_tags(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(f"eiwtrain.{key}", value) for key, value in values.items()]
        refusal = self._until_done(lambda: self._client.log_batch(self._run.run_id, tags=tags, synchronous=True))
        if refusal is not None:
            self._warn(f"MLflow at {self._run.uri} refused tags: {cause_line(refusal)}")

    def _log_picture(self, picture: Picture) -> None:
        """Log an image, or put it back: curves do not wait for a store of images that is away."""
        name, step, image = picture
        self._guard()
        try:
            files = self._files(name, step)
            if not files:
                self._client.log_image(self._run.run_id, image, key=name, step=step, synchronous=True)
            elif len(files) == 1:  # an attempt failed after the first of the image's two files
                preview = files[0].removesuffix(".png") + "+compressed.webp"
                self._client.log_image(self._run.run_id, image, artifact_file=preview)
                self._client.set_tag(self._run.run_id, "mlflow.loggedImages", True)
        except Exception as e:
            if isinstance(e, (ValueError, TypeError)) or refused(e):
                self._warn(f"MLflow at {self._run.uri} refused image {name!r}: {cause_line(e)}")
                self._backlog.done()
                return
            self._see_that_the_run_is_there()  # which waits for the tracking store, if that is away too
            self._image_failures += 1
            if self._image_failures == 2:
                self._warn(f"MLflow at {self._run.uri} does not take images ({cause_line(e)}); will keep trying")
            self._backlog.put_back(_RETRY_SECONDS if self._image_failures > 1 else 0.0)
        else:
            self._backlog.done()
            if self._image_failures > 1:
                self._warn("MLflow takes images again")
            self._image_failures = 0

    def _files(self, name: str, step: int) -> list[str]:
        """Return the artifacts of an image that was logged under `name` and `step`: first a PNG, then a preview."""
        prefix = f"images/{name.replace('/', '~')}+step+{step}+"
        return sorted(
            f.path for f in self._client.list_artifacts(self._run.run_id, "images") if f.path.startswith(prefix)
        )

    def _until_done(self, act: Callable[[], object]) -> Exception | None:
        """Call `act` until the store answers; return its refusal, if it refuses. Warn at the second failure in a row.

        Raises:
            _GivenUp: the run was deleted, or nobody waits for the tracker any more.
        """
        failed = False
        while True:
            self._guard()
            try:
                act()
            except Exception as e:
                if refused(e):
                    self._see_that_the_run_is_there()
                    return e
                if failed and not self._away:
                    self._away = True
                    self._warn(f"MLflow at {self._run.uri} is away ({cause_line(e)}); will keep trying")
                    self._backlog.touch()
                if failed and not self._backlog.pause(_RETRY_SECONDS):
                    raise _GivenUp from None
                failed = True
            else:
                return None

    def _see_that_the_run_is_there(self) -> None:
        there = True

        def look() -> None:
            nonlocal there
            try:
                there = self._client.get_run(self._run.run_id).info.lifecycle_stage == "active"
            except Exception as e:
                if not refused(e):
                    raise
                there = False

        self._until_done(look)
        if not there:
            self._warn(f"MLflow run {self._run.run_id} was deleted: nothing more is logged")
            raise _GivenUp

    def _say_back(self, points: int) -> None:
        """Report that the store is back, once all points that waited are logged."""
        self._caught_up += points if self._away else 0
        if self._away and self._backlog.waiting[0] < CHUNK:
            dropped = f", {self._backlog.dropped:,} were dropped" if self._backlog.dropped else ""
            self._warn(f"MLflow is back; {self._caught_up:,} points caught up{dropped}")
            self._away, self._full, self._caught_up, self._backlog.dropped = False, False, 0, 0


class _GivenUp(Exception):
    """The background thread has nothing more to do."""
