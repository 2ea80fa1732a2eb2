"""MLflow, and nothing but MLflow: one run per run name, found again; metrics that never hold training up.

The driver begins and ends the run; rank 0 logs into it. Checkpoints and models are referred to by URL, not uploaded.
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import queue
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
from eiwtrain.config import Config, flatten

if TYPE_CHECKING:
    from PIL.Image import Image

Status = Literal["FINISHED", "FAILED", "KILLED"]  # KILLED: stopped before its end, goes on with the same command

_UID_TAG = "eiwtrain.uid"
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # model training, not GenAI
_RETRY_SECONDS = 5.0
_FLUSH_SECONDS = 5.0
_DRAIN_SECONDS = 60.0  # how long a closing tracker waits for a server that is away


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
    from mlflow.entities import Param

    uri, uid = tracking_uri(config), _uid(config.root)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    client = _client(uri)
    run_id = ""
    try:
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
            run_id = found[0].info.run_id
            client.update_run(run_id, status="RUNNING")
            has_params = bool(found[0].data.params)
        else:
            origin = {"mlflow.user": _user(), "mlflow.source.name": "eiwtrain.run"}
            run = client.create_run(experiment_id, run_name=config.run.name, tags=origin | {_UID_TAG: uid})
            run_id, has_params = run.info.run_id, False
        if not has_params:
            params = [Param(name, str(value)) for name, value in flatten(config.model_dump(mode="json")).items()]
            client.log_batch(run_id, params=params)
        for key, value in tags.items():
            client.set_tag(run_id, key, value)
        client.log_dict(run_id, config.model_dump(mode="json"), "config.yaml")
    except Exception as e:
        if run_id:
            end(TrackedRun(uri, experiment_id, run_id), "FAILED")
        raise TrackingError(f"tracking.uri: {uri} cannot be used: {_one_line(e)}") from None
    return TrackedRun(uri, experiment_id, run_id)


def end(run: TrackedRun, status: Status) -> None:
    """Mark the run as ended; a store that does not answer is reported, not raised."""
    try:
        _client(run.uri).set_terminated(run.run_id, status)
    except Exception as e:
        print(f"could not mark MLflow run {run.run_id} as {status}: {_one_line(e)}", file=sys.stderr)


class Tracker:
    """Logs into a run from a background thread, in order, each step once.

    Steps that an earlier attempt has logged already are passed over. A store that is away is tried again until it
    is back; training never waits for it.
    """

    def __init__(self, run: TrackedRun, warn: Callable[[str], None] = print) -> None:
        self._run, self._warn = run, warn
        self._closed = False
        self._client = _client(run.uri)
        self._queue: queue.Queue[Any] = queue.Queue()
        self._logged: dict[str, int] = {}  # series -> last step that an earlier attempt logged
        self._thread = threading.Thread(target=self._work, daemon=True, name="tracker")
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Queue one point of each named curve."""
        self._queue.put(("metrics", step, dict(values), int(time.time() * 1000)))

    def image(self, step: int, name: str, image: Image) -> None:
        """Queue an image, shown in the UI under its step."""
        self._queue.put(("image", step, name, image))

    def tags(self, values: Mapping[str, str]) -> None:
        """Queue tags, e.g. the URL of the newest checkpoint."""
        self._queue.put(("tags", dict(values)))

    def flush(self) -> None:
        """Wait until what was queued is logged, at most `_FLUSH_SECONDS`; call it before a checkpoint says that the
        steps so far need not be made again."""
        done = threading.Event()
        self._queue.put(("flush", done))
        done.wait(_FLUSH_SECONDS)

    def close(self) -> None:
        """Wait until what was queued is logged, at most `_DRAIN_SECONDS`; closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join(_DRAIN_SECONDS)
        if self._thread.is_alive():
            self._warn(f"MLflow at {self._run.uri} did not take {self._queue.qsize()} records")

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            said = False
            while True:
                try:
                    self._log(*item)
                    break
                except Exception as e:
                    if _refused(e):
                        self._warn(f"MLflow at {self._run.uri} refused a record: {_one_line(e)}")
                        break
                    if not said:
                        self._warn(f"MLflow at {self._run.uri} is away ({_one_line(e)}); will go on trying")
                        said = True
                    time.sleep(_RETRY_SECONDS)

    def _log(self, kind: str, *what: Any) -> None:
        from mlflow.entities import Metric, RunTag

        if kind == "flush":
            (done,) = what
            done.set()
        elif kind == "metrics":
            step, values, timestamp = what
            new = {k: v for k, v in values.items() if step > self._last_step(k)}
            batch = [Metric(k, v, timestamp, step) for k, v in new.items()]
            if batch:
                self._client.log_batch(self._run.run_id, metrics=batch)
        elif kind == "image":
            step, name, image = what
            tag = f"eiwtrain.image.{name}"  # the step of the last image logged under this name
            if step > int(self._client.get_run(self._run.run_id).data.tags.get(tag, -1)):
                self._client.log_image(self._run.run_id, image, key=name, step=step, synchronous=True)
                self._client.set_tag(self._run.run_id, tag, step)
        else:
            (values,) = what
            self._client.log_batch(self._run.run_id, tags=[RunTag(f"eiwtrain.{k}", v) for k, v in values.items()])

    def _last_step(self, key: str) -> int:
        """The last step of a curve when this attempt began to log it."""
        if key not in self._logged:
            history = self._client.get_metric_history(self._run.run_id, key)
            self._logged[key] = max((m.step for m in history), default=-1)
        return self._logged[key]


def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the tracker has its own, longer patience
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    try:
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # after the import, which sets levels of its own
            logging.getLogger(name).setLevel(logging.ERROR)
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
    return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
