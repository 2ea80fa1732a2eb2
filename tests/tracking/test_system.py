import json
import sys
import threading

import pytest
import torch
from helpers import lone_group
from ranks import run_ranks

from eiwtrain.tracking import system
from eiwtrain.tracking.system import Machine, System

OF_A_NODE = {
    "cpu_utilization_percentage", "system_memory_usage_percentage", "disk_usage_percentage",
    "network_receive_megabytes", "network_transmit_megabytes",
}  # fmt: skip


def test_one_node_gives_its_curves_and_the_memory_of_its_worker(tmp_path):
    with lone_group(tmp_path):
        machines = System(["a"], torch.device("cpu"), pytest.fail)
        assert machines.due()
        curves = machines.curves()
        assert not machines.due()  # for some seconds
        machines.close()
    assert curves.keys() == {f"system/{name}" for name in OF_A_NODE} | {"memory/host_gb"}
    assert 0 < curves["system/system_memory_usage_percentage"] < 100
    assert 0.01 < curves["memory/host_gb"] < 100


def _gather(folder, nodes):
    rank = torch.distributed.get_rank()
    machines = System(nodes, torch.device("cpu"), print)
    ballast = torch.ones(50_000_000 if rank == 1 else 1)  # 0.2 GB
    own = machines._process.memory_info().rss / 1e9
    curves = machines.curves()
    machines.close()
    about = {"due": machines.due(), "reads": machines._machine is not None, "gb": own, "ballast": len(ballast)}
    (folder / f"{rank}.json").write_text(json.dumps(about | {"curves": curves}))


def test_the_first_rank_of_each_node_reads_and_all_reaches_rank_0(tmp_path):
    run_ranks(_gather, 3, tmp_path, ["x", "y", "y"])
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [r["reads"] for r in ranks] == [True, True, False]
    assert [r["curves"] for r in ranks[1:]] == [{}, {}]
    assert [r["due"] for r in ranks] == [False, False, False]
    curves = ranks[0]["curves"]
    of_nodes = {f"system/node{k}/{name}" for k in range(2) for name in OF_A_NODE}
    assert curves.keys() == of_nodes | {"memory/host_gb"}
    assert curves["memory/host_gb"] == pytest.approx(max(r["gb"] for r in ranks), rel=0.05)
    assert curves["memory/host_gb"] > ranks[0]["gb"] + 0.05


class Collector:
    """Stands in for MLflow's collectors, with two GPUs."""

    def __init__(self, *, broken=False):
        self.broken, self.read, self.count, self.again = broken, [], 0, threading.Event()

    def collect_metrics(self):
        if self.broken:
            raise OSError("no such counter")
        self.read.append(self.count)
        self.count += 1
        if self.count == 3:
            self.again.set()

    def aggregate_metrics(self):
        if self.broken:
            return {}
        mean = sum(self.read) / len(self.read)
        return {"gpu_0_utilization_percentage": mean, "gpu_1_utilization_percentage": mean + 1, "gpu_0_fan": 7.0}

    def clear_metrics(self):
        self.read.clear()


def test_the_latest_reading_is_the_mean_of_all_gpus(monkeypatch):
    fine, broken = Collector(), Collector(broken=True)
    monkeypatch.setattr(system, "_POINT_SECONDS", 0.001)
    monkeypatch.setattr(system, "_collectors", lambda *_: [broken, fine])
    machine = Machine(True, pytest.fail)
    assert fine.again.wait(60)
    machine.close()
    assert machine.latest == {"gpu_utilization_percentage": pytest.approx(fine.count - 1 + 0.5)}


def test_gpus_without_their_library_are_reported_once(monkeypatch):
    for name in ("pynvml", "mlflow.system_metrics.metrics.gpu_monitor"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Hidden(), *sys.meta_path])
    said = []
    machine = Machine(True, said.append)
    assert machine.latest.keys() == OF_A_NODE
    machine.close()
    assert len(said) == 1
    assert "pip install nvidia-ml-py" in said[0]


class Hidden:
    """Pretends that the library of NVIDIA's GPUs is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name == "pynvml":
            raise ImportError(name)


def test_the_reading_stops_with_the_worker(monkeypatch):
    machine = Machine(False, pytest.fail)
    assert machine._thread.is_alive()
    machine.close()
    assert not machine._thread.is_alive()
