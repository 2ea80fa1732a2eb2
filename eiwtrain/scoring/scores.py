"""Bits per dimension of images under a flow, and their mean over images, ranks and draws of noise.

Not for files, other data sets or other measures: `eiwtrain.evaluate` is the command.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from eiwtrain import data, flow
from eiwtrain.flow.dequantization import iwbo


@dataclass(frozen=True)
class Score:
    """A held-out score."""

    bits_per_dim: float
    """Mean over images."""
    standard_error: float
    """Standard error of the mean over images; NaN for one image, or if bits are not finite."""
    images: int


@torch.no_grad()
def image_bits(model: flow.EIWFlow, draws: Sequence[data.Batch], at_once: int = 1) -> tuple[Tensor, Tensor]:
    """Return bits/dim of each row of a batch, float64 (n,) on the CPU: an upper bound of what it takes to code it.

    Args:
        model: a flow, on the device to use.
        draws: the same batch, with other noise each time.
        at_once: draws in a forward pass; changes nothing but rounding.

    Returns:
        The bound of the first draw alone (ELBO), and the importance-weighted one of all draws (IWBO); they are the same
        if there is one draw. `eiwtrain.scoring.estimator` names them.

    Raises:
        DataError: an image has no class, and the model has classes.
    """
    device, rows = next(model.parameters()).device, len(draws[0].images)
    parts = []
    for begin in range(0, len(draws), at_once):
        some = draws[begin : begin + at_once]
        together = some[0] if len(some) == 1 else data.Batch(*map(torch.cat, zip(*some, strict=True)))
        parts.append(model.log_prob(*data.flow_inputs(together, model.config, device)).double())
    log_probs = torch.cat(parts).view(len(draws), rows)
    bounds = torch.stack([log_probs[0], iwbo(log_probs)])
    first, all_draws = flow.bits_per_dim(bounds, model.dims, model.config.n_bits).cpu()
    return first, all_draws


def score(
    model: flow.EIWFlow,
    batches: Iterable[data.Batch],
    stopped: Callable[[], bool] = lambda: False,
) -> Score | None:
    """Return mean bits/dim over batches; over the batches of all ranks if there is a process group (then collective).

    Args:
        model: a flow, on the device to use.
        batches: uint8 images with their dequantization noise; rows of weight zero do not count.
        stopped: asked before each batch, on every rank with the same answer; True ends the evaluation.

    Returns:
        The score, or None if stopped.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        if stopped():
            return None
        bits, _ = image_bits(model, [batch])
        sums += _sums(bits, batch.weight)
    if dist.is_initialized():
        sums = sums.to(next(model.parameters()).device)
        dist.all_reduce(sums)
    return _score(sums)


def mean(bits: Tensor) -> Score:
    """Return the score of images with these bits/dim, (n,)."""
    return _score(_sums(bits, torch.ones_like(bits)))


def _sums(bits: Tensor, weight: Tensor) -> Tensor:
    """Return the number of images, the sum of their bits/dim, and the sum of the squares."""
    weight = weight.double()
    return torch.stack([weight.sum(), (weight * bits).sum(), (weight * bits.square()).sum()])


def _score(sums: Tensor) -> Score:
    count, total, squares = sums.tolist()
    if not count:
        raise ValueError("no images to score")
    average = total / count
    variance = squares / count - average * average
    known = count > 1 and math.isfinite(variance)
    return Score(average, math.sqrt(max(0.0, variance) / (count - 1)) if known else math.nan, int(count))
