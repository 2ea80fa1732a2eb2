"""Bytes of activations that a backward pass needs, and how many fit into memory: for `backprop="auto"`.

Not for keeping them: that is `reversible`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
SLACK = 0.9  # of what is free: allocators round up and fragment
STATE_BYTES = 16  # bytes a parameter that training may have yet to allocate: gradient, AdamW's two moments, average


def bytes_saved(function: Callable[[], Result], without: Iterable[Tensor] = ()) -> tuple[int, Result]:
    """Return the bytes that autograd saves for the backward pass of `function()`, and its result. Each storage counts
    once; tensors in `without` do not count (usually parameters, which stay anyway)."""
    own = {t.untyped_storage().data_ptr() for t in without}
    # By address. They are held so that no address is reused, and without their graph, which holds these hooks.
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        address = t.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = t.detach()
        return t.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return sum(t.untyped_storage().nbytes() for t in kept.values()), result


def how_many_fit(costs: Sequence[int], budget: int) -> int:
    """Return how many of the last `costs` sum up to no more than the budget."""
    total = 0
    for n, cost in enumerate(reversed(costs)):
        total += cost
        if total > budget:
            return n
    return len(costs)


def free_bytes(device: torch.device, parameters: int) -> int:
    """Return the bytes on a device that a training step may fill with activations: the free memory, less gradients
    and optimizer state of this number of parameters.

    On the CPU the memory that is available is shared evenly by the processes of the node (LOCAL_WORLD_SIZE, which
    torchrun and Ray Train set), and half of it is left to everything else.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = _available() // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(0, int(SLACK * free) - STATE_BYTES * parameters)


def _available() -> int:
    """Return the bytes of main memory available without swapping, within the container's limit if there is one."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if _MEMINFO.exists():
        words = (line.split() for line in _MEMINFO.read_text().splitlines())
        available = next((1024 * int(n) for name, n, *_ in words if name == "MemAvailable:"), available)
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdigit():
        available = min(available, max(0, int(most) - int(used.read_text())))
    return available
