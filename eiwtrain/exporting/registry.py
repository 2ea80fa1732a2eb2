"""Exported models in MLflow's Model Registry: a version of each, and the alias `best`, which only a better one takes.

The version of a model in a bucket refers to that bucket, so that gigabytes do not go through the tracking server;
files of this machine become artifacts of the run. Not for writing the files (`eiwtrain.exporting.assemble`).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eiwtrain import flow, storage
from eiwtrain.exporting import model_card
from eiwtrain.storage.database import sqlite_path, sqlite_uri
from eiwtrain.terminal.lines import one_line
from eiwtrain.tracking.store import TrackingError, cause_line, client

ALIAS = "best"
_NAME = re.compile(r"[\w.-][\w. -]*")  # allowed by MLflow, and in `models:/NAME@ALIAS`
_CREDENTIALS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_AUTH")
_UPLOAD_SECONDS = "600"  # a server's limit for one file, which it passes on before it answers
_ALIKE = ("data_fingerprint", "image_shape", "n_bits", "eval_split", "eval_images")
"""Facts that two figures must have in common to be compared."""


@dataclass(frozen=True)
class Registered:
    """A version of a registered model.

    Attributes:
        new: whether this call created it; a model is registered once.
        is_best: whether the alias `best` is on it.
        why: what happened to the alias, for people.
    """

    name: str
    version: str
    new: bool
    is_best: bool
    why: str

    def __str__(self) -> str:
        verb = "registered as" if self.new else "was registered before as"
        return f"{verb} models:/{self.name}/{self.version}; {self.why}"


def check_name(name: str) -> None:
    """Raise ValueError if a registered model cannot have that name."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"--register: {name!r} cannot name a registered model: letters, digits and . _ - are allowed")


def register(
    name: str,
    folder: Path,
    url: str,
    uri: str,
    run_id: str | None,
    model: flow.EIWFlow,
    metadata: Mapping[str, Any],
) -> Registered:
    """Register an exported model; the alias `best` moves to it if it is the first, or better than the one before.

    Args:
        folder: the exported model on this machine.
        url: where it was published, and stays; files of this machine are logged into the run.
        uri: of MLflow.
        run_id: of the run that trained it; with None, or if MLflow does not know it, the version has no run.
        metadata: as `models.metadata_of` returns it.

    Raises:
        TrackingError: MLflow cannot be used, or files of this machine have no run to go into.
    """
    try:
        return _register(client(uri), name, folder, url, run_id, model, metadata)
    except TrackingError:
        raise
    except Exception as e:
        raise TrackingError(f"{uri}: {cause_line(e)}") from None


def store_of(root: str, config: Mapping[str, Any]) -> str:
    """Return the URI of the MLflow in which a run was recorded.

    Args:
        root: of the run.
        config: of the run, as JSON data.

    Raises:
        TrackingError: it was a database beside the run, which is not there any more, or the run names a store that is
            not used unless the user names it.
    """
    tracking = config.get("tracking")
    if uri := tracking.get("uri") if isinstance(tracking, dict) else None:
        return _foreign_store(str(uri))
    database = Path(storage.absolute(root)).parent / "mlflow.db"
    if not storage.is_local(root) or not database.is_file():
        raise TrackingError(f"{database if storage.is_local(root) else root}: no MLflow there; give --tracking-uri")
    return sqlite_uri(database)


def _foreign_store(uri: str) -> str:
    """Return the URI of an MLflow that a checkpoint names: an existing database of this machine, or a server that gets
    no credentials of the user.

    Raises:
        TrackingError: it is something else.
    """
    named = f"the checkpoint names {one_line(uri, 80)} as its MLflow"
    if (path := sqlite_path(uri)) is not None and uri.isprintable():
        if not path.is_file():
            raise TrackingError(f"{named}, which is not there; give --tracking-uri")
        return uri
    if not re.fullmatch(r"https?://[^\s@]+", uri) or not uri.isprintable():
        raise TrackingError(f"{named}; give --tracking-uri to use it")
    if given := [name for name in _CREDENTIALS if os.environ.get(name)]:
        raise TrackingError(f"{named}, and {given[0]} is set: give --tracking-uri to say where to send it")
    return uri


def _register(
    mlflow: Any,
    name: str,
    folder: Path,
    url: str,
    run_id: str | None,
    model: flow.EIWFlow,
    metadata: Mapping[str, Any],
) -> Registered:
    tags = _tags(folder, model.config, metadata)
    versions = mlflow.search_model_versions(f"name = '{name}'")
    same = [v for v in versions if all(v.tags.get(key) == tags.get(key) for key in ("weights_sha256", "checkpoint"))]
    if same:
        version = min(same, key=lambda v: int(v.version))
        return Registered(name, str(version.version), False, *_alias(mlflow, name, version))
    run, place = _run(mlflow, run_id), str(metadata.get("checkpoint", "model"))
    source = _logged(mlflow, folder, run, place) if storage.is_local(url) else url
    _make(mlflow, name)
    parameters = sum(p.numel() for p in model.parameters())
    version = mlflow.create_model_version(
        name,
        source,
        run_id=None if run is None else run.info.run_id,
        tags=tags,
        description=model_card.summary(model.config, parameters, metadata),
        await_creation_for=0,
    )
    return Registered(name, str(version.version), True, *_alias(mlflow, name, version))


def _alias(mlflow: Any, name: str, version: Any) -> tuple[bool, str]:
    """Move the alias if this version is better; return whether the version has it, and why."""
    number = mlflow.get_registered_model(name).aliases.get(ALIAS)
    if number is not None and str(number) == str(version.version):
        return True, f"it is {name}@{ALIAS}"
    before = None if number is None else mlflow.get_model_version(name, number)
    better, why = (True, "the first") if before is None else _better(version.tags, before.tags)
    if better:
        mlflow.set_registered_model_alias(name, ALIAS, version.version)
        return True, f"{name}@{ALIAS} names it now: {why}"
    return False, f"{name}@{ALIAS} stays on version {number}: {why}"


def _better(new: Mapping[str, str], old: Mapping[str, str]) -> tuple[bool, str]:
    """Return whether the first has better figures than the second, if they can be compared, and why."""
    here, there = _bits(new), _bits(old)
    if here is None:
        return False, "this one was not evaluated"
    if there is None:
        return True, "the one before was not evaluated"
    for key in _ALIKE:
        if new.get(key) != old.get(key):
            ours, theirs = (str(tags.get(key, "unknown"))[:16] for tags in (new, old))
            return False, f"figures do not compare, its {key} is {theirs}, here {ours}"
    if here < there:
        return True, f"{here:.4f} bits/dim, {there:.4f} before"
    return False, f"it has {there:.4f} bits/dim, this one {here:.4f}"


def _bits(tags: Mapping[str, str]) -> float | None:
    try:
        bits = float(tags["bits_per_dim"])
    except (KeyError, ValueError):
        return None
    return bits if math.isfinite(bits) else None


def _tags(folder: Path, config: flow.FlowConfig, metadata: Mapping[str, Any]) -> dict[str, str]:
    facts = {
        "step": metadata.get("step"),
        "checkpoint": metadata.get("checkpoint"),
        "bits_per_dim": metadata.get("eval_bits_per_dim"),
        "standard_error": metadata.get("eval_standard_error"),
        "eval_split": metadata.get("eval_split"),
        "eval_images": metadata.get("eval_images"),
        "data": metadata.get("data"),
        "data_fingerprint": metadata.get("data_fingerprint"),
        "image_shape": "x".join(map(str, config.image_shape)),
        "n_bits": config.n_bits,
        "weights_sha256": _weights_sha256(folder / flow.MODEL_FILE),
    }
    return {key: str(value) for key, value in facts.items() if value is not None}


def _weights_sha256(file: Path) -> str:
    """Return the SHA-256 of all tensors, not of the file: safetensors orders the metadata in its header at will."""
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        f.seek(8 + int.from_bytes(f.read(8), "little"))  # the header, after its length
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _run(mlflow: Any, run_id: str | None) -> Any | None:
    """Return the run, or None if this store does not have it."""
    from mlflow.exceptions import MlflowException

    try:
        return None if run_id is None else mlflow.get_run(run_id)
    except MlflowException as e:
        if e.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _logged(mlflow: Any, folder: Path, run: Any | None, name: str) -> str:
    """Log the files into the run and return their URL."""
    if run is None:
        raise TrackingError("it does not know the run that files of this machine are logged into: export to a bucket")
    with _patience():
        mlflow.log_artifacts(run.info.run_id, str(folder), f"models/{name}")
    return storage.join(run.info.artifact_uri, "models", name)


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Raise the time limit of a request, which MLflow reads from the environment."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    os.environ[name] = _UPLOAD_SECONDS
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ.update({} if before is None else {name: before})


def _make(mlflow: Any, name: str) -> None:
    """Create the registered model if it does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        mlflow.create_registered_model(name)
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
