"""Makes the workers' torch communicate where Ray does: gloo by the interface of the node's address, and all of it on
loopback alone where the node is on loopback. Workers on CPUs see no GPU.

Not for Ray's own servers (`eiwtrain.on_ray.session`, `cluster.local.ray_nodes`), and no protection on a node that has
an address in a network: other nodes must reach its workers, and a firewall or network policy says which ones.
"""

from __future__ import annotations

import importlib
import ipaddress
import os
import socket
from typing import Any

from ray.train.torch import TorchConfig

from eiwtrain.testing import timeline

_WAITING = 2048  # connections that the kernel keeps until they are accepted, as torch's own


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]  # it has no public name
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(hide_gpus if backend_config.backend == "gloo" else check_gpu)
        worker_group.execute(stay_with_ray)
        super().on_start(worker_group, backend_config)


class NodeTorchConfig(TorchConfig):
    """Ray Train's process group of torch, with `stay_with_ray` called before it is made."""

    @property
    def backend_cls(self) -> Any:
        return _Backend


def hide_gpus() -> None:
    """Hide the GPUs of this machine from this process, a worker on CPUs: Ray leaves them visible to a worker that asked
    for none. Call it before CUDA is first used, which looks once."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def check_gpu() -> None:
    """Raise RuntimeError on a node whose torch cannot use its GPU: what NCCL would say does not name the cause."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(
            f"workers.gpus: torch {torch.__version__} of {socket.gethostname()} finds no GPU; it must be a build with "
            "CUDA, and the driver new enough for it"
        )


def stay_with_ray() -> None:
    """Make gloo use the interface of this node's address, and on loopback make torch's key-value store and NCCL stay
    there; nowhere does NCCL's monitor listen. Call it before the process group is made; variables that are already set
    take precedence."""
    import ray

    timeline.mark("worker")
    host = ray.util.get_node_ip_address()
    interface = interface_of(host)
    os.environ.setdefault("NCCL_RAS_ENABLE", "0")  # a monitor that answers anyone on this machine
    if interface is not None:  # else gloo takes what the host's name resolves to: on Debian 127.0.1.1
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if not ipaddress.ip_address(host).is_loopback:
        return
    if interface is not None:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # else it skips loopback; not tried
    module: Any = importlib.import_module("torch.distributed.rendezvous")  # the name is also a function's
    module.TCPStore = store


def interface_of(host: str) -> str | None:
    """Return the name of this machine's network interface that has the IP address `host`; None where no interface has
    it, say because addresses are translated on the way."""
    import psutil

    wanted = ipaddress.ip_address(host)
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            is_ip = address.family in (socket.AF_INET, socket.AF_INET6)
            if is_ip and ipaddress.ip_address(address.address.partition("%")[0]) == wanted:
                return name
    return None


def store(host_name: str, port: int, world_size: int, is_master: bool, **options: Any) -> Any:
    """Return a `torch.distributed.TCPStore` that, as the master, listens on `host_name` alone and not on all
    interfaces."""
    from torch.distributed import TCPStore

    if is_master:
        family = socket.AF_INET6 if ":" in host_name else socket.AF_INET
        listener = socket.create_server((host_name, port), family=family, backlog=_WAITING)
        options["master_listen_fd"] = listener.detach()  # the store closes it
    return TCPStore(host_name, port, world_size, is_master, **options)
