"""How busy the machines are while they train: a few curves a node, and the memory of the workers.

MLflow's own collectors, which its UI knows by the names that begin with `system/`, read on one rank of each node; the
points go through rank 0, so that they wait, are fenced and are logged as all others. Not for how fast training is
(`eiwtrain.train.report`) or where its time goes (`eiwtrain.train.goodput`).
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

_SAMPLE_SECONDS = 5.0
_POINT_SECONDS = 10.0  # at least, between two points
_KEPT = (  # of what the collectors know: what tells a machine that is short of something
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
        nodes: of each rank, what names its node.
        device: of this rank.
        note: says something to the user.
    """

    def __init__(self, nodes: Sequence[str], device: torch.device, note: Callable[[str], None]) -> None:
        self._rank, self._device = dist.get_rank(), device
        self._nodes = list(dict.fromkeys(nodes))
        first = nodes.index(nodes[self._rank]) == self._rank
        self._sampler = Sampler(device.type == "cuda", note) if first else None
        self._node = self._nodes.index(nodes[self._rank])
        self._process = psutil.Process()
        self._next = 0.0

    def due(self) -> bool:
        """Whether there should be points now; false on all ranks but 0."""
        return self._rank == 0 and time.monotonic() >= self._next

    def curves(self) -> dict[str, float]:
        """The points since the last, on rank 0; empty on others. Collective.

        `system/NAME`, with several nodes `system/nodeK/NAME`, K in the order of their first ranks: means over the
        time since the last point, and over a node's GPUs; of the network, megabytes since the worker was started.
        `memory/host_gb` and `memory/gpu_peak_gb`: the most that one worker holds now, and has held of its GPU since
        the last point, 1e9 bytes.
        """
        self._next = time.monotonic() + _POINT_SECONDS
        own = {curves.HOST_GB: self._process.memory_info().rss / 1e9}
        if self._device.type == "cuda":
            own[curves.GPU_PEAK_GB] = torch.cuda.max_memory_allocated(self._device) / 1e9
            torch.cuda.reset_peak_memory_stats(self._device)
        machine = self._sampler.means() if self._sampler is not None else {}
        gathered: list[Any] | None = [None] * dist.get_world_size() if self._rank == 0 else None
        dist.gather_object((self._node, own, machine), gathered, dst=0)
        points: dict[str, float] = {}
        for node, memory, means in gathered or ():
            pattern = curves.NODE_SYSTEM if len(self._nodes) > 1 else curves.SYSTEM
            points |= {name: max(value, points.get(name, 0.0)) for name, value in memory.items()}
            points |= {pattern.format(node=node, name=name): value for name, value in means.items()}
        return points

    def close(self) -> None:
        """End the sampling."""
        if self._sampler is not None:
            self._sampler.close()


class Sampler:
    """Reads the collectors of this machine every few seconds, in a thread.

    Args:
        gpus: whether to read those of GPUs too.
        note: says something to the user.
    """

    def __init__(self, gpus: bool, note: Callable[[str], None]) -> None:
        self._collectors = _collectors(gpus, note)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._count = 0
        psutil.cpu_percent()  # which gives the mean since it was last asked
        self._thread = threading.Thread(target=self._work, daemon=True, name="system metrics")
        self._thread.start()

    def means(self) -> dict[str, float]:
        """Of what was read since they were last asked for; of now, if nothing was."""
        with self._lock:
            if not self._count:
                self._collect()
            values: dict[str, list[float]] = {}
            for collector in self._collectors:
                for name, value in collector.aggregate_metrics().items():
                    values.setdefault(re.sub(r"^gpu_\d+_", "gpu_", name), []).append(float(value))
                collector.clear_metrics()
            self._count = 0
        return {name: fmean(values[name]) for name in _KEPT if name in values}

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            with self._lock:
                self._collect()

    def _collect(self) -> None:
        for collector in self._collectors:
            with contextlib.suppress(Exception):  # a counter that cannot be read now is left out
                collector.collect_metrics()
        self._count += 1


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
        except Exception as e:  # without nvidia-ml-py, or in a container that hides what is to be read
            note(f"no such curves under system/: {one_line(e, limit=None)}")
    return collectors
