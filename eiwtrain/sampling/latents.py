"""Latents to decode: drawn by seed and number, or on the path between two of them.

A latent here is all that a flow's `encode` returns for an image, laid end to end: (D,), standard normal under the
model. D is the image's, C * H * W, and more where noise joins on the way through the flow. Not for decoding latents
(`eiwtrain.sampling.series`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eiwtrain.data.noise import sample_keys, uniform

_STREAM = 2  # of numbers; 0 and 1 are the noise of training and of held-out images
_PARALLEL = 1e-6  # sine of an angle below which an arc is a line, as far as float32 can tell


def draw(seed: int, numbers: Tensor, dims: int) -> Tensor:
    """Draw the latents with these numbers of a seed, float32 (n, dims), on the CPU.

    Each is a function of (seed, number) alone: not of how many are drawn, in which batches, or for which device. They
    come from hashed whole numbers, the same everywhere, by Box and Muller's transform (1958) in float64.

    Args:
        numbers: int64 (n,), 0 or more.
        dims: dimensions of one latent.
    """
    indices = numbers.cpu().numpy()
    keys = torch.from_numpy(sample_keys(seed, _STREAM, np.zeros_like(indices), indices).view(np.int64))
    u, v = uniform(keys, (2, -(-dims // 2))).double().unbind(1)
    radius, angle = torch.log1p(-u).mul(-2).sqrt(), 2 * math.pi * v
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :dims].float()


def dims_of(shapes: Sequence[tuple[int, int, int]]) -> int:
    """Return the dimensions of all latents of an image, from a flow's `latent_shapes`."""
    return sum(math.prod(shape) for shape in shapes)


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Return the points at t of the arcs from a to b, (n, D): (sin((1 - t) w) a + sin(t w) b) / sin w, w the angle
    between a and b (T. White, "Sampling generative networks", arXiv 1609.04468, section 2.1).

    A standard normal latent of many dimensions has a length of nearly sqrt(D). The straight line between two
    (independent, so at nearly a right angle) passes at sqrt(D / 2), where the model has almost no probability:
    its images look as if drawn at a temperature of 0.7. The arc keeps the length.

    Args:
        a, b: (n, D), not zero. They are returned unchanged at t = 0 and at t = 1.
        t: (n,) in [0, 1].
    """
    a_long, b_long, t = a.double(), b.double(), t.double()
    cosine = torch.nn.functional.cosine_similarity(a_long, b_long, dim=1).clamp(-1, 1)
    angle = cosine.arccos()
    sine = angle.sin()
    line = sine < _PARALLEL
    from_a = torch.where(line, 1 - t, ((1 - t) * angle).sin() / sine)
    from_b = torch.where(line, t, (t * angle).sin() / sine)
    return (from_a[:, None] * a_long + from_b[:, None] * b_long).to(a.dtype)


def join(latents: Sequence[Tensor]) -> Tensor:
    """Join the latents of each level, (n, C, H, W), into one, (n, D)."""
    return torch.cat([z.flatten(1) for z in latents], dim=1)


def split(latents: Tensor, shapes: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """Split latents by a flow's `latent_shapes`; the inverse of `join`."""
    parts = latents.split([math.prod(shape) for shape in shapes], dim=1)
    return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
