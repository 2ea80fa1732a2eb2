"""Standard normal noise: made from uniform numbers, and its log-density.

Not for what is done with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HALF_STEPS = {torch.float32: 2.0**-25, torch.float64: 2.0**-54}
"""Half the spacing of uniform numbers below 1, which centres each in its cell, away from 0 and 1."""


def normal(uniform: Tensor) -> Tensor:
    """Turn uniform numbers in [0, 1) into standard normal ones, finite for all of them; same shape and dtype."""
    half_step = _HALF_STEPS[uniform.dtype]
    # Computed from the nearer end: the largest float below 1 has no neighbour to move to.
    upper = uniform >= 0.5
    tail = torch.where(upper, 1 - uniform - half_step, uniform + half_step).clamp(min=half_step)
    numbers = torch.special.ndtri(tail)
    return torch.where(upper, -numbers, numbers)


def log_normal(z: Tensor) -> Tensor:
    """Return log N(z; 0, 1) of each sample, (B, ...) to (B,), in nats."""
    flat = z.flatten(1)
    return -0.5 * (flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi))
