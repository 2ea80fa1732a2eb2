"""Curves of how busy the machines are while they train, and of the memory of the workers.

One rank of each node reads MLflow's collectors, whose names under `system/` its UI knows. The points go through rank 0,
so that they wait, are fenced and are logged as all others; MLflow's own monitor would log from each node by itself, and
stop for good when the server is away once. Not for how fast training is (`eiwtrain.train.report`) or where its time
goes (`eiwtrain.train.goodput`).
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import psutil
import torch
import torch.distributed as dist

from eiwtrain.terminal.lines import one_line
from eiwtrain.tracking import curves

_POINT_SECONDS = 10.0  # at least, between two points; a machine is read as often
_KEPT = (  # of all that the collectors read: what shows which resource a machine is short of
    "cpu_utilization_percentage",
    "system_memory_usage_percentage",
    "disk_usage_percentage",
    "network_receive_megabytes",
    "network_transmit_megabytes",
    "gpu_utilization_percentage",
    "gpu_memory_usage_percentage",
    "gpu_power_usage_watts",
)


class System:
    """One rank's share in the curves of the machines.

    Args:
        nodes: a name of each rank's node.
        device: of this rank.
        note: prints a line for the user.
    """

    def __init__(self, nodes: Sequence[str], device: torch.device, note: Callable[[str], None]) -> None:
        self._rank, self._device = dist.get_rank(), device
        self._nodes = list(dict.fromkeys(nodes))
        first = nodes.index(nodes[self._rank]) == self._rank
        self._machine = Machine(device.type == "cuda", note) if first else None
        self._node = self._nodes.index(nodes[self._rank])
        self._process = psutil.Process()
        self._next = 0.0

    def due(self) -> bool:
        """Return whether there should be points now; False on all ranks but 0."""
        return self._rank == 0 and time.monotonic() >= self._next

    def curves(self) -> dict[str, float]:
        """Return the points of now on rank 0, and none on other ranks. Collective.

        Nodes are numbered in the order of their first ranks. A node's CPU utilization is the mean since it was read
        before, its GPUs are averaged, and its network traffic is in megabytes since the worker was started.
        """
        self._next = time.monotonic() + _POINT_SECONDS
        own = {curves.HOST_GB: self._process.memory_info().rss / 1e9}
        if self._device.type == "cuda":
            own[curves.GPU_PEAK_GB] = torch.cuda.max_memory_allocated(self._device) / 1e9
            torch.cuda.reset_peak_memory_stats(self._device)
        machine = self._machine.latest if self._machine is not None else {}
        gathered: list[Any] | None = [None] * dist.get_world_size() if self._rank == 0 else None
        dist.gather_object((self._node, own, machine), gathered, dst=0)
        points: dict[str, float] = {}
        pattern = curves.NODE_SYSTEM if len(self._nodes) > 1 else curves.SYSTEM
        for node, memory, values in gathered or ():
            points |= {name: max(value, points.get(name, 0.0)) for name, value in memory.items()}
            points |= {pattern.format(node=node, name=name): value for name, value in values.items()}
        return points

    def close(self) -> None:
        """Stop reading the machine."""
        if self._machine is not None:
            self._machine.close()


class Machine:
    """This machine, read every few seconds in a thread.

    Args:
        gpus: whether to read GPUs also.
        note: prints a line for the user.
    """

    def __init__(self, gpus: bool, note: Callable[[str], None]) -> None:
        psutil.cpu_percent()  # each reading is the mean since the one before
        self._collectors = _collectors(gpus, note)
        self.latest = self._read()
        """The newest reading, by the names of `_KEPT`."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="system metrics")
        self._thread.start()

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._closed.wait(_POINT_SECONDS):
            self.latest = self._read()

    def _read(self) -> dict[str, float]:
        values: dict[str, list[float]] = {}
        for collector in self._collectors:
            with contextlib.suppress(Exception):  # a counter that cannot be read now is left out
                collector.collect_metrics()
            for name, value in collector.aggregate_metrics().items():
                values.setdefault(re.sub(r"^gpu_\d+_", "gpu_", name), []).append(float(value))
            collector.clear_metrics()
        return {name: fmean(values[name]) for name in _KEPT if name in values}


def _collectors(gpus: bool, note: Callable[[str], None]) -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    kinds: list[Callable[[], Any]] = [CPUMonitor, DiskMonitor, NetworkMonitor]
    if gpus:
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

        kinds.append(GPUMonitor)
    collectors = []
    for kind in kinds:
        try:
            collectors.append(kind())
        except Exception as e:  # without nvidia-ml-py, or in a container that hides its counters
            note(f"some curves under system/ are missing: {one_line(e, limit=None)}")
    return collectors
