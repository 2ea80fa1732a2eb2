"""Nodes of a Ray cluster on one machine, each a `ray start` of its own that listens on loopback alone.

Not for S3, MLflow and the command line: those are `cluster.local`'s.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from cluster.local.processes import Process, spawn
from cluster.local.state import LocalError
from cluster.raylets import drain_command, node_id

HOST = "127.0.0.1"
_START_SECONDS = 120.0
_DRAIN_SECONDS = 60.0
_OBJECT_STORE_BYTES = 80_000_000  # Ray's minimum is 75 MB

# `ray start` puts this machine's outer address in the place of 127.0.0.1, and a Ray node of another address than that
# listens on all interfaces. The variable, which Ray reads on import, says the same to the drivers of submitted jobs:
# "this is macOS, where clusters are on loopback". It is set to 1 for `ray start` itself, which then refuses workers.
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_RAY = f"""
import os
from ray._private import services
services.resolve_ip_for_localhost = lambda host: host
os.environ["{_LOOPBACK}"] = "0"
from ray.scripts.scripts import main
main()
"""
CLIENT_ENV = {_LOOPBACK: "0", "RAY_USAGE_STATS_ENABLED": "0"}

# A dead node is known within about 3 s (Ray's own: 15 s), a node that only stalls is given 15 s.
_HEALTH_ENV = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}


class SlowError(LocalError):
    """Ray gives a node 30 s to come up, and this machine had too much else to do."""


class Node:
    """A Ray node: its processes, and the faults that can be made to happen to it.

    Attributes:
        process: its `ray start`, from which all others of the node descend.
        node_id: Ray's hex id.
    """

    def __init__(self, process: Process, address: str, env: Mapping[str, str]) -> None:
        self.process, self._address, self._env = process, address, env
        self._raylet, self.node_id = _raylet(process)

    @property
    def pid(self) -> int:
        """The pid of its `ray start`."""
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether its raylet runs; the cluster learns of a death a few seconds later (`ray.nodes()`).

        The raylet of a node that was drained exits by itself, and leaves its `ray start` running.
        """
        return self._raylet.alive

    def kill(self) -> None:
        """Kill all its processes, Ray's and its workers', by SIGKILL, as when a machine loses its power."""
        self.process.kill()

    def terminate(self) -> None:
        """Send SIGTERM to its `ray start`: Ray drains the node, for up to 30 s, and stops it. Return at once."""
        self.process.terminate()

    def drain(self, deadline_seconds: float = 30.0, reason: str = "preempted") -> None:
        """Announce to Ray that the node goes away after a deadline, as a cloud's preemption notice does.

        Ray puts nothing new on it, and stops it once it has nothing to do. At the deadline nothing stops it: `kill` it.

        Args:
            deadline_seconds: rounded up to whole seconds.

        Raises:
            LocalError: the node is dead, or Ray cannot be asked.
        """
        if not self.alive:  # Ray would accept it
            raise LocalError(f"node {self.node_id} cannot be drained: it is dead")
        command = drain_command(self._address, self.node_id, math.ceil(deadline_seconds), reason)
        done = subprocess.run(command, env=self._env, capture_output=True, text=True, timeout=_DRAIN_SECONDS)
        if done.returncode:
            raise LocalError(f"Ray does not drain node {self.node_id}: {last_line(done.stderr)}")


class RayNodes:
    """Starts nodes.

    Args:
        folder: where the output of each node's `ray start` goes.
        temp: Ray's own folder, for sockets and logs; its path must be short.
        ports: of the head, by name: gcs, jobs, client, metrics.
        env: variables of the nodes, e.g. the token, in addition to this process's own without its Ray settings.
    """

    def __init__(self, folder: Path, temp: Path, ports: Mapping[str, int], env: Mapping[str, str]) -> None:
        self._folder, self._temp, self._ports = folder, temp, ports
        own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{own.get('PATH', os.defpath)}"  # a job's `python` is this one
        self._env = own | dict(env) | CLIENT_ENV | {"PATH": path}

    @property
    def address(self) -> str:
        """The cluster's address, for a driver that joins it."""
        return f"{HOST}:{self._ports['gcs']}"

    def spawn_head(self, cpus: int) -> Process:
        """Begin to start the head node."""
        metrics = {"DASHBOARD_METRIC_PORT": str(self._ports["metrics"])}
        return self._spawn(
            "head", cpus, _HEALTH_ENV | metrics, "--head", f"--port={self._ports['gcs']}", "--no-monitor",
            f"--dashboard-host={HOST}", f"--dashboard-port={self._ports['jobs']}",
            f"--ray-client-server-port={self._ports['client']}",
        )  # fmt: skip

    def spawn_node(self, name: str, cpus: int, gpu: str | None = None) -> Process:
        """Begin to start a worker node, with this GPU of the machine or with none; the head must be there."""
        env, gpus = ({}, 0) if gpu is None else ({"CUDA_VISIBLE_DEVICES": gpu}, 1)
        return self._spawn(name, cpus, env, f"--address={self.address}", "--include-log-monitor=false", gpus=gpus)

    def wait(self, process: Process) -> Node:
        """Wait until a node that was begun is part of the cluster.

        Raises:
            SlowError: it is not, as it took too long; another may be.
            LocalError: it is not.
        """
        log = self._folder / f"{process.name}.log"
        end = time.monotonic() + _START_SECONDS
        while "Ray runtime started." not in (said := log.read_text(errors="replace")):
            if not process.alive:
                error = SlowError if "timed out during startup" in said else LocalError
                raise error(f"Ray's node {process.name} ended: {last_line(said)} ({log})")
            if time.monotonic() > end:
                raise LocalError(f"Ray's node {process.name} is not up within {_START_SECONDS:g} s: see {log}")
            time.sleep(0.1)
        return Node(process, self.address, self._env)

    def _spawn(self, name: str, cpus: int, env: Mapping[str, str], *options: str, gpus: int = 0) -> Process:
        command = [
            sys.executable, "-c", _RAY, "start", *options, "--block", f"--node-ip-address={HOST}",
            f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--object-store-memory={_OBJECT_STORE_BYTES}",
            "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
            f"--temp-dir={self._temp}", "--disable-usage-stats",
        ]  # fmt: skip
        return spawn(name, command, {**self._env, **env, _LOOPBACK: "1"}, self._folder / f"{name}.log")


def _raylet(process: Process) -> tuple[Process, str]:
    """Return the node's raylet and the hex id that it was given."""
    for each in process.family():
        try:
            if found := node_id(each.cmdline()):
                return Process.of("raylet", each.pid), found
        except psutil.Error:
            continue
    raise LocalError(f"Ray's node {process.name} ended as soon as it was up")


def last_line(text: str) -> str:
    """Return the last line that a program printed, cut to a readable length."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
