"""Starts Ray on this machine, or joins the cluster that `RAY_ADDRESS` names, and looks at its nodes.

Not for what runs on it. Importing this imports no Ray: `start` must set variables first, which Ray reads at its import.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import signal
import sys
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eiwtrain.on_ray import address
from eiwtrain.on_ray.address import RayError
from eiwtrain.terminal.lines import one_line

if TYPE_CHECKING:
    from eiwtrain.config import Config, Workers  # which data_prep does not need

_OBJECT_STORE_BYTES = 128 << 20  # nothing but small messages goes through Ray's object store
_ANSWER_SECONDS = 20.0  # within which a node that lives starts a task
_READY_SECONDS = 10**8  # for which a process waits for an attempt: by itself Ray ends one that waits for a second

# Settings of glibc in workers: a freed activation stays with the process, or each would be unmapped and faulted in
# again, which doubles the time of a backward pass that recomputes. Values above any activation's size.
WORKER_ENV = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}

# For `eiwtrain.train.preload`, in the environment of Ray's processes: CPUs and GPUs of a worker; empty: no imports.
PRELOAD, PRELOAD_GPUS = "EIWTRAIN_PRELOAD", "EIWTRAIN_PRELOAD_GPUS"
PRELOADED = "RAY_preload_python_modules"  # Ray's name of the variable with modules that its processes import

# The driver's settings that workers need; they travel as arguments, so no process list or runtime_env shows them.
_FORWARDED = ("AWS_", "MLFLOW_", "FSSPEC_", "GOOGLE_", "AZURE_", "NCCL_", "EIWTRAIN_")

# The path, in Ray's folder, of the socket with the longest name, and how long Linux lets a path of one be.
_LONGEST_SOCKET = Path("session_2000-01-01_00-00-00_000000_1", "sockets", "plasma_store")
_SOCKET_BYTES = 107

_ESSENTIAL = ("raylet", "gcs_server")  # the processes of Ray without which nothing works

START_SECONDS = 300.0  # least time of a worker to its first step: a checkpoint may have to be fetched
OWN_DRAIN = "the drain of this job's own node"  # a reason to stop


def joins_cluster() -> bool:
    """Whether the job runs on an existing cluster: Ray sets the variable in a submitted job."""
    return bool(address.given())


def check() -> None:
    """Check, before Ray is imported, the cluster that `RAY_ADDRESS` names, or the folder for the sockets of a new Ray.

    Raises:
        RayError: Ray cannot be joined or started.
    """
    if joins_cluster():
        address.find()
        return
    if len(os.fsencode(address.folder() / _LONGEST_SOCKET)) > _SOCKET_BYTES:
        raise RayError(
            f"Ray cannot be started: sockets in {address.folder()} would have paths of over {_SOCKET_BYTES} bytes; set "
            "RAY_TMPDIR to a short path, e.g. RAY_TMPDIR=/tmp"
        )


def is_running() -> bool:
    """Whether this process has started or joined Ray already."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def has_died() -> bool:
    """Whether the Ray that this program has started is not whole any more; never true of a cluster that it has joined.

    Ray would say so after a minute, and then end this process.
    """
    if joins_cluster() or not is_running():
        return False
    node = sys.modules["ray"]._private.worker._global_node
    return node is not None and any(kind in _ESSENTIAL for kind, _ in node.dead_processes())


def start(cpus: int, config: Config | None = None) -> None:
    """Join the cluster, or start a Ray of `cpus` logical CPUs that listens on loopback and ends with this process.

    For training with `config`, a Ray of this process also starts processes for all workers, which import what they will
    need while the driver does other things.

    Ray takes SIGTERM for itself; afterwards its handler is again what it was, and has seen one that came meanwhile.

    Raises:
        RayError: it cannot.
        SystemExit: SIGTERM came meanwhile, and its handler has raised nothing.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "0")  # it is a thread of the driver
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # it restarts workers as it sees fit
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "120")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    where: dict[str, Any] = {}
    if not joins_cluster():
        if "ray" not in sys.modules:  # which reads these when it is imported, once for all
            # anyone else on this machine needs a token, this cluster's own: left to itself Ray would keep one in
            # ~/.ray, which the next `ray start` then asks for and `ray job submit` does not give
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            os.environ.setdefault(address.CLUSTERS_OF_MANY, "0")
        os.environ |= WORKER_ENV  # all of its processes inherit them
        _preload(config)
        where = {
            "address": "local",
            "num_cpus": cpus,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
    check()
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    try:
        try:
            with contextlib.nullcontext() if joins_cluster() else _of_this_program():
                ray.init(log_to_driver=False, logging_level="ERROR", **where)
            if config is not None:
                with contextlib.suppress(Exception):  # workers then wait for theirs
                    keep_ready(config.max_workers)
        finally:
            if handler is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
    except SystemExit:  # how Ray answers SIGTERM
        signal.raise_signal(signal.SIGTERM)
        raise
    except Exception as e:  # Ray promises none: it also raises OSError, TimeoutError, AssertionError and its own
        what = "RAY_ADDRESS: Ray cannot be joined" if joins_cluster() else "Ray cannot be started"
        why = one_line(e, 300) or type(e).__name__
        if isinstance(e, ConnectionError) and joins_cluster():
            why += "; if the cluster has a token, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or ~/.ray/auth_token give it"
        elif isinstance(e, OSError) and not isinstance(e, (ConnectionError, TimeoutError)):
            why += f"; its files are in {address.folder()}: set RAY_TMPDIR to a short path with room that is yours"
        raise RayError(f"{what}: {why}") from None


@contextlib.contextmanager
def _of_this_program() -> Iterator[None]:
    """Have Ray start no more processes than one program on one machine needs, in sessions of their own.

    A signal to the whole process group of this program, as `timeout` and a terminal that closes send it, is for this
    program alone: the workers still have to write a checkpoint. Ray's processes end with this one nevertheless.
    """
    from ray._private import services
    from ray._private.node import Node

    instead = {
        (services, "ConsolePopen"): functools.partial(services.ConsolePopen, start_new_session=True),
        (Node, "start_monitor"): _start_none,  # of an autoscaler
        (Node, "start_log_monitor"): _start_none,  # which would copy the workers' output to this program's
        (Node, "start_api_server"): _start_none,  # of the dashboard, for which Ray would wait
    }
    before = {where: getattr(*where) for where in instead}
    for (owner, name), replacement in instead.items():
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for (owner, name), original in before.items():
            setattr(owner, name, original)


def _preload(config: Config | None) -> None:
    """Have the processes of a new Ray import what a worker of `config` needs, or nothing."""
    os.environ[PRELOAD], os.environ[PRELOAD_GPUS] = "", ""
    if config is not None:
        os.environ[PRELOAD], os.environ[PRELOAD_GPUS] = str(config.workers.cpus), str(config.workers.gpus)
        os.environ.setdefault(PRELOADED, "eiwtrain.train.preload")
        # by itself Ray starts a process for each CPU, and keeps the driver waiting for the first of them
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")


def keep_ready(workers: int) -> None:
    """Have the Ray of this process start processes for so many workers, which wait, with their imports made, until an
    attempt takes them; it does nothing on a cluster. If memory runs out, Ray kills those that wait before others."""
    if joins_cluster():
        return
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

    (node,) = ray.nodes()
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    request = PrestartWorkersRequest(job_id=job, num_workers=workers, keep_alive_duration_secs=_READY_SECONDS)
    request.runtime_env_info.serialized_runtime_env = "{}"
    with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_ANSWER_SECONDS)


def light() -> dict[str, Any] | None:
    """Return the runtime environment of an actor that is no worker: it imports nothing that it does not need."""
    return None if joins_cluster() else {"env_vars": {PRELOAD: ""}}


def _start_none(node: Any, **_: Any) -> None:
    """Start no process, where Ray's `Node` would, and leave no address of a dashboard."""
    node._webui_url = ""


def stop() -> None:
    """Leave the cluster, or stop the Ray of this process, also one whose start broke off."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


def resources(workers: Workers) -> dict[str, float]:
    """Return what Ray is to reserve for each worker."""
    wanted: dict[str, float] = {"CPU": workers.cpus}
    return wanted | ({"GPU": workers.gpus} if workers.gpus else {})


def draining() -> set[str]:
    """Return the ids of the nodes that are being drained: nothing new is placed on them, and soon they are gone."""
    from ray._private.state import state  # there is no public way to know

    return set(state.get_draining_nodes())


def own_node() -> str:
    """Return Ray's id of the node that this process is on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def own_node_drains() -> bool:
    """Whether the node that this process is on is being drained."""
    return own_node() in draining()


def worker_gpu() -> Any:
    """Return the `torch.device` of the GPU that Ray Train has given this worker."""
    from ray.train.torch import get_device

    return get_device()


def room(config: Config, own: Collection[str] = (), patience: float = _ANSWER_SECONDS) -> int:
    """Return for how many workers there is room, at most `config.max_workers`, on nodes that live and stay.

    Args:
        own: the node of each worker that already runs; its place counts as free.
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
    # a Ray of this process is on this machine alone: a process to try it would only keep workers waiting
    unsure = [node for node, n in places.items() if n and node not in own and joins_cluster()]
    found = sum(n for node, n in places.items() if node not in unsure)
    if found < config.max_workers:
        found += sum(places[node] for node in _answering(unsure, patience))
    return min(found, config.max_workers)


def free_places() -> None:
    """Give back every place that this job's attempts hold in the cluster, and end the workers in it. Call it while no
    attempt runs.

    Ray does so when workers return or die, but not when they fail while they start, nor when Ray Train's own process
    dies: then a place is held until the job ends.
    """
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    job = ray.get_runtime_context().get_job_id()  # with which the ids of all that belongs to the job end
    for name, about in placement_group_table().items():
        if name.endswith(job) and about["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


def _answering(nodes: Collection[str], patience: float) -> list[str]:
    """Return those nodes that start a task: Ray does not know yet of one that died a moment ago."""
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
    """Return the variables that a worker's process starts with.

    Ray shows them, so they hold no secret; gloo reads its settings before a worker could set them for itself.
    """
    return WORKER_ENV | {k: v for k, v in os.environ.items() if k.startswith("GLOO_")}


def forwarded_environment() -> dict[str, str]:
    """Return the driver's credentials and settings that a worker is to set for itself."""
    return {k: v for k, v in os.environ.items() if k.startswith(_FORWARDED)}
