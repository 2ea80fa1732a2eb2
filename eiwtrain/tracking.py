"""MLflow, and nothing but MLflow: one run per run name, found again; metrics that never hold training up.

The driver begins and ends the run; rank 0 logs into it. Checkpoints and models are referred to by URL, not uploaded.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eiwtrain import storage
from eiwtrain.backlog import BATCH, MOST_POINTS, Backlog, Picture, Point
from eiwtrain.config import Config, flatten

if TYPE_CHECKING:
    from PIL.Image import Image

Status = Literal["FINISHED", "FAILED", "KILLED"]  # KILLED: stopped before its end, goes on with the same command

_UID_TAG = "eiwtrain.uid"
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # model training, not GenAI
_STATUS_TAG = "eiwtrain.status"
_STATUS_TEXT: dict[Status, str] = {
    "FINISHED": "finished",
    "FAILED": "failed",
    "KILLED": "stopped; goes on with the same command",
}
_RETRY_SECONDS = 5.0
_FLUSH_SECONDS = 5.0
_DRAIN_SECONDS = 60.0  # how long a closing tracker waits for a server that is away
_BEGIN_SECONDS = 5.0  # how long a beginning run does: somebody may be waiting for the answer
_END_SECONDS = 30.0  # and an ending one
_AGAIN_SECONDS = 1.0


class TrackingError(RuntimeError):
    """The tracking server or database cannot be used; one line with the URI and the cause."""


@dataclass(frozen=True)
class TrackedRun:
    """Where a run is recorded."""

    uri: str
    experiment_id: str
    run_id: str

    @property
    def view_command(self) -> str:
        """The command that opens the MLflow UI on this run's store; empty when a server has it already."""
        if self.uri.startswith("http"):
            return ""
        mlflow = Path(sys.executable).with_name("mlflow")
        return f"{shlex.quote(str(mlflow))} ui --backend-store-uri {shlex.quote(self.uri)} --port 5000"

    @property
    def url(self) -> str:
        """The run's page in the MLflow UI (for a local store: once `view_command` runs)."""
        server = self.uri.rstrip("/") if self.uri.startswith("http") else "http://127.0.0.1:5000"
        # the UI opens on GenAI unless the address says otherwise
        return f"{server}/#/experiments/{self.experiment_id}/runs/{self.run_id}?workflowType=machine_learning"


def tracking_uri(config: Config) -> str:
    """The MLflow tracking URI of a config: as given, or sqlite in the local storage folder."""
    return config.tracking.uri or f"sqlite:///{config.run.storage}/mlflow.db"


def check(config: Config) -> None:
    """See that the tracking store answers. A local database that is not there yet is not made.

    Raises:
        TrackingError: it does not.
    """
    uri = tracking_uri(config)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return
    client = _client(tracking_uri(config))
    try:
        client.search_experiments(max_results=1)
    except Exception as e:
        raise TrackingError(f"tracking.uri: {tracking_uri(config)} cannot be used: {_one_line(e)}") from None


def begin(config: Config, tags: Mapping[str, str]) -> TrackedRun:
    """Find the run of this config's name, or create it, mark it RUNNING and set `tags`.

    Its identity is a random id in `run.json` under the run's root, so a run whose folder was deleted begins anew and
    two storages never share one. Params are logged at creation and never again (MLflow has them immutable).

    Raises:
        TrackingError: the store cannot be used.
        storage.StorageError: `run.storage` cannot be used.
    """
    uri, uid = tracking_uri(config), _uid(config.root)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    client = _client(uri)
    begun: list[TrackedRun] = []
    try:
        return _patiently(_BEGIN_SECONDS, lambda: _begin(client, config, uid, tags, begun))
    except Exception as e:
        if begun:
            with contextlib.suppress(Exception):
                _terminate(begun[-1], "FAILED", f"failed: {_one_line(e)}")
        raise TrackingError(f"tracking.uri: {uri} cannot be used: {_one_line(e)}") from None


def _begin(client: Any, config: Config, uid: str, tags: Mapping[str, str], begun: list[TrackedRun]) -> TrackedRun:
    """One try, which finds what an earlier one has made; tells in `begun` of the run as soon as there is one."""
    from mlflow.entities import Param

    uri = tracking_uri(config)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        artifacts = None if uri.startswith("http") else _artifacts(config)
        experiment_id = client.create_experiment(
            config.tracking.experiment, artifact_location=artifacts, tags=_EXPERIMENT_TAGS
        )
    else:
        experiment_id = experiment.experiment_id
    found = client.search_runs([experiment_id], f"tags.`{_UID_TAG}` = '{uid}'", max_results=1)
    if found:
        run_id, has_params = found[0].info.run_id, bool(found[0].data.params)
        client.update_run(run_id, status="RUNNING")
    else:
        origin = {"mlflow.user": _user(), "mlflow.source.name": "eiwtrain.run"}
        run = client.create_run(experiment_id, run_name=config.run.name, tags=origin | {_UID_TAG: uid})
        run_id, has_params = run.info.run_id, False
    begun.append(TrackedRun(uri, experiment_id, run_id))
    if not has_params:
        params = [Param(name, str(value)) for name, value in flatten(config.model_dump(mode="json")).items()]
        client.log_batch(run_id, params=params, synchronous=True)
    for key, value in (dict(tags) | {_STATUS_TAG: "running"}).items():
        client.set_tag(run_id, key, value)
    client.log_dict(run_id, config.model_dump(mode="json"), "config.yaml")
    return begun[-1]


def end(run: TrackedRun, status: Status, detail: str = "") -> None:
    """Mark the run as ended, with `detail`, e.g. "stopped by SIGTERM", as its tag `eiwtrain.status`.

    A store that is away is tried again for half a minute; if it stays away that is reported, not raised.
    """
    try:
        _patiently(_END_SECONDS, lambda: _terminate(run, status, detail or _STATUS_TEXT[status]))
    except Exception as e:
        print(f"could not mark MLflow run {run.run_id} as {status}: {_one_line(e)}", file=sys.stderr)


def _terminate(run: TrackedRun, status: Status, detail: str) -> None:
    client = _client(run.uri)
    client.set_terminated(run.run_id, status)
    client.set_tag(run.run_id, _STATUS_TAG, detail)


def _patiently(seconds: float, act: Callable[[], Any]) -> Any:
    """What `act` returns; tried again for a while, unless the store answers that it will not."""
    end = time.monotonic() + seconds
    while True:
        try:
            return act()
        except Exception as e:
            if _refused(e) or time.monotonic() + _AGAIN_SECONDS > end:
                raise
            time.sleep(_AGAIN_SECONDS)


class Tracker:
    """Logs into a run from a background thread: each step of a curve once, in order, however often it must be tried.

    A store that is away, locked or full is tried again until it is back; training never waits for it. The same points
    are sent again after a failure, whether or not the store had taken them: MLflow's databases keep one of points that
    are alike in curve, step, time and value. Steps that an earlier attempt has logged are passed over.

    Attributes:
        error: what `guard` raised; from then on nothing is written.

    Args:
        run: where to log.
        warn: is given a line for people, from the background thread.
        guard: called in the background thread before each write; it may wait, or raise to end all writing.
        backlog: what `pending` gave to the checkpoint that this attempt goes on from.
    """

    def __init__(
        self,
        run: TrackedRun,
        warn: Callable[[str], None] = print,
        guard: Callable[[], object] = lambda: None,
        backlog: Mapping[str, Any] | None = None,
    ) -> None:
        self.error: Exception | None = None
        self._run, self._warn, self._guard = run, warn, guard
        self._client = _client(run.uri)
        self._backlog = Backlog(backlog)
        self._unwanted: set[str] = set()  # curves that the store refuses
        self._away = self._full = self._closed = False
        self._image_failures = self._caught_up = 0  # images: in a row
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
        """Queue an image, shown in the UI under its step. Of images that wait only the newest few are kept."""
        self._backlog.put(picture=Picture(name, step, image))

    def tags(self, values: Mapping[str, str]) -> None:
        """Queue tags, e.g. the URL of the newest checkpoint."""
        self._backlog.put(tags=values)

    def pending(self) -> dict[str, Any]:
        """What the store has not confirmed yet, as JSON: the `backlog` of the attempt that goes on from here. Of images
        it names those that wait, and does not hold them. Empty as a rule, never more than a few MB."""
        return self._backlog.to_json()

    def flush(self) -> None:
        """Wait until what was queued is logged, at most `_FLUSH_SECONDS`, and not for a store that is away."""
        self._backlog.wait(_FLUSH_SECONDS, lambda: self._away or self._image_failures > 1)

    def close(self, patience: float = _DRAIN_SECONDS) -> None:
        """Wait until what was queued is logged, at most so many seconds; closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._backlog.close()
        self._thread.join(patience)
        points, images = self._backlog.waiting
        self._backlog.abandon()
        if points or images:
            self._warn(f"MLflow at {self._run.uri} did not take {points:,} points and {images} images")

    def _work(self) -> None:
        try:
            if self._until_done(self._look) is not None:
                self._backlog.reconcile({}, {})
            while (batch := self._backlog.take()) is not None:
                if batch.picture is not None:
                    self._log_picture(batch.picture)
                    continue
                self._log_points(batch.points) if batch.points else self._log_tags(batch.tags)
                self._backlog.done()
                self._say_back(len(batch.points))
        except _GivenUp:
            pass
        except Exception as e:
            self.error = e
            self._warn(f"nothing more is written to MLflow run {self._run.run_id}: {_one_line(e)}")
        finally:
            self._backlog.abandon()

    def _look(self) -> None:
        """See what earlier attempts have logged. One call, and one more for each curve that may have a gap."""
        run = self._client.get_run(self._run.run_id)
        last = {m.key: m.step for m in run.data._metric_objs}  # of each curve the point with the highest step
        doubtful = {p.curve for p in self._backlog.earlier if p.step <= last.get(p.curve, -1)}
        logged = {c: {m.step for m in self._client.get_metric_history(self._run.run_id, c)} for c in doubtful}
        self._backlog.reconcile(last, logged)
        with contextlib.suppress(Exception):  # a place for images that is away does not hold up curves
            lost = [f"{n} of step {s:,}" for n, s in self._backlog.lost_pictures if not self._files(n, s)]
            if lost:
                self._warn(f"images that the last attempt could not log: {', '.join(lost)}")

    def _log_points(self, points: list[Point]) -> None:
        """Log a batch; where the store refuses it, log it by halves, to lose no more than what is refused."""
        from mlflow.entities import Metric

        wanted = [p for p in points if p.curve not in self._unwanted]
        if not wanted:
            return
        metrics = [Metric(p.curve, p.value, p.time, p.step) for p in wanted]
        refused = self._until_done(lambda: self._client.log_batch(self._run.run_id, metrics=metrics, synchronous=True))
        if refused is not None and len(wanted) > 1:
            self._log_points(wanted[: len(wanted) // 2])
            self._log_points(wanted[len(wanted) // 2 :])
        elif refused is not None:
            self._unwanted.add(wanted[0].curve)
            self._warn(f"MLflow at {self._run.uri} refused {wanted[0].curve!r}: {_one_line(refused)}")

    def _log_tags(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(f"eiwtrain.{key}", value) for key, value in values.items()]
        refused = self._until_done(lambda: self._client.log_batch(self._run.run_id, tags=tags, synchronous=True))
        if refused is not None:
            self._warn(f"MLflow at {self._run.uri} refused tags: {_one_line(refused)}")

    def _log_picture(self, picture: Picture) -> None:
        """Log an image, or put it back: a place for images that is away does not hold up curves."""
        name, step, image = picture
        self._guard()
        try:
            files = self._files(name, step)
            if not files:
                self._client.log_image(self._run.run_id, image, key=name, step=step, synchronous=True)
            elif len(files) == 1:  # of the two files of an image one was written when an attempt failed
                preview = files[0].removesuffix(".png") + "+compressed.webp"
                self._client.log_image(self._run.run_id, image, artifact_file=preview)
                self._client.set_tag(self._run.run_id, "mlflow.loggedImages", True)
        except Exception as e:
            if isinstance(e, (ValueError, TypeError)) or _refused(e):
                self._warn(f"MLflow at {self._run.uri} refused image {name!r}: {_one_line(e)}")
                self._backlog.done()
                return
            self._see_that_the_run_is_there()  # not before the store is back, if it is the one that is away
            self._image_failures += 1
            if self._image_failures == 2:
                self._warn(f"MLflow at {self._run.uri} does not take images ({_one_line(e)}); will go on trying")
            self._backlog.put_back(_RETRY_SECONDS if self._image_failures > 1 else 0.0)
        else:
            self._backlog.done()
            if self._image_failures > 1:
                self._warn("MLflow takes images again")
            self._image_failures = 0

    def _files(self, name: str, step: int) -> list[str]:
        """The artifacts of an image that was logged under `name` and `step`: a PNG and then a preview."""
        prefix = f"images/{name.replace('/', '~')}+step+{step}+"
        return sorted(
            f.path for f in self._client.list_artifacts(self._run.run_id, "images") if f.path.startswith(prefix)
        )

    def _until_done(self, act: Callable[[], object]) -> Exception | None:
        """Act until the store answers; returns its refusal, if it is one. The second failure in a row is told.

        Raises:
            _GivenUp: the run was deleted, or the tracker is not waited for any more.
        """
        failed = False
        while True:
            self._guard()
            try:
                act()
            except Exception as e:
                if _refused(e):
                    self._see_that_the_run_is_there()
                    return e
                if failed and not self._away:
                    self._away = True
                    self._warn(f"MLflow at {self._run.uri} is away ({_one_line(e)}); will go on trying")
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
                if not _refused(e):
                    raise
                there = False

        self._until_done(look)
        if not there:
            self._warn(f"MLflow run {self._run.run_id} was deleted: nothing more is logged")
            raise _GivenUp

    def _say_back(self, points: int) -> None:
        """Tell that a store is back, once all that had waited is logged."""
        self._caught_up += points if self._away else 0
        if self._away and self._backlog.waiting[0] < BATCH:
            dropped = f", {self._backlog.dropped:,} were dropped" if self._backlog.dropped else ""
            self._warn(f"MLflow is back; {self._caught_up:,} points caught up{dropped}")
            self._away, self._full, self._caught_up, self._backlog.dropped = False, False, 0, 0


class _GivenUp(Exception):
    """There is nothing more to do for the background thread."""


def _client(uri: str) -> Any:
    # no retries of a request, which would create a run twice: those here look first and have their own patience
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "1")
    try:
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # after the import, which sets levels of its own
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a traceback for each try
        return MlflowClient(tracking_uri=uri)
    except Exception as e:
        raise TrackingError(f"tracking.uri: {uri} cannot be used: {_one_line(e)}") from None


def _uid(root: str) -> str:
    """The random identity of the run at `root`, made at first use."""
    url = storage.join(root, "run.json")
    try:
        return str(json.loads(storage.read_bytes(url))["uid"])
    except FileNotFoundError:
        uid = uuid.uuid4().hex
        storage.write_bytes(url, json.dumps({"uid": uid}).encode())
        return uid
    except (ValueError, KeyError, TypeError):
        raise TrackingError(
            f"run.storage: {url} is not the run's identity; delete it to begin a new MLflow run"
        ) from None


def _artifacts(config: Config) -> str:
    """Where images of runs go when MLflow is a database without a server."""
    local = storage.is_local(config.run.storage)
    return (
        Path(config.run.storage, "mlartifacts").as_uri() if local else storage.join(config.run.storage, "mlartifacts")
    )


def _refused(e: Exception) -> bool:
    """Whether the server understood and said no: trying again would hold up everything behind it for ever."""
    from mlflow.exceptions import MlflowException

    return isinstance(e, MlflowException) and e.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"


def _one_line(e: BaseException) -> str:
    """The innermost cause that the message repeats: a refused connection, without the layers that it came through."""
    whole, cause = str(e), e.__cause__ or e.__context__
    while cause is not None:
        if str(cause) and str(cause) in whole:
            e = cause
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(e).split()).partition(" [SQL: ")[0]  # of sqlalchemy: the statement and its numbers
    return f"{type(e).__name__}: {text[:200]}"
