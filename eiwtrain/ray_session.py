"""Start Ray on this machine, or join the cluster that `RAY_ADDRESS` names. Not for what runs on it."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import Any

from eiwtrain.storage import is_local

_OBJECT_STORE_BYTES = 128 << 20  # nothing but small messages goes through Ray's object store

# The driver's settings that workers need; they travel as arguments, so no process list or runtime_env shows them.
_FORWARDED = ("AWS_", "MLFLOW_", "FSSPEC_", "GOOGLE_", "AZURE_", "NCCL_", "EIWTRAIN_")


class RayError(RuntimeError):
    """Ray can neither be joined nor started; the message is one line."""


def joins_cluster() -> bool:
    """Whether the job is to run on a cluster that is there: Ray sets the variable in a submitted job."""
    return bool(os.environ.get("RAY_ADDRESS"))


def anchored(url: str) -> str:
    """A local path made absolute, for workers have working directories of their own; any other URL as it is.

    In a submitted job, whose working directory is a copy that goes when it ends, relative paths are in `~/eiwtrain`.
    """
    if not is_local(url):
        return url
    job = "working_dir_files" in Path.cwd().parts  # where Ray unpacks a job's working directory
    return str((Path.home() / "eiwtrain" if job else Path.cwd()) / Path(url.removeprefix("file://")).expanduser())


def is_running() -> bool:
    """Whether this process has started or joined Ray already."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def start(cpus: int) -> None:
    """Join the cluster, or start a Ray of so many logical CPUs that listens on loopback and ends with this process.

    Ray takes SIGTERM for itself meanwhile and afterwards.

    Raises:
        RayError: it cannot.
        SystemExit: SIGTERM came meanwhile.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    where: dict[str, Any] = {}
    if not joins_cluster():
        # Ray's servers listen on every interface, so this cluster asks for a token, of its own: left to itself Ray
        # would keep one in ~/.ray, which the next `ray start` then asks for and `ray job submit` does not give.
        if "ray" not in sys.modules:  # which reads this when it is imported, once for all
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        where = {
            "address": "local",
            "num_cpus": cpus,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
    import ray

    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **where)
    except (ConnectionError, ValueError, RuntimeError) as e:
        verb, cause = "joined" if joins_cluster() else "started", " ".join(str(e).split())[:300]
        raise RayError(f"RAY_ADDRESS: Ray cannot be {verb}: {cause}") from None


def forwarded_environment() -> dict[str, str]:
    """The driver's credentials and settings that a worker is to set for itself."""
    return {k: v for k, v in os.environ.items() if k.startswith(_FORWARDED)}
