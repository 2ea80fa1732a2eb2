"""Start Ray on this machine, or join the cluster that `RAY_ADDRESS` names. Not for what runs on it."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Collection
from typing import Any

from eiwtrain.config import Config, Workers
from eiwtrain.terminal.lines import one_line

_OBJECT_STORE_BYTES = 128 << 20  # nothing but small messages goes through Ray's object store
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 20.0  # within which a node that lives starts a task

# Told to glibc where workers start: a freed activation stays with the process, or each would be unmapped and faulted
# in again, which doubles the time of a backward pass that recomputes. Values above any activation's size.
WORKER_ENV = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}

# The driver's settings that workers need; they travel as arguments, so no process list or runtime_env shows them.
_FORWARDED = ("AWS_", "MLFLOW_", "FSSPEC_", "GOOGLE_", "AZURE_", "NCCL_", "EIWTRAIN_")

# Off, and 127.0.0.1 stays what it is: else Ray puts this machine's outer address in its place, and a Ray of another
# address than that listens on all interfaces.
_CLUSTERS_OF_MANY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

OWN_DRAIN = "the drain of this job's own node"  # why a job stops


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
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # it restarts workers as it sees fit
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "120")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    where: dict[str, Any] = {}
    if not joins_cluster():
        if "ray" not in sys.modules:  # which reads these when it is imported, once for all
            # whoever else is on this machine needs a token, this cluster's own: left to itself Ray would keep one in
            # ~/.ray, which the next `ray start` then asks for and `ray job submit` does not give
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            os.environ.setdefault(_CLUSTERS_OF_MANY, "0")
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
        raise RayError(f"{what}: {one_line(e, 300)}") from None


def resources(workers: Workers) -> dict[str, float]:
    """What Ray is to reserve for each worker."""
    wanted: dict[str, float] = {"CPU": workers.cpus}
    return wanted | ({"GPU": workers.gpus} if workers.gpus else {})


def draining() -> set[str]:
    """Ids of the nodes that are being drained: nothing new is placed on them, and soon they are gone."""
    from ray._private.state import state  # there is no public way to know

    return set(state.get_draining_nodes())


def own_node_drains() -> bool:
    """Whether the node that this process is on is being drained."""
    import ray

    return ray.get_runtime_context().get_node_id() in draining()


def room(config: Config, own: Collection[str] = (), patience: float = _ANSWER_SECONDS) -> int:
    """How many workers there is room for, at most `config.max_workers`, on nodes that live and stay.

    Args:
        own: the node of each worker that runs already; its place counts as free.
        patience: seconds within which a node must answer to count.
    """
    import ray
    from ray._private.state import available_resources_per_node

    wanted, going = resources(config.workers), draining()
    free = available_resources_per_node()
    places: dict[str, int] = {}
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in going:
            there, held = free.get(node["NodeID"], {}), list(own).count(node["NodeID"])
            places[node["NodeID"]] = int(min(there.get(kind, 0) // n for kind, n in wanted.items())) + held
    unsure = [node for node, n in places.items() if n and node not in own]
    found = sum(n for node, n in places.items() if node not in unsure)
    if found < config.max_workers:
        found += sum(places[node] for node in _answering(unsure, patience))
    return min(found, config.max_workers)


def _answering(nodes: Collection[str], patience: float) -> list[str]:
    """Those of the nodes that start a task: of one that died a moment ago Ray does not know yet."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    answers = {}
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        answers[ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(_hello).remote()] = node
    done, late = ray.wait(list(answers), num_returns=len(answers), timeout=patience) if answers else ([], [])
    for answer in late:
        ray.cancel(answer, force=True)
    return [answers[answer] for answer in done if _is_good(answer)]


def _hello() -> bool:
    return True


def _is_good(answer: Any) -> bool:
    import ray

    try:
        return bool(ray.get(answer))
    except ray.exceptions.RayError:
        return False


def worker_environment() -> dict[str, str]:
    """What a worker's process starts with. Ray shows it, so it is for no secret; gloo reads its settings before a
    worker could set them for itself."""
    return WORKER_ENV | {k: v for k, v in os.environ.items() if k.startswith("GLOO_")}


def forwarded_environment() -> dict[str, str]:
    """The driver's credentials and settings that a worker is to set for itself."""
    return {k: v for k, v in os.environ.items() if k.startswith(_FORWARDED)}
