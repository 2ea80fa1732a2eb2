"""The MLflow run of a run name: found again or created, begun and ended. Not for what is logged while it trains."""

from __future__ import annotations

import contextlib
import getpass
import json
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from eiwtrain import storage
from eiwtrain.config import Config, flatten
from eiwtrain.tracking.store import TrackedRun, TrackingError, one_line, refused, tracking_uri
from eiwtrain.tracking.store import client as client_of

Status = Literal["FINISHED", "FAILED", "KILLED"]  # KILLED: stopped before its end, goes on with the same command

_UID_TAG = "eiwtrain.uid"
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # model training, not GenAI
_STATUS_TAG = "eiwtrain.status"
_STATUS_TEXT: dict[Status, str] = {
    "FINISHED": "finished",
    "FAILED": "failed",
    "KILLED": "stopped; goes on with the same command",
}
_BEGIN_SECONDS = 5.0  # how long a beginning run waits for a store that is away: somebody may be waiting for the answer
_END_SECONDS = 30.0  # and an ending one
_AGAIN_SECONDS = 1.0


def check(config: Config) -> None:
    """See that the tracking store answers. A local database that is not there yet is not made.

    Raises:
        TrackingError: it does not.
    """
    uri = tracking_uri(config)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return
    client = client_of(tracking_uri(config))
    try:
        client.search_experiments(max_results=1)
    except Exception as e:
        raise TrackingError(f"tracking.uri: {tracking_uri(config)} cannot be used: {one_line(e)}") from None


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
    client = client_of(uri)
    begun: list[TrackedRun] = []
    try:
        return _patiently(_BEGIN_SECONDS, lambda: _begin(client, config, uid, tags, begun))
    except Exception as e:
        if begun:
            with contextlib.suppress(Exception):
                _terminate(begun[-1], "FAILED", f"failed: {one_line(e)}")
        raise TrackingError(f"tracking.uri: {uri} cannot be used: {one_line(e)}") from None


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
        print(f"could not mark MLflow run {run.run_id} as {status}: {one_line(e)}", file=sys.stderr)


def _terminate(run: TrackedRun, status: Status, detail: str) -> None:
    client = client_of(run.uri)
    client.set_terminated(run.run_id, status)
    client.set_tag(run.run_id, _STATUS_TAG, detail)


def _patiently(seconds: float, act: Callable[[], Any]) -> Any:
    """What `act` returns; tried again for a while, unless the store answers that it will not."""
    end = time.monotonic() + seconds
    while True:
        try:
            return act()
        except Exception as e:
            if refused(e) or time.monotonic() + _AGAIN_SECONDS > end:
                raise
            time.sleep(_AGAIN_SECONDS)


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


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
