"""Start Ray on this machine, or join the cluster that `RAY_ADDRESS` names. Not for what runs on it."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from typing import Any

_OBJECT_STORE_BYTES = 128 << 20  # nothing but small messages goes through Ray's object store
_CONNECT_SECONDS = 5.0

# The driver's settings that workers need; they travel as arguments, so no process list or runtime_env shows them.
_FORWARDED = ("AWS_", "MLFLOW_", "FSSPEC_", "GOOGLE_", "AZURE_", "NCCL_", "EIWTRAIN_")


class RayError(RuntimeError):
    """Ray can neither be joined nor started; the message is one line."""


def joins_cluster() -> bool:
    """Whether the job is to run on a cluster that is there: Ray sets the variable in a submitted job."""
    return bool(os.environ.get("RAY_ADDRESS"))


def check_address() -> None:
    """If `RAY_ADDRESS` names a cluster, something must answer there: `ray.init` would wait long, deaf to signals.

    Raises:
        RayError: nothing answers.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rsplit("/", 1)[-1].rpartition(":")
    if not port.isdigit():
        return  # none, or a word like "auto", which Ray looks up by itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as e:
        raise RayError(
            f"RAY_ADDRESS: nothing answers at {address} ({e}); start the cluster, or unset it to run on this machine"
        ) from None


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
    check_address()
    import ray

    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **where)
    except (ConnectionError, ValueError, RuntimeError) as e:
        what = "RAY_ADDRESS: Ray cannot be joined" if joins_cluster() else "Ray cannot be started"
        raise RayError(f"{what}: {' '.join(str(e).split())[:300]}") from None


def forwarded_environment() -> dict[str, str]:
    """The driver's credentials and settings that a worker is to set for itself."""
    return {k: v for k, v in os.environ.items() if k.startswith(_FORWARDED)}
