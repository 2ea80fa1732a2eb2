"""Beginning and ending the MLflow run of a run name. Not for what is logged while it trains."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from eiwtrain import storage
from eiwtrain.config import Config, flatten
from eiwtrain.storage import lease
from eiwtrain.storage.database import check_sqlite, sqlite_path
from eiwtrain.storage.watch import Watch
from eiwtrain.tracking.provenance import NOTE_TAG, ROOT_TAG, user
from eiwtrain.tracking.store import TrackedRun, TrackingError, cause_line, refused, tracking_uri
from eiwtrain.tracking.store import client as client_of

Status = Literal["FINISHED", "FAILED", "KILLED"]  # KILLED: stopped before its end, resumes with the same command

_UID_TAG = "eiwtrain.uid"
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # model training, not GenAI
_STATUS_TAG = "eiwtrain.status"
_RUNNING_TEXT = "running"
_STATUS_TEXT: dict[Status, str] = {
    "FINISHED": "finished",
    "FAILED": "failed",
    "KILLED": "stopped; resumes with the same command",
}
_STATUS_OF: dict[lease.HoldingState, Status] = {"finished": "FINISHED", "failed": "FAILED"}  # others: KILLED
_BEGIN_SECONDS = 5.0  # for which a beginning run waits for a store that is away: a user may watch
_END_SECONDS = 30.0  # for which an ending run waits
_AGAIN_SECONDS = 1.0
_MOST_IDENTITY = 10_000  # bytes of run.json
_PAGE = 50  # runs asked for at once
_MOST_EXPERIMENTS = 1000
_ABANDONED_SECONDS = 10.0  # after which the remaining runs are left to the next start


def check(config: Config) -> None:
    """Check that the tracking store answers. A local database that does not exist yet is not created.

    Raises:
        TrackingError: the store does not answer, or its experiment was deleted.
    """
    uri = tracking_uri(config)
    database = sqlite_path(uri)
    try:
        if database is not None and not database.exists():
            return check_sqlite(database)
        _alive(client_of(uri).get_experiment_by_name(config.tracking.experiment))
    except TrackingError:
        raise
    except Exception as e:
        raise TrackingError.because(f"tracking.uri: {uri} cannot be used", e) from None


def _alive(experiment: Any) -> Any:
    """Return the experiment, or None where there is no such; raise TrackingError if it was deleted."""
    if experiment is not None and experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"tracking.experiment: {experiment.name!r} was deleted in MLflow; `mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}` brings it back, or give another name"
        )
    return experiment


def begin(
    config: Config, tags: Mapping[str, str], inputs: Sequence[Any] = (), environment: Mapping[str, Any] | None = None
) -> TrackedRun:
    """Find the run of this config's name, or create it, mark it RUNNING and set `tags`.

    Its identity is a random id in `run.json` under the run's root, so a run whose folder was deleted begins as
    a new one, and two storages never share one. Params are logged at creation only, as MLflow never changes them.

    Args:
        tags: set in each attempt; the description, which people edit, only where there is none.
        inputs: MLflow's `DatasetInput` of each data set; MLflow keeps one of equal inputs.
        environment: becomes the artifact `environment.json`, which each attempt replaces.

    Raises:
        TrackingError: the store cannot be used.
        storage.StorageError: `run.storage` cannot be used.
    """
    uri, uid = tracking_uri(config), _uid(config.root)
    if (database := sqlite_path(uri)) is not None:
        with contextlib.suppress(OSError):  # the client says what is wrong
            database.parent.mkdir(parents=True, exist_ok=True)
    client = client_of(uri)
    begun: list[TrackedRun] = []
    try:
        return _patiently(_BEGIN_SECONDS, lambda: _begin(client, config, uid, tags, inputs, environment, begun))
    except Exception as e:
        if begun:
            with contextlib.suppress(Exception):
                _terminate(begun[-1], "FAILED", f"failed: {cause_line(e)}")
        if isinstance(e, TrackingError):
            raise
        raise TrackingError.because(f"tracking.uri: {uri} cannot be used", e) from None


def _begin(
    client: Any,
    config: Config,
    uid: str,
    tags: Mapping[str, str],
    inputs: Sequence[Any],
    environment: Mapping[str, Any] | None,
    begun: list[TrackedRun],
) -> TrackedRun:
    """Try once, reusing all that an earlier try has created; append the run to `begun` as soon as it exists."""
    from mlflow.entities import Param, RunTag

    uri = tracking_uri(config)
    experiment = _alive(client.get_experiment_by_name(config.tracking.experiment))
    if experiment is None:
        artifacts = None if uri.startswith("http") else _artifacts(config)
        experiment_id = client.create_experiment(
            config.tracking.experiment, artifact_location=artifacts, tags=_EXPERIMENT_TAGS
        )
    else:
        experiment_id = experiment.experiment_id
    found = client.search_runs([experiment_id], f"tags.`{_UID_TAG}` = '{uid}'", max_results=1)
    params: dict[str, Any] = flatten(config.model_dump(mode="json"))
    tags = dict(tags) | {_STATUS_TAG: _RUNNING_TEXT}
    if found:
        run_id = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
        params = {} if found[0].data.params else params
        tags = {k: v for k, v in tags.items() if k != NOTE_TAG or k not in found[0].data.tags}
    else:
        origin = {"mlflow.user": user(), _UID_TAG: uid, ROOT_TAG: config.root}
        run_id = client.create_run(experiment_id, run_name=config.run.name, tags=origin).info.run_id
    begun.append(TrackedRun(uri, experiment_id, run_id))
    client.log_batch(
        run_id,
        params=[Param(name, str(value)) for name, value in params.items()],
        tags=[RunTag(name, value) for name, value in tags.items()],
        synchronous=True,
    )
    if inputs:
        client.log_inputs(run_id, datasets=list(inputs))
    try:
        client.log_dict(run_id, config.model_dump(mode="json"), "config.yaml")
        if environment is not None:
            client.log_dict(run_id, dict(environment), "environment.json")
    except Exception as e:  # points of curves go another way
        where = client.get_run(run_id).info.artifact_uri  # raises if MLflow itself is away
        raise _ArtifactsError.because(f"MLflow at {uri} answers, and its artifact store {where} does not", e) from e
    return begun[-1]


class _ArtifactsError(TrackingError):
    """MLflow can be used, and the place where it keeps files cannot."""


def find(uri: str, root: str) -> Any | None:
    """Return what the MLflow at `uri` has of the run in the folder `root`; None where it has no such run.

    Raises:
        TrackingError: the store cannot be used, or the run's identity cannot be read.
        mlflow.exceptions.MlflowException: the store does not answer.
    """
    uid = _known_uid(root)
    if uid is None or not re.fullmatch(r"[0-9a-f]{1,64}", uid):  # else it could be more than a value in the filter
        return None
    mlflow = client_of(uri)
    experiments = [e.experiment_id for e in mlflow.search_experiments(max_results=_MOST_EXPERIMENTS)]
    return next(iter(mlflow.search_runs(experiments, f"tags.`{_UID_TAG}` = '{uid}'", max_results=1)), None)


def end(run: TrackedRun, status: Status, detail: str = "") -> bool:
    """Mark the run as ended, with `detail`, e.g. "stopped by SIGTERM", as its tag `eiwtrain.status`; return success.

    A store that is away is retried for half a minute; if it stays away, that is printed, not raised.
    """
    try:
        _patiently(_END_SECONDS, lambda: _terminate(run, status, detail or _STATUS_TEXT[status]))
        return True
    except Exception as e:
        print(f"could not mark MLflow run {run.run_id} as {status}: {cause_line(e)}", file=sys.stderr)
        return False


def settle(
    run: TrackedRun, owner: str, root: str, ended: float, status: Status | None = None, detail: str = ""
) -> bool:
    """End a run that MLflow has as RUNNING although its driver is gone; return whether it was ended here.

    This is done only while the run's lease names that driver. If a new driver takes the lease and begins the run
    meanwhile, the run is RUNNING again when this returns.

    Args:
        owner: the driver's name in the lease.
        root: URL of the run's folder.
        ended: Unix time of the driver's end or its last sign of life, seconds.
        status, detail: the end that the driver intended; None: not known, so it died.

    Raises:
        storage.StorageError, mlflow.exceptions.MlflowException: the lease or the run cannot be read or written.
    """
    client = client_of(run.uri)

    def ours() -> bool:
        found = lease.look(root)
        return found is not None and found[0] == owner

    if not ours() or client.get_run(run.run_id).info.status != "RUNNING":
        return False
    if status is None:
        when = datetime.fromtimestamp(ended, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        status, detail = "KILLED", f"its driver died, last sign of life {when}; resumes with the same command"
    detail = detail or _STATUS_TEXT[status]
    _terminate(run, status, detail, ended)
    if ours():
        return True

    def give_back() -> None:
        now = client.get_run(run.run_id)
        if now.info.status == status and now.data.tags.get(_STATUS_TAG) in (detail, _RUNNING_TEXT):
            client.update_run(run.run_id, status="RUNNING")
        if now.data.tags.get(_STATUS_TAG) == detail:
            client.set_tag(run.run_id, _STATUS_TAG, _RUNNING_TEXT)

    _patiently(_END_SECONDS, give_back)
    return False


def end_abandoned(run: TrackedRun, watch: Watch | None = None) -> list[str]:
    """End the other runs of the experiment that MLflow has as RUNNING although their leases show that none trains.

    Returns a line about each. A run that cannot be read from here is left alone, and no error is raised.

    Args:
        watch: where only time shows whether a driver lives, call this again with the same one after
            `eiwtrain.storage.watch.SECONDS`; None: leave these runs alone.
    """
    watch = watch or Watch()
    lines: list[str] = []
    give_up = time.monotonic() + _ABANDONED_SECONDS
    with contextlib.suppress(Exception), storage.impatient():
        running = f"attributes.status = 'RUNNING' AND tags.`{ROOT_TAG}` LIKE '%'"
        client, token = client_of(run.uri), None
        found: list[Any] = []
        while token or not found:  # all pages first: ending runs shifts the pages
            page = client.search_runs([run.experiment_id], running, max_results=_PAGE, page_token=token)
            found += page
            if (token := page.token) is None or time.monotonic() > give_up:
                break
        for other in found:
            if other.info.run_id == run.run_id or time.monotonic() > give_up:
                continue
            with contextlib.suppress(Exception):
                if status := _end_if_abandoned(replace(run, run_id=other.info.run_id), other.data.tags, watch):
                    lines.append(f"MLflow had '{other.info.run_name}' as RUNNING, and nobody trains it: now {status}")
    return lines


def _end_if_abandoned(run: TrackedRun, tags: Mapping[str, str], watch: Watch) -> Status | None:
    """Return the status with which the run was ended here; None if it was not."""
    root = storage.foreign(tags[ROOT_TAG], f"MLflow's tag {ROOT_TAG}")  # anyone who reaches MLflow may write it
    if _known_uid(root) != tags.get(_UID_TAG):  # a folder of that name that belongs to another run or machine
        return None
    last = watch.look(root)
    if last is None or last[1].outcome == "running":
        return None
    owner, attempt = last
    status = None if attempt.outcome == "died" else _STATUS_OF.get(attempt.outcome, "KILLED")
    return (status or "KILLED") if settle(run, owner, root, attempt.ended, status) else None


def _terminate(run: TrackedRun, status: Status, detail: str, ended: float | None = None) -> None:
    client = client_of(run.uri)
    client.set_tag(run.run_id, _STATUS_TAG, detail)  # first: a run that is not RUNNING is never examined again
    client.set_terminated(run.run_id, status, None if ended is None else round(1000 * ended))


def _patiently(seconds: float, act: Callable[[], Any]) -> Any:
    """Return `act()`, retried for `seconds` unless the store refuses it."""
    end = time.monotonic() + seconds
    while True:
        try:
            return act()
        except Exception as e:
            final = refused(e) or (isinstance(e, TrackingError) and not e.passing)
            if final or time.monotonic() + _AGAIN_SECONDS > end:
                raise
            time.sleep(_AGAIN_SECONDS)


def _uid(root: str) -> str:
    """Return the random identity of the run at `root`, created at first use."""
    if (uid := _known_uid(root)) is None:
        uid = uuid.uuid4().hex
        storage.write_bytes(_identity(root), json.dumps({"uid": uid}).encode())
    return uid


def _known_uid(root: str) -> str | None:
    """Return the identity of the run at `root`; None if there is no run."""
    try:
        return str(json.loads(storage.read_bytes(_identity(root), _MOST_IDENTITY))["uid"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TrackingError(
            f"run.storage: {_identity(root)} is not the run's identity; delete it to begin a new MLflow run"
        ) from None


def _identity(root: str) -> str:
    return storage.join(root, "run.json")


def _artifacts(config: Config) -> str:
    """Return the URL for images of runs when MLflow is a database without a server."""
    local = storage.is_local(config.run.storage)
    return (
        Path(config.run.storage, "mlartifacts").as_uri() if local else storage.join(config.run.storage, "mlartifacts")
    )
