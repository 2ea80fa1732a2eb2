"""The numbers that the ranks sum up in each step, so that all of them decide alike, and how they travel: as one tensor,
which the engine reduces and reads together with the gradient norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eiwtrain.train.objective import MicroBatch


class StepSums(NamedTuple):
    """Sums over the ranks, in float64; flags are 0 or 1 a rank."""

    bits: float
    """Bits/dim, summed over the images."""
    penalty: float
    """The shuffle's regulariser, summed over the images."""
    faults: float
    """Storage failures since the step before that were retried with success."""
    again: float
    """Whether to return for another attempt."""
    stop: float
    """Whether to stop the run."""
    save: float
    """Whether a checkpoint is due."""
    look: float
    """Whether to look at the machines' load."""
    compare: float
    """Whether to compare the ranks' speed."""


def pack(micro_batches: Sequence[MicroBatch], flags: Sequence[float], rank: int) -> Tensor:
    """Return one rank's part of `StepSums`, then the last micro-batch's entropies if this is rank 0: float64, (n,).

    It is on the micro-batches' device. Nothing is read from there: that would have the host wait.

    Args:
        micro_batches: those of the step, after `loss`.
        flags: the fields of `StepSums` behind `penalty`.
    """
    measured = torch.stack([m.sums for m in micro_batches]).sum(0)
    entropy = micro_batches[-1].entropy.flatten().double()
    own = torch.tensor(flags, dtype=torch.float64).to(measured.device, non_blocking=True)
    return torch.cat([measured, own, torch.zeros_like(entropy) if rank else entropy])


def unpack(numbers: list[float]) -> tuple[StepSums, Tensor]:
    """Return what `pack` has put together, summed over ranks: the sums, and rank 0's entropies, (levels, 2)."""
    count = len(StepSums._fields)
    return StepSums(*numbers[:count]), torch.tensor(numbers[count:], dtype=torch.float64).reshape(-1, 2)


def beside(norm: Any, own: Tensor) -> Tensor:
    """Return a norm and numbers beside it as one tensor, so that all are read at once: float64, (1 + n,)."""
    first = torch.as_tensor(norm, dtype=torch.float64, device=own.device).reshape(1)
    return torch.cat([first, own])
