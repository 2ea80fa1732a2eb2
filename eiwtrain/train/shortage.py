"""Running out of a GPU's memory: what follows, and how much `backprop: auto` takes afterwards.

Not for what a user reads (`eiwtrain.train.report`), nor for how activations are measured (`eiwtrain.flow.memory`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from eiwtrain.config import Config
from eiwtrain.on_ray.messages import Crashed, Failed
from eiwtrain.train import report

_LESS = 0.75  # of the memory that the attempt before was given
_MOST_SECONDS = 30.0  # to wait for the memory of a process that is ending
_QUIET_SECONDS = 2.0  # in which no more memory becomes free, after which no more is expected
_POLL_SECONDS = 0.25
_NEARLY_ALL = 0.95  # of a GPU: as much is free when only this process uses it


def outcome(error: RuntimeError, config: Config, may_pass: bool) -> Crashed | Failed:
    """Return the outcome of an attempt that ran out of memory: `Crashed`, so that another follows, if the shortage may
    pass by itself or the next attempt takes less; otherwise `Failed`."""
    what = report.out_of_memory(error, config)
    if may_pass or config.model.backprop == "auto":
        return Crashed(what, short_of_memory=True)
    return Failed(what)


def memory_share(shortages: int) -> float:
    """Return the share of the free memory, or of the budget, that activations may take once `shortages` attempts have
    run out of memory."""
    return float(_LESS**shortages)


def await_memory(device: torch.device) -> None:
    """Wait until processes that are ending have freed their memory of a GPU: what is free is measured next."""
    if device.type == "cuda":
        await_growth(lambda: torch.cuda.mem_get_info(device))


def await_growth(look: Callable[[], tuple[int, int]]) -> None:
    """Wait while memory becomes free; `look` returns how many bytes are free, and how many there are."""
    began = grew = time.monotonic()
    most = 0
    while (now := time.monotonic()) - began < _MOST_SECONDS and now - grew < _QUIET_SECONDS:
        free, total = look()
        if free >= _NEARLY_ALL * total:
            return
        if free > most:
            most, grew = free, now
        time.sleep(_POLL_SECONDS)
