"""Checks of what the job writes to and reads from: `run.storage`, `data.path`, MLflow and its artifacts.

Not for reaching them from other nodes (`eiwtrain.checks.cluster`).
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from eiwtrain import storage
from eiwtrain.checks.isolated import Report, explain
from eiwtrain.config import Config
from eiwtrain.storage.retry import StorageError
from eiwtrain.storage.swap import keeps_conditions, swap

SKEW_NOTED, SKEW_SECONDS = 2.0, 15.0  # half of what ends a lease, which is where a clock begins to do harm
_LOOK_AT = (
    "see that the bucket or folder exists and allows reading, writing, listing and deleting, and look at AWS_* in the "
    "environment"
)


def check_storage(report: Report, config: Config) -> None:
    """Check that `run.storage` does what a run needs: write, read, list, replace on a condition, delete."""
    with storage.impatient(), probe_folder(report, config.root) as folder:
        _try_storage(report, folder)


def _try_storage(report: Report, folder: str) -> None:
    name = "run.storage"
    file, data = storage.join(folder, "probe"), uuid.uuid4().bytes
    before = time.time()
    try:
        storage.write_bytes(file, data)
        after = time.time()
        if storage.read_bytes(file) != data:
            raise StorageError(f"{folder}: other bytes were read than were written")
    except (StorageError, FileNotFoundError, OSError) as e:
        report.fail(name, _of(folder, f"{explain(e)}; {_LOOK_AT}"))
        return
    report.ok(name, f"{folder.rpartition('/')[0]}: writes, and reads what was written")
    _step(report, f"{name} list", folder, lambda: _listed(folder))
    _step(report, f"{name} lease", folder, lambda: _one_writer(folder))
    _step(report, f"{name} clock", folder, lambda: _clock(file, before, after))
    _step(report, f"{name} delete", folder, lambda: _deleted(file))


def check_data(report: Report, config: Config) -> None:
    """Check that the data set is there and fits the config."""
    from eiwtrain.driver import preflight

    with storage.impatient():
        manifest = preflight.find_data(config)
    if manifest is None:
        report.ok("data.path", f"{config.data.path}: not there yet; the first start writes it ({config.data.prepare})")
        return
    images = manifest.splits[config.data.train_split].samples
    report.ok("data.path", f"{config.data.path}: {images:,} images to train on")


def check_mlflow(report: Report, config: Config) -> None:
    """Check that MLflow's tracking store answers, that a server's version fits, and that its artifacts take a file."""
    from eiwtrain.storage.database import sqlite_path
    from eiwtrain.tracking import record
    from eiwtrain.tracking.store import TrackingError, client, tracking_uri

    uri = tracking_uri(config)
    try:
        record.check(config)
    except TrackingError as e:
        report.fail("MLflow", f"{explain(e)}; start that server, or give another tracking.uri (MLFLOW_TRACKING_URI)")
        return
    served, database = uri.startswith("http"), sqlite_path(uri)
    if served:
        _server_version(report, uri)
    else:
        report.ok("MLflow", f"{uri} can be used")
    found = None
    if database is None or database.exists():  # else a client would make it
        mlflow = client(uri)
        found = mlflow.get_experiment_by_name(config.tracking.experiment)
        found = found or (mlflow.get_experiment("0") if served else None)
    location = str(found.artifact_location) if found else record._artifacts(config)
    with storage.impatient():
        _artifacts(report, uri, location)


def _server_version(report: Report, uri: str) -> None:
    """Report the version of an MLflow server beside this machine's."""
    import mlflow
    from mlflow.tracking._tracking_service.utils import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    here = mlflow.__version__
    answer = http_request(get_default_host_creds(uri), "/version", "GET", raise_on_status=False)
    server = answer.text.strip()[:20]
    if answer.status_code != 200 or not server[:1].isdigit():
        report.note("MLflow", f"{uri} answers, and does not say its version; this machine has {here}")
    elif int(server.partition(".")[0]) < int(here.partition(".")[0]):
        report.fail("MLflow", f"{uri} has version {server}, which is too old for the {here} here; update the server")
    else:
        report.ok("MLflow", f"{uri} answers; version {server}, and {here} here")


def _artifacts(report: Report, uri: str, location: str) -> None:
    """Write, list and delete a file in the artifact store, as a run's images are written."""
    server = urlsplit(uri)
    if urlsplit(location).scheme in ("", "file"):
        if server.scheme in ("http", "https") and server.hostname not in ("127.0.0.1", "::1", "localhost"):
            report.fail(
                "artifacts",
                f"the server at {uri} names {location}, a folder of its own machine, where nobody else can write; "
                "start it with --artifacts-destination, and give the run another tracking.experiment",
            )
        else:
            _local_artifacts(report, location)
        return
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        store = get_artifact_repository(location, tracking_uri=uri)
        name = f"doctor-{uuid.uuid4().hex}"
        with tempfile.TemporaryDirectory() as folder:
            (file := Path(folder, name)).write_text("eiwtrain")
            with report.probe(storage.join(location, name), lambda: store.delete_artifacts(name)):
                store.log_artifact(str(file))
                listed = name in {artifact.path for artifact in store.list_artifacts()}
    except Exception as e:  # of MLflow, boto3 or any other client
        report.fail(
            "artifacts",
            f"{location}: {explain(e)}; this machine needs the same access to it as the workers (credentials, and for "
            "s3:// boto3), or a server that passes files on (mlflow server --artifacts-destination)",
        )
        return
    if listed:
        report.ok("artifacts", f"{location} takes files")
    else:
        report.fail("artifacts", f"{location} does not list a file that was just written; look at the server's log")


def _local_artifacts(report: Report, location: str) -> None:
    folder = storage.absolute(location)
    try:
        storage.check_writable(folder)
    except StorageError as e:
        report.fail("artifacts", f"{explain(e)}; make it a folder that you may write to")
    else:
        report.ok("artifacts", f"{folder} takes files")


@contextlib.contextmanager
def probe_folder(report: Report, root: str) -> Iterator[str]:
    """Yield the URL of a folder under `root` that is removed again, with the local folders above it that were not
    there."""
    try:
        path = Path(storage.filesystem(root)[1])
        made = [p for p in (path, *path.parents) if storage.is_local(root) and not p.exists()]
    except (OSError, ValueError) as e:  # a name that is too long, or that no file can have
        raise StorageError(f"{root}: {e}") from None
    folder = storage.join(root, f".doctor-{uuid.uuid4().hex}")
    with report.probe(folder, lambda: storage.delete(folder)):
        yield folder
    for each in made:
        with contextlib.suppress(OSError):  # another process may have put a file there meanwhile
            each.rmdir()


def _step(report: Report, subject: str, folder: str, step: Callable[[], str]) -> None:
    """Report what a step says, as a failure if it raises StorageError."""
    try:
        report.ok(subject, step())
    except _Noted as e:
        report.note(subject, str(e))
    except (StorageError, OSError) as e:
        report.fail(subject, _of(folder, explain(e)))


class _Noted(Exception):
    """A step found what may matter, and no failure."""


def _listed(folder: str) -> str:
    if "probe" not in storage.listdir(folder):
        raise StorageError(
            "a file that was just written is not listed, so a run would not find its checkpoints; use a store that "
            "lists what was written at once"
        )
    return "lists a file that was just written"


def _one_writer(folder: str) -> str:
    """See that of two writers one is refused; the lease of a run needs that."""
    url = storage.join(folder, "lease")
    first, second = uuid.uuid4().bytes, uuid.uuid4().bytes
    if not swap(url, None, first) or swap(url, None, second) or not swap(url, first, second):
        raise StorageError("a file was replaced against its condition; use storage that only these jobs write to")
    kept = keeps_conditions(url)
    if kept is None:
        raise _Noted(
            "it knows no locks or conditional puts, so the lease looks again after a second whose it is; do not start "
            "two jobs of one run at the same moment"
        )
    if not kept:
        raise StorageError(
            "the server ignores the condition of a put (If-None-Match, If-Match), so two jobs could train the same "
            "run; use a server that knows it (AWS, R2, SeaweedFS, MinIO), or start each run only once"
        )
    return "of two jobs that start the same run, one is refused"


def _deleted(url: str) -> str:
    storage.delete(url)
    if storage.exists(url):
        raise StorageError("a file that was just deleted is still there; old checkpoints would fill the storage")
    return "a deleted file is gone"


def _clock(url: str, before: float, after: float) -> str:
    """Compare this machine's clock with the storage's, by when it says that the file was written."""
    fs, path = storage.filesystem(url)
    try:
        written = fs.modified(path)
        moment = written.timestamp() if written.tzinfo else _utc(written)
    except Exception as e:  # not every file system knows
        raise _Noted(f"it does not say when a file was written ({type(e).__name__})") from None
    return of_clock("the storage's", max(before - 1.0 - moment, moment - after - 1.0, 0.0), moment < before)


def _utc(moment: Any) -> float:
    from datetime import timezone

    return float(moment.replace(tzinfo=timezone.utc).timestamp())


def of_clock(whose: str, off: float, ahead: bool) -> str:
    """Return how far this machine's clock is from another; raise StorageError where that does harm.

    Args:
        off: seconds, without a sign.
        ahead: whether this machine's clock is.
    """
    side = "ahead of" if ahead else "behind"
    if off > SKEW_SECONDS:
        raise StorageError(f"this machine's clock is {off:,.0f} s {side} {whose}; set both by NTP (chrony)")
    if off > SKEW_NOTED:
        raise _Noted(f"this machine's clock is {off:.0f} s {side} {whose}; NTP (chrony) would keep them together")
    return f"this machine's clock agrees with {whose}"


def _of(folder: str, text: str) -> str:
    """Return the text without the names of probes: the user knows the folder that they were in."""
    name = f"/{folder.rpartition('/')[2]}"
    return text.replace(f"{name}/probe", "").replace(name, "")
