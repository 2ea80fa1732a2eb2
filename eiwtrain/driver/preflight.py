"""Checks before anything starts: GPUs, the cluster, data, storage, the checkpoint to resume from.

Every problem is a `ConfigError`, a line each, that names the field. Nothing here starts Ray or imports torch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import runpy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eiwtrain import checkpoints, storage
from eiwtrain.checkpoints import near
from eiwtrain.config import Config, ConfigError
from eiwtrain.data.cache import default_cache_dir
from eiwtrain.data.manifest import MANIFEST_NAME, DataError, Manifest, load_manifest
from eiwtrain.on_ray import session
from eiwtrain.storage.private import private_folder


def check_gpus(config: Config, joins_cluster: bool) -> None:
    """Check that this machine has a GPU for each worker, and a torch that can use it; not on a cluster, whose GPUs may
    be elsewhere."""
    needed = config.workers.min * config.workers.gpus
    if not needed or joins_cluster:
        return
    if (found := gpus_here()) < needed:
        raise ConfigError(
            f"workers.gpus: {config.workers.gpus} for each of {config.workers.min} workers, but this machine has "
            f"{found}; use workers.gpus=0 for CPU, fewer workers, or submit to a cluster with GPUs"
        )
    build = torch_build()
    if build.get("cuda") is None:
        raise ConfigError(
            f"workers.gpus: {config.workers.gpus}, but the torch that is installed, {build.get('__version__')}, is "
            "built without CUDA; `pip uninstall torch` and then installing eiwtrain again brings one with it, or use "
            "workers.gpus=0 for CPU"
        )


def gpus_here() -> int:
    """Return how many NVIDIA GPUs CUDA would show to this process (CUDA_VISIBLE_DEVICES counts)."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def torch_build() -> dict[str, Any]:
    """Return the names in `torch.version`, which say how torch was built, without the second that its import takes."""
    torch = importlib.util.find_spec("torch")
    return runpy.run_path(str(Path(torch.origin).with_name("version.py"))) if torch and torch.origin else {}


def check_cluster() -> None:
    """Check that Ray can be started, or that it answers where `RAY_ADDRESS` names a cluster."""
    try:
        session.check()
    except session.RayError as e:
        raise ConfigError(str(e)) from None


def check_folders(config: Config) -> None:
    """Check that nobody else can write to the folders of this machine that this user's jobs trust."""
    try:
        private_folder("eiwtrain-ray", "TMPDIR")
        if config.data.cache_dir is None:
            default_cache_dir()
        if config.checkpoint.near is not None and not session.joins_cluster():  # else only its nodes know
            near.open_folder(config.checkpoint.near, config.root)
    except storage.StorageError as e:
        raise ConfigError(str(e)) from None


def check_storage(config: Config) -> None:
    """Check that `run.storage` takes a file and gives it back."""
    try:
        storage.check_writable(config.root)
    except storage.StorageError as e:
        raise ConfigError.because(f"run.storage: {e}", e) from None


def find_data(config: Config) -> Manifest | None:
    """Return the data set at `data.path`, checked against the config; None when it is absent and `data.prepare` says
    how to write it."""
    d = config.data
    try:
        if d.prepare and not storage.exists(storage.join(d.path, MANIFEST_NAME)):
            return None
        manifest = load_manifest(d.path)
    except (DataError, storage.StorageError) as e:
        raise ConfigError.because(f"data.path: {e}; write one with `python -m data_prep`", e) from None
    if manifest.resolution != d.resolution:
        raise ConfigError(
            f"data.resolution: {d.resolution}, but the images at {d.path} are {manifest.resolution} pixels wide; "
            f"use data.resolution={manifest.resolution} or another data.path"
        )
    if config.model.classes and config.model.classes != len(manifest.classes):
        found = len(manifest.classes)
        raise ConfigError(
            f"model.classes: {config.model.classes}, but the images at {d.path} are of {found or 'no'} classes; "
            f"use model.classes={found}"
        )
    for field, split in (("train_split", d.train_split), ("eval_split", d.eval_split)):
        if split not in manifest.splits:
            raise ConfigError(f"data.{field}: {d.path} has no split {split!r}; it has {', '.join(manifest.splits)}")
        if not manifest.splits[split].samples:
            raise ConfigError(f"data.{field}: {split!r} of {d.path} has no images; write the data set again")
    return manifest


def find_checkpoints(
    config: Config, manifest: Manifest | None, known: Iterable[checkpoints.Checkpoint] = ()
) -> list[checkpoints.Checkpoint]:
    """Return the run's checkpoints; the first, from which it would resume, fits config and data. A new run has none.

    Args:
        known: what an earlier call has found: their manifests are not read again.
    """
    try:
        found, unreadable = checkpoints.survey(config.root, known)
    except storage.StorageError as e:
        raise ConfigError.because(f"run.storage: {e}", e) from None
    if unreadable and not found:
        raise ConfigError(
            f"run.storage: {unreadable[0].why}; no checkpoint can be read: delete {checkpoints.folder(config.root)} to "
            "start from step 0"
        )
    if not found:
        return []
    problems = checkpoints.differences(found[0], config, manifest.fingerprint if manifest else None)
    if found[0].step > config.train.max_steps:
        problems.append(
            f"train.max_steps: {config.train.max_steps}, and the run has made {found[0].step} steps; give at least "
            "that, or export an earlier checkpoint with `python -m eiwtrain.export STEP`"
        )
    if problems:
        raise ConfigError("\n".join(problems[:4]))
    return found
