"""A real small cluster on one machine: Ray with worker nodes, an S3 server (SeaweedFS) and an MLflow server.

    python -m cluster.local up         # prints the environment to export and commands to try
    python -m cluster.local status
    python -m cluster.local down

For trying things out and for tests. Not for production; the command starts nodes without GPUs. All of it listens on
loopback; Ray asks for a token, S3 for keys, MLflow for nothing: anyone else with an account on this machine can read
and write its runs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from cluster.local.processes import Process, spawn
from cluster.local.ray_nodes import CLIENT_ENV, HOST, Node, RayNodes, SlowError, last_line
from cluster.local.state import TEMP_PREFIX, TOKEN, LocalError, claim, down, forget, record, status, write
from cluster.s3 import S3Error, S3Server
from eiwtrain.storage.database import sqlite_uri

__all__ = ["LocalCluster", "LocalError", "Node", "down", "status"]

_START_SECONDS = 120.0
_STOP_SECONDS = 10.0
_TRIES = 3


class LocalCluster:
    """Ray, S3 and MLflow on this machine. A context manager: started on entry, stopped on exit.

    Objects, credentials and MLflow's database are kept in the folder, and so come back with the next cluster in it.

    Attributes:
        env: what a program needs in its environment to use all of it; `ray.init()` joins, `ray job submit` submits.
        job_address: `http://127.0.0.1:port` of Ray's job API.
        bucket: of the S3 server.
        mlflow_uri: of the MLflow server; empty without one.
        s3: the S3 server.
        nodes: the worker nodes, in the order of their start, the dead ones included.
        head: the head node.

    Args:
        folder: where all is kept but Ray's own files, which are in a new folder under /tmp; made if absent. An existing
            one must be empty or a cluster's.
        nodes: how many worker nodes.
        cpus: of each worker node, as Ray counts them.
        s3: whether to start an S3 server; without it MLflow keeps its artifacts in the folder.
        mlflow: whether to start an MLflow server.
        head_cpus: of the head node; 0 keeps work off it.
        gpus: those of this machine that worker nodes have, one each, as CUDA_VISIBLE_DEVICES names them. A node that is
            added gets that of a dead one.
        gcs_port, job_port, s3_port, mlflow_port: by default, as for 0, free ones.
    """

    def __init__(
        self,
        folder: str | Path,
        nodes: int = 2,
        cpus: int = 1,
        s3: bool = True,
        mlflow: bool = True,
        head_cpus: int = 0,
        *,
        gpus: Sequence[str] = (),
        gcs_port: int | None = None,
        job_port: int | None = None,
        s3_port: int | None = None,
        mlflow_port: int | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()
        self._count, self._cpus, self._head_cpus = nodes, cpus, head_cpus
        self._has_s3, self._has_mlflow = s3, mlflow
        self._wanted = {"gcs": gcs_port, "jobs": job_port, "mlflow": mlflow_port, "client": None, "metrics": None}
        self._ports: dict[str, int] = {}
        self._mlflow: Process | None = None
        self._temp: Path | None = None
        self.s3 = S3Server(self.folder / "s3", port=s3_port)
        self.nodes: list[Node] = []
        self._gpus: dict[str, Node | None] = dict.fromkeys(gpus)
        self._spawned: list[Process] = []  # of Ray

    @property
    def bucket(self) -> str:
        return self.s3.bucket

    @property
    def job_address(self) -> str:
        return f"http://{HOST}:{self._ports['jobs']}"

    @property
    def mlflow_uri(self) -> str:
        return f"http://{HOST}:{self._ports['mlflow']}" if self._has_mlflow else ""

    @property
    def env(self) -> dict[str, str]:
        return {
            "RAY_ADDRESS": f"{HOST}:{self._ports['gcs']}",
            "RAY_API_SERVER_ADDRESS": self.job_address,
            **CLIENT_ENV,
            **self._shared_env,
        }

    @property
    def _shared_env(self) -> dict[str, str]:
        """Variables that the nodes also have, as pods have the secrets that they are given."""
        ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self._token)}
        mlflow = {"MLFLOW_TRACKING_URI": self.mlflow_uri} if self._has_mlflow else {}
        return ray | self._s3_env | mlflow

    @property
    def _s3_env(self) -> dict[str, str]:
        if not self._has_s3:
            return {}
        root = f"s3://{self.bucket}"
        return self.s3.env | {"EIWTRAIN_STORAGE": f"{root}/runs", "EIWTRAIN_DATA": f"{root}/data"}

    @property
    def _token(self) -> Path:
        return self.folder / TOKEN

    def start(self) -> None:
        """Start all of it and wait until it can be used; where that fails, stop what was started.

        Raises:
            LocalError: it cannot be started, or a cluster of this folder runs already or is being started.
        """
        with claim(self.folder):
            try:
                self._start()
            except S3Error as e:
                self.stop()
                raise LocalError(str(e)) from None
            except BaseException:
                self.stop()
                raise

    def _start(self) -> None:
        write(self._token, secrets.token_hex(32))
        self._ports = _choose(self._wanted)
        if self._has_s3:
            self.s3.start(self._record)
        # Ray opens its own folder to all, so it is one inside a closed one; the path is short: it holds sockets
        self._temp = Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir="/tmp"))
        self._ray = RayNodes(self.folder, self._temp / "ray", self._ports, self._shared_env)
        if self._has_mlflow:
            self._spawn_mlflow()
        self.head = self._join(lambda: self._ray.spawn_head(self._head_cpus))
        self.nodes = []
        for _ in range(self._count):
            self.add_node()
        self._await(f"{self.job_address}/api/version", "Ray's job API", self.head.process)
        if self._has_mlflow:
            self._await_mlflow()
        self._record()

    def stop(self) -> None:
        """Stop all that was started, jobs and their processes included. Nothing happens when nothing runs."""
        for process in reversed(self._spawned):
            process.kill()
        self.stop_mlflow()
        self.s3.stop()
        self._spawned = []
        forget(self.folder)
        if self._temp is not None:
            shutil.rmtree(self._temp, ignore_errors=True)
            self._temp = None

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def add_node(self) -> Node:
        """Start one more worker node, as when one comes (back), and append it to `nodes`.

        Raises:
            LocalError: it does not come up.
        """
        gpu = next((gpu for gpu, node in self._gpus.items() if node is None or not node.alive), None)
        node = self._join(lambda: self._ray.spawn_node(f"node-{len(self.nodes) + 1}", self._cpus, gpu))
        self.nodes.append(node)
        if gpu is not None:
            self._gpus[gpu] = node
        return node

    def start_mlflow(self) -> None:
        """Start the MLflow server again, with the same port and database, and wait until it answers.

        Raises:
            LocalError: it does not.
        """
        self._spawn_mlflow()
        self._await_mlflow()

    def stop_mlflow(self) -> None:
        """Stop the MLflow server in order. Nothing happens when it is not running."""
        if self._mlflow is not None:
            self._mlflow.stop(_STOP_SECONDS)
            self._mlflow = None

    def kill_mlflow(self) -> None:
        """Kill the MLflow server by SIGKILL. Nothing happens when it is not running."""
        if self._mlflow is not None:
            self._mlflow.kill()
            self._mlflow = None

    def _join(self, spawn_node: Callable[[], Process]) -> Node:
        """Start a node and wait for it; try again where the machine is so busy that Ray gives up."""
        for attempt in range(_TRIES):
            process = spawn_node()
            self._spawned.append(process)
            self._record()
            try:
                return self._ray.wait(process)
            except BaseException as e:
                process.kill()
                if not isinstance(e, SlowError) or attempt == _TRIES - 1:
                    raise
                self._spawned.remove(process)
        raise AssertionError("unreachable")

    def _spawn_mlflow(self) -> None:
        artifacts = f"s3://{self.bucket}/mlflow" if self._has_s3 else str(self.folder / "mlartifacts")
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(self._ports["mlflow"]),
            "--workers", "1", "--backend-store-uri", sqlite_uri(self.folder / "mlflow.db"),
            "--artifacts-destination", artifacts,
        ]  # fmt: skip
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        own = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        env = own | (self.s3.env if self._has_s3 else {}) | quiet
        self._mlflow = spawn("mlflow", command, env, self.folder / "mlflow.log")
        self._record()

    def _await_mlflow(self) -> None:
        assert self._mlflow is not None
        self._await(f"{self.mlflow_uri}/health", "MLflow", self._mlflow)

    def _await(self, url: str, what: str, process: Process) -> None:
        """Wait until the URL answers. Raises LocalError where its server exits or takes too long."""
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self._token.read_text()}"})
        log = self.folder / f"{process.name}.log"
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                urllib.request.urlopen(request, timeout=10).close()
                return
            except OSError as e:
                if not process.alive:
                    raise LocalError(f"{what} ended: {last_line(log.read_text(errors='replace'))} ({log})") from None
                if time.monotonic() > end:
                    raise LocalError(f"{what} does not answer within {_START_SECONDS:g} s ({e}): see {log}") from None
            time.sleep(0.2)

    def _record(self) -> None:
        """Record what runs, for `status` and `down` in another process."""
        processes = [*self._spawned, *([self._mlflow] if self._mlflow else [])]
        if self._has_s3 and self.s3.pid is not None:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has died by itself
                processes.append(Process.of("s3", self.s3.pid))
        record(self.folder, processes, self._temp)


def _choose(wanted: Mapping[str, int | None]) -> dict[str, int]:
    """Return a port of the loopback interface for each name: the given one, or a free one where it is None or 0.

    Raises:
        LocalError: a given port is taken.
    """
    with contextlib.ExitStack() as opened:
        ports = {}
        for name, port in wanted.items():
            listener = opened.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((HOST, port or 0))
            except (OSError, OverflowError) as e:
                raise LocalError(f"port {port} for {name} is not available ({e})") from None
            ports[name] = listener.getsockname()[1]
    return ports
