"""Opens a trained flow, whatever a user has of it: an exported model, a checkpoint, a run, or a registered model.

For the commands. Not for resuming training, nor for programs without the rest of eiwtrain: those call `flow.load`.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eiwtrain import __version__, checkpoints, data, flow, storage
from eiwtrain.checkpoints import Checkpoint
from eiwtrain.storage.database import sqlite_path
from eiwtrain.terminal.lines import one_line

_REGISTERED = re.compile(r"^models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>[^/@]+))$")

_NUMBER = (int, float)
_FACTS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(
        ("run", "checkpoint", "data", "data_fingerprint", "eval_split", "train_split", "eiwtrain", "eval_estimator"),
        str,
    ),
    **dict.fromkeys(("step", "updates", "samples_seen", "eval_images", "eval_draws", "workers"), int),
    **dict.fromkeys(("eval_bits_per_dim", "eval_standard_error", "wall_seconds"), _NUMBER),
    "class_names": list,
    "training": dict,
}
"""The types of the facts that are printed or computed with; others are kept as they are."""

_MLFLOW_STORES = ("mlflow-artifacts", "runs", "models", "wasbs", "dbfs", "file")
"""Schemes of places that MLflow itself, or the user's own account, stands for; beside `storage.foreign`."""

_TRAINING = (
    *("global_batch", "optimizer", "betas", "lr", "schedule", "warmup_steps"),
    *("weight_decay", "clip", "ema", "precision", "seed"),
)


@dataclass(frozen=True)
class LoadedModel:
    """A flow, in eval mode on the CPU, with its origin.

    Attributes:
        source: where it was found: the URL of the exported model or of the checkpoint.
        metadata: `step`, `samples_seen`, `data` (title), `data_fingerprint`, `eval_bits_per_dim` and so on; a model
            that another program has exported may lack any of them.
    """

    flow: flow.EIWFlow
    source: str
    metadata: dict[str, Any]


def open_model(name: str) -> LoadedModel:
    """Open the flow at `name`.

    Args:
        name: folder or URL of an exported model (or of its `model.safetensors`), a checkpoint or a run (its best
            checkpoint, or the newest if none was evaluated), or
            `models:/NAME@ALIAS` or `models:/NAME/VERSION` of the MLflow Model Registry that
            MLFLOW_TRACKING_URI names.

    Raises:
        ValueError: there is no such model, or its weights are not finite.
        storage.StorageError: it cannot be read.
        checkpoints.DamagedCheckpoint: it is not as it was written.
    """
    if _REGISTERED.match(name):
        return _registered(name)
    if name.endswith(".safetensors"):
        return _exported(name, name)
    if storage.exists(storage.join(name, flow.MODEL_FILE)):
        return _exported(storage.join(name, flow.MODEL_FILE), name)
    if storage.is_local(name) and Path(storage.absolute(name)).is_file():
        raise ValueError(f"{name}: this is a file; give its folder, or a model's {flow.MODEL_FILE}")
    if (saved := checkpoints.at(name)) is not None:
        return of_checkpoint(saved)
    found = checkpoints.committed(name)
    if not found:
        raise ValueError(f"{name}: neither an exported model nor a checkpoint nor a run that has one")
    return of_checkpoint(checkpoints.best(found) or found[0])


def open_split(model: LoadedModel, url: str, split: str, option: str = "data") -> data.ShardReader:
    """Open a split of the data set at `url`, whose images and classes the model takes.

    Args:
        option: the option that named the data set, for errors.

    Raises:
        ValueError: there is no such split, or the model does not take its images.
    """
    with about_option(option):
        reader = data.ShardReader(url, data.load_manifest(url), split)
        config, classes = model.flow.config, reader.manifest.classes
        if reader.image_shape != config.image_shape:
            has, takes = ("x".join(map(str, shape)) for shape in (reader.image_shape, config.image_shape))
            channels, height, width = config.image_shape
            fix = (
                f"; python -m data_prep ... --resolution {height} writes such"
                if (channels, height) == (3, width)
                else ""
            )
            raise ValueError(f"images of {reader.manifest.title} are {has}, and the model takes {takes}{fix}")
        if config.classes and config.classes != len(classes):
            raise ValueError(f"{len(classes)} classes, and the model has {config.classes}")
        named = model.metadata.get("class_names")
        if config.classes and named and list(named) != list(classes):
            known = ", ".join(named[:5])
            raise ValueError(f"its classes are not the model's, or in another order; the model's: {known}, ...")
        return reader


@contextlib.contextmanager
def about_option(name: str) -> Iterator[None]:
    """Name the option `--name` in errors of the block."""
    try:
        yield
    except (ValueError, storage.StorageError) as e:
        raise ValueError(f"--{name}: {e}") from None


def check_source(url: str, where: str) -> None:
    """Check that MLflow may open a URL that it names: a place of its own, or what `storage.foreign` allows.

    Args:
        where: it was read from, for the error.

    Raises:
        storage.StorageError: it may not.
    """
    if url.partition(":")[0] not in _MLFLOW_STORES:
        storage.foreign(url, where)


def choose(which: str, root: str) -> Checkpoint:
    """Return the newest checkpoint of a run (`last`), the best by held-out bits/dim (`best`), or that of a step.

    Raises:
        ValueError: there is no such checkpoint.
    """
    found = checkpoints.committed(root)
    if which == "best":
        found = [b] if (b := checkpoints.best(found)) else []
    elif which != "last":
        found = [c for c in found if str(c.step) == which]
    if not found:
        there, unreadable = checkpoints.survey(root)
        bad = "; ".join(u.why for u in unreadable)
        raise ValueError(
            f"{root}: no checkpoint {which!r}; committed: {[c.step for c in there]}" + (bad and f"; {bad}")
        )
    return found[0]


def of_checkpoint(saved: Checkpoint) -> LoadedModel:
    """Load the averaged weights of a checkpoint.

    Raises:
        ValueError: they are not finite, or are not those of the flow that it describes.
        checkpoints.DamagedCheckpoint: it is not as it was written.
    """
    try:
        config, metadata = saved.state["flow"], _known(metadata_of(saved))
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{saved.url}: its manifest does not describe a run ({one_line(repr(e))})") from None
    model = flow.restore(config, checkpoints.section(checkpoints.load(saved), "ema"), saved.url)
    return _finite(LoadedModel(model, saved.url, metadata))


def name_of(saved: Checkpoint) -> str:
    """Return the name of a checkpoint's folder, `step-...`."""
    return saved.url.rpartition("/")[2]


def metadata_of(saved: Checkpoint) -> dict[str, Any]:
    """Return the metadata of an exported model: no path, address or name of a machine, as models get published."""
    state, config = saved.state, saved.state["config"]
    score, train = state.get("score") or {}, config["train"]
    estimator = state.get("estimator", {}) if score else {}

    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    return {
        "run": config["run"]["name"],
        "checkpoint": name_of(saved),
        "step": saved.step,
        "updates": state.get("updates"),
        "samples_seen": saved.samples_seen,
        "data": state.get("data"),
        "data_fingerprint": state.get("data_fingerprint"),
        "class_names": state.get("class_names"),
        "eval_bits_per_dim": finite(state.get("eval_bits_per_dim")),
        "eval_standard_error": finite(score.get("standard_error")),
        "eval_images": score.get("images"),
        "eval_estimator": estimator.get("name"),
        "eval_draws": estimator.get("draws"),
        "eval_noise": estimator.get("noise"),
        "eval_split": config["data"]["eval_split"],
        "train_split": config["data"]["train_split"],
        "training": {name: train[name] for name in (*_TRAINING, *_schedule(train)) if name in train},
        "workers": state.get("world_size"),
        "wall_seconds": state.get("clock", {}).get("wall"),
        "eiwtrain": __version__,
    }


def _schedule(train: dict[str, Any]) -> list[str]:
    """Return the names of further fields that this training has used."""
    decay = ["lr_decay"] if train.get("schedule") == "exponential" else []
    return decay + (["finetune_steps", "finetune_lr"] if train.get("finetune_steps") else [])


def _exported(url: str, source: str) -> LoadedModel:
    # the header of the weights holds all of config.json: no other file is fetched
    if storage.is_local(url):
        return _loaded(Path(storage.absolute(url)), source)
    with tempfile.TemporaryDirectory() as copy:
        try:
            storage.get_file(url, Path(copy, flow.MODEL_FILE))
        except FileNotFoundError:
            raise ValueError(f"{url}: no such file") from None
        return _loaded(Path(copy, flow.MODEL_FILE), source)


def _loaded(file: Path, source: str) -> LoadedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # about weights that `_finite` refuses
        return _finite(LoadedModel(flow.load(file), source, _known(flow.metadata(file))))


def _finite(model: LoadedModel) -> LoadedModel:
    """Return the model; raise ValueError if its weights are not finite."""
    if bad := flow.not_finite(model.flow):
        raise ValueError(f"{model.source}: {bad}; a model of an earlier step may be whole")
    return model


def _known(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of a file's metadata that are of the types that `metadata_of` writes; another program, or
    anybody, may have written it."""
    kept = {
        key: value
        for key, value in metadata.items()
        if key not in _FACTS or (isinstance(value, _FACTS[key]) and not isinstance(value, bool))
    }
    if not all(isinstance(name, str) for name in kept.get("class_names", [])):
        del kept["class_names"]
    return kept


def _registered(name: str) -> LoadedModel:
    import mlflow
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository

    from eiwtrain.tracking.store import TrackingError, client

    uri = mlflow.get_tracking_uri()
    database = sqlite_path(uri)
    if "MLFLOW_TRACKING_URI" not in os.environ and database is not None and not database.exists():
        raise ValueError(f"{name}: set MLFLOW_TRACKING_URI to the MLflow that has it, e.g. sqlite:///runs/mlflow.db")
    try:
        client(uri)  # which quiets MLflow
    except TrackingError as e:
        raise ValueError(f"{name}: {e}") from None
    with tempfile.TemporaryDirectory() as copy:
        try:
            source = ModelsArtifactRepository.get_underlying_uri(name)
            check_source(source, f"the source of {name}")
            file = mlflow.artifacts.download_artifacts(artifact_uri=f"{name}/{flow.MODEL_FILE}", dst_path=copy)
        except Exception as e:
            raise ValueError(f"{name}: {one_line(e, 300)}") from None
        return _loaded(Path(file), name)
