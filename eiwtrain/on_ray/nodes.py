"""Asks every node of a cluster a question, by a process of Ray on each. Not for the workers of training."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from eiwtrain.on_ray import session
from eiwtrain.terminal.lines import one_line


class Asked:
    """A process on a node, which calls functions of installed modules and can listen at a port."""

    def __init__(self, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        self._server: socket.socket | None = None

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return what the function returns here."""
        return function(*args)

    def listen(self) -> tuple[str, int]:
        """Return an address at which this process listens from now on."""
        import ray

        host = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = socket.create_server((host, 0), family=family, backlog=1024)
        return host, self._server.getsockname()[1]


@contextlib.contextmanager
def asked() -> Iterator[dict[str, Any]]:
    """Yield, by its address, the handle of a process on each node that lives and stays; they end with the block. Ray
    must be running."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    going = session.draining()
    made = ray.remote(num_cpus=0, max_restarts=0)(Asked)
    processes = {}
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in going:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            name = node["NodeManagerAddress"]
            name = f"{name} ({node['NodeID'][:6]})" if name in processes else name  # several on one machine
            options = made.options(scheduling_strategy=here, runtime_env=session.light())
            processes[name] = options.remote(session.forwarded_environment())
    try:
        yield processes
    finally:
        for process in processes.values():
            ray.kill(process)


def answers(calls: dict[str, Any], patience: float) -> dict[str, Any]:
    """Return the answer of each node, or an exception: what was raised there, or TimeoutError after the patience, in
    seconds."""
    import ray

    end, found = time.monotonic() + patience, {}
    for name, call in calls.items():
        try:
            found[name] = ray.get(call, timeout=max(0.1, end - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            found[name] = TimeoutError(f"no answer within {patience:.0f} s")
        except ray.exceptions.RayTaskError as e:
            found[name] = e.cause if isinstance(e.cause, Exception) else RuntimeError(one_line(e, 300))
        except ray.exceptions.RayError as e:
            found[name] = RuntimeError(one_line(e, 300))
    return found


def reach(addresses: list[tuple[str, int]], seconds: float) -> list[str]:
    """Return those addresses, as host:port, to which this process cannot connect."""
    closed = []
    for host, port in addresses:
        try:
            socket.create_connection((host, port), seconds).close()
        except OSError:
            closed.append(f"{host}:{port}")
    return closed


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Run the block in the cluster that `RAY_ADDRESS` names, or in a Ray of this process whose files are then deleted.

    Raises:
        RayError: it cannot be joined or started.
    """
    from eiwtrain.on_ray import address

    folder = address.folder()
    before = set(folder.iterdir()) if folder.is_dir() else None
    try:
        session.start(1)
        yield
    finally:
        session.stop()
        if not session.joins_cluster():
            for own in set(folder.glob(f"session_*_{os.getpid()}")) - (before or set()):  # Ray ends it with the process
                shutil.rmtree(own, ignore_errors=True)
            if (latest := folder / "session_latest").is_symlink() and not latest.exists():
                latest.unlink(missing_ok=True)
            if before is None:
                with contextlib.suppress(OSError):
                    folder.rmdir()
