"""Shuffles of the channels before a split: none, fixed, EIW-Flow's learned order, and our own hard and soft ones.

`order` is the construction of EIW-Flow's authors (see the module `order`): one learned order for all images. `hard` and
`soft` are ours, made from the abstract of the paper (arXiv 2407.04958) before the authors' program was found: they look
at each image. No figure of the paper is claimed for any of them. What guided ours:

- It must be a bijection whose inverse needs nothing but its output. Sorting channels by weights computed from the same
  channels is not: it forgets the order. So the weights of one half of the channels come from the other half, then
  the other way round, as in a coupling.
- The solver sees pooled descriptors of each channel (mean, max, log-variance: the last is the entropy of a Gaussian
  up to a constant) and gives bounded log-weights, zero at the start. Weights scale channels, which adds
  H * W * sum(log-weights) of differential entropy, in nats: exactly the log-determinant.
- The shuffle proper keeps volume. `soft` rotates channels by Householder reflections with predicted vectors: smooth,
  and the identity at the start. One reflection can exchange two channels, so a product of enough of them is any
  permutation; we take four a half. A learned 1x1 convolution that starts as the identity comes first, and each `block`
  of places (4x4 by default) is rotated by itself, because informative channels differ within an image: at equal
  parameters and time that won (benchmarks/RESULTS.md), though edges of blocks show in samples of flows trained briefly.
  `hard` sorts channels by weight: no gradient passes the sort, and it costs density. `fixed` permutes once and for all,
  by a permutation drawn at the start.

Not for the split itself nor its prior (`multiscale`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bijection import (
    Bijection,
    Chain,
    Coupling,
    Half,
    Kept,
    Transformed,
    halves_of,
    without_autocast,
    zeros_per_sample,
)
from .config import SHUFFLES
from .layers import InvertibleConv1x1, mix_channels
from .order import Order

_SOLVER_HIDDEN = 27
_PAIRS = 2  # of reflections a half: four in all
_LEAST_VARIANCE = 1e-6  # keeps the logarithm finite on a constant channel


def make_shuffle(
    kind: str, channels: int, block: int = 0, order_input: str = "channels", kl: str = "as-published"
) -> Bijection | None:
    """Make a shuffle of one of the kinds `SHUFFLES`; None for "none". `block`: see `SoftHalf`; `order_input`, `kl`: see
    `Order`."""
    if kind == "none":
        return None
    if kind == "order":
        return Order(channels, order_input, kl)
    if kind == "fixed":
        return FixedShuffle(channels)
    if kind == "hard":
        return Chain([HardHalf(channels), HardHalf(channels, mirrored=True)])
    if kind == "soft":
        learned = InvertibleConv1x1(channels, identity=True)
        return Chain([learned, *(SoftHalf(channels, mirrored, block) for mirrored in (False, True))])
    raise ValueError(f"shuffle: {kind!r} is not one of {', '.join(SHUFFLES)}")


def channel_descriptors(a: Tensor) -> Tensor:
    """Return mean, maximum and log-variance of every channel: (B, C, H, W) to (B, 3C)."""
    flat = a.flatten(2)
    mean = flat.mean(dim=2)
    var = (flat - mean.unsqueeze(2)).square().mean(dim=2)  # several times as fast as torch.var on CPUs
    return torch.cat((mean, flat.amax(2), (var + _LEAST_VARIANCE).log()), dim=1)


def householder_rotation(vectors: Tensor) -> Tensor:
    """Return the product of Householder reflections, the last applied first: (B, K, C) vectors to (B, C, C) matrices.

    A product of K reflections along unit vectors, the rows of V, is I - V^T T V with an upper triangular T, whose
    inverse has 1/2 on its diagonal and the scalar products of the vectors above it (compact WY form, Schreiber and Van
    Loan, 1989). For an even K its determinant is 1. A vector of zeros reflects nothing.
    """
    unit = F.normalize(vectors, dim=2)
    count, size = vectors.shape[1:]
    half = 0.5 * torch.eye(count, dtype=vectors.dtype, device=vectors.device)
    eye = torch.eye(size, dtype=vectors.dtype, device=vectors.device)
    with without_autocast(vectors):
        inverse_t = (unit @ unit.mT).triu(1) + half
        return torch.baddbmm(eye, unit.mT, torch.linalg.solve_triangular(inverse_t, unit, upper=True), alpha=-1)


def scaling_terms(b: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-determinant and penalty, (B,), of scaling the channels of `b` by exp(log_weights), (B, C)."""
    return b.shape[2] * b.shape[3] * log_weights.sum(1), log_weights.square().mean(1)


def to_blocks(x: Tensor, side: int) -> Tensor:
    """Turn blocks into a batch: (B, C, H, W) to (B * n, C, h, w). h and w are the greatest that divide both `side` and
    the image's side; they are the image's sides if `side` is 0."""
    b, c, height, width = x.shape
    h, w = math.gcd(side, height), math.gcd(side, width)
    return x.reshape(b, c, height // h, h, width // w, w).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, h, w)


def from_blocks(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """Invert `to_blocks`; `shape` is that of x."""
    b, c, height, width = shape
    h, w = blocks.shape[2:]
    return blocks.reshape(b, height // h, width // w, c, h, w).permute(0, 3, 1, 4, 2, 5).reshape(b, c, height, width)


class Solver(nn.Module):
    """The weight solver: a network from pooled descriptors of one half to weights of the other. Its last layer starts
    at zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(3 * inputs, _SOLVER_HIDDEN)
        self.last = nn.Linear(_SOLVER_HIDDEN, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, a: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs), in the dtype of `a`; computed in the parameters', never autocast."""
        with without_autocast(a):
            out = self.last(F.relu(self.first(channel_descriptors(a).to(self.first.weight.dtype))))
        return out.to(a.dtype)


class FixedShuffle(Bijection):
    """A random permutation of the channels, drawn once."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.order: Tensor
        self.register_buffer("order", torch.randperm(channels))

    def forward(self, x: Tensor) -> Transformed:
        return Transformed(x[:, self.order], zeros_per_sample(x), zeros_per_sample(x))

    def inverse(self, y: Tensor) -> Tensor:
        return y[:, self.order.argsort()]


class HardHalf(Coupling):
    """Scales the channels of one half by weights from the other, then sorts them by weight, for each sample.

    The order is kept for the backward pass: sorting reconstructed weights could exchange two that are nearly equal.
    `inverse` has to sort again, from a half that may differ in the last bit.
    """

    kept_count = 1

    def __init__(self, channels: int, mirrored: bool = False) -> None:
        super().__init__(mirrored)
        sizes = halves_of(channels)
        self.solver = Solver(*(reversed(sizes) if mirrored else sizes))

    def condition(self, a: Tensor, kept: Kept = ()) -> tuple[Tensor, ...]:
        log_weights = torch.tanh(self.solver(a))
        # Stable: equal weights, as at the start, leave the channels where they are.
        return log_weights, kept[0] if kept else log_weights.detach().argsort(dim=1, stable=True)

    def kept_of(self, params: tuple[Tensor, ...]) -> Kept:
        return params[1:]

    def transform(self, b: Tensor, params: tuple[Tensor, ...]) -> Half:
        log_weights, order = params
        scaled = b * log_weights.exp()[:, :, None, None]
        return Half(scaled.gather(1, _over(order, b)), *scaling_terms(b, log_weights))

    def untransform(self, b: Tensor, params: tuple[Tensor, ...]) -> Tensor:
        log_weights, order = params
        return b.gather(1, _over(order.argsort(dim=1), b)) * (-log_weights).exp()[:, :, None, None]


class SoftHalf(Coupling):
    """Rotates the channels of one half, then scales them, by a rotation and weights from the other half.

    The reflections come in pairs, one along a learned vector and one along the same vector plus a predicted offset,
    so that an offset of zero, as at the start, is the identity.

    Args:
        block: side of blocks, in places of the grid, each of which is rotated and scaled by itself, as predicted from
            the same block of the other half; 0 for the image as a whole.
    """

    def __init__(self, channels: int, mirrored: bool = False, block: int = 0) -> None:
        super().__init__(mirrored)
        self.block = block
        sizes = halves_of(channels)
        inputs, size = reversed(sizes) if mirrored else sizes
        self.size = size
        self.solver = Solver(inputs, (1 + _PAIRS) * self.size)
        vectors = torch.empty(_PAIRS, self.size)
        # not without numbers, for which torch would import its compiler
        self.vectors = nn.Parameter(vectors if vectors.is_meta else F.normalize(torch.randn_like(vectors), dim=1))

    def condition(self, a: Tensor, kept: Kept = ()) -> tuple[Tensor, ...]:
        raw, offsets = self.solver(to_blocks(a, self.block)).split((self.size, _PAIRS * self.size), dim=1)
        offsets = offsets.view(-1, _PAIRS, self.size)
        learned = self.vectors.to(a.dtype).expand_as(offsets)
        pairs = torch.stack((learned + offsets, learned), dim=2)
        return torch.tanh(raw), householder_rotation(pairs.flatten(1, 2))

    def transform(self, b: Tensor, params: tuple[Tensor, ...]) -> Half:
        log_weights, turn = params
        blocks = to_blocks(b, self.block)
        y = from_blocks(mix_channels(log_weights.exp().unsqueeze(2) * turn, blocks), b.shape)
        shape = len(b), len(blocks) // max(1, len(b))
        log_det, penalty = (of_block.view(shape) for of_block in scaling_terms(blocks, log_weights))
        return Half(y, log_det.sum(1), penalty.mean(1))

    def untransform(self, b: Tensor, params: tuple[Tensor, ...]) -> Tensor:
        log_weights, turn = params
        return from_blocks(mix_channels(turn.mT * (-log_weights).exp().unsqueeze(1), to_blocks(b, self.block)), b.shape)


def _over(order: Tensor, b: Tensor) -> Tensor:
    """Expand an order of channels (B, C) to indices of (B, C, H, W)."""
    return order[:, :, None, None].expand_as(b)
