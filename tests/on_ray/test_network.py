"""The interface by which workers communicate."""

import importlib
import ipaddress
import os
import re
import socket
import threading
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
import ray
import torch
import torch.distributed as dist
from ray.train.torch.config import _TorchBackend

from eiwtrain.on_ray import network, session

MONITOR = "NCCL_RAS_ENABLE"
SETTINGS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
RENDEZVOUS = importlib.import_module("torch.distributed.rendezvous")
ADDRESSES = {  # of this machine, by interface
    name: [a.address for a in found if a.family in (socket.AF_INET, socket.AF_INET6)]
    for name, found in psutil.net_if_addrs().items()
}
LOOPBACK = next(name for name, found in ADDRESSES.items() if "127.0.0.1" in found)
OUTER = next((a for found in ADDRESSES.values() for a in found if "." in a and not a.startswith("127.")), None)


@pytest.fixture
def on(monkeypatch):
    """Act as a worker on the node that Ray knows by that address; what it changes is undone afterwards."""
    monkeypatch.setattr(RENDEZVOUS, "TCPStore", dist.TCPStore)
    for name in (*SETTINGS, MONITOR):
        monkeypatch.setenv(name, "")  # so that it is taken back
        monkeypatch.delenv(name)

    def worker(host):
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: host)
        network.stay_with_ray()
        return [os.environ.get(name) for name in SETTINGS]

    return worker


def test_the_interface_of_an_address_of_this_machine_is_found():
    for name, found in ADDRESSES.items():
        for address in found:
            plain = address.partition("%")[0]
            assert address in ADDRESSES[network.interface_of(plain)] or plain.startswith("fe80:"), name
            assert network.interface_of(ipaddress.ip_address(plain).exploded) == network.interface_of(plain)
    assert network.interface_of("203.0.113.77") is None  # of a block for examples (RFC 5737)


def test_on_loopback_the_store_and_nccl_stay_there_too(on):
    assert on("127.0.0.1") == [LOOPBACK, f"={LOOPBACK}"]
    assert RENDEZVOUS.TCPStore is network.store


@pytest.mark.parametrize("given", [None, "1"])
def test_nccls_monitor_does_not_listen_unless_asked_to(given, on, monkeypatch):
    if given is not None:
        monkeypatch.setenv(MONITOR, given)
    on("203.0.113.77")
    assert os.environ[MONITOR] == (given or "0")


@pytest.mark.parametrize("host", [pytest.param(OUTER, marks=pytest.mark.skipif(not OUTER, reason="no network"))])
def test_in_a_network_gloo_takes_the_nodes_interface(on, host):
    assert on(host) == [network.interface_of(host), None]
    assert RENDEZVOUS.TCPStore is dist.TCPStore


def test_an_address_without_an_interface_is_left_to_gloo(on):
    assert on("203.0.113.77") == [None, None]


def test_variables_of_the_environment_take_precedence(on, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert session.worker_environment() == session.WORKER_ENV | {"GLOO_SOCKET_IFNAME": "ib0"}
    assert on("127.0.0.1")[0] == "ib0"


@pytest.mark.parametrize(("gpus", "seen"), [(0, ""), (1, "4,5")])
def test_workers_on_cpus_see_no_gpu_before_cuda_is_used(gpus, seen, on, monkeypatch):
    on("127.0.0.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    looked = []
    monkeypatch.setattr(_TorchBackend, "on_start", lambda *_: looked.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    config = network.NodeTorchConfig(backend="nccl" if gpus else "gloo")
    config.backend_cls().on_start(SimpleNamespace(execute=lambda call: call()), config)
    assert looked == [seen]


def test_a_node_whose_torch_finds_no_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = network.NodeTorchConfig(backend="nccl")
    with pytest.raises(
        RuntimeError, match=rf"workers\.gpus: torch .* of {re.escape(socket.gethostname())} finds no GPU"
    ):
        config.backend_cls().on_start(SimpleNamespace(execute=lambda call: call()), config)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", pytest.param(OUTER, marks=pytest.mark.skipif(not OUTER, reason="no network"))]
)
def test_gloo_listens_on_the_nodes_address(on, host):
    on(host)
    store, before, sums = dist.HashStore(), listening(), []

    def rank(number):
        group = dist.ProcessGroupGloo(store, number, 2, timedelta(seconds=60))
        value = torch.full((1,), number + 1.0)
        group.allreduce([value]).wait()
        sums.append((float(value), listening() - before, group))

    ranks = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert [total for total, _, _ in sums] == [3.0, 3.0]
    assert {ip for _, found, _ in sums for ip, _ in found} == {host}


def listening():
    """Return (address, port) of the sockets on which this process waits for connections."""
    return {tuple(c.laddr) for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}
