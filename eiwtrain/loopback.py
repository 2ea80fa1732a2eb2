"""On a cluster that is on loopback, keeps its workers there: torch would have them listen on every interface.

Not for Ray's own servers (`eiwtrain.ray_session`, `cluster.ray_nodes`), and without effect on a node that has an
address in a network: there workers are to be reached, and a firewall or network policy says by whom.
"""

from __future__ import annotations

import importlib
import ipaddress
import os
import socket
from typing import Any

from ray.train.torch import TorchConfig

_WAITING = 2048  # connections that the kernel keeps until they are accepted, as torch's own


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]  # it has no public name
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(stay_on_loopback)
        super().on_start(worker_group, backend_config)


class LoopbackTorchConfig(TorchConfig):
    """Ray Train's process group of torch, but for this."""

    @property
    def backend_cls(self) -> Any:
        return _Backend


def stay_on_loopback() -> None:
    """Where the node's address is on loopback, have torch's key-value store, gloo and NCCL listen there."""
    import psutil
    import ray

    host = ray.util.get_node_ip_address()
    if not ipaddress.ip_address(host).is_loopback:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)  # else gloo takes what the host's name resolves to
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # which else passes loopback over; not tried
    module: Any = importlib.import_module("torch.distributed.rendezvous")  # the name is also a function's
    module.TCPStore = store


def store(host_name: str, port: int, world_size: int, is_master: bool, **options: Any) -> Any:
    """`torch.distributed.TCPStore`, which as the master listens on `host_name` alone and not on all interfaces."""
    from torch.distributed import TCPStore

    if is_master:
        family = socket.AF_INET6 if ":" in host_name else socket.AF_INET
        listener = socket.create_server((host_name, port), family=family, backlog=_WAITING)
        options["master_listen_fd"] = listener.detach()  # the store closes it
    return TCPStore(host_name, port, world_size, is_master, **options)
