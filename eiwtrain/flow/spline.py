"""The rational-quadratic spline coupling of Neural Spline Flows (arXiv 1906.04032), more expressive than an affine map.

Not for the networks that condition it (`conditioners`) nor for the base of such couplings (`layers`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bijection import Half
from .layers import NetworkCoupling, bounded

_LEAST_SHARE = 0.2
"""Least width and height of a bin, as a fraction of an equal share of the interval."""

_LOG_SLOPE_BOUND = 2.0
"""Largest absolute logarithm of the slope at a knot."""


class _Bin(NamedTuple):
    """The bin of each element, all (B, C, H, W): its corner, width and height, and the slopes at its ends."""

    x: Tensor
    y: Tensor
    width: Tensor
    height: Tensor
    left: Tensor
    right: Tensor


class SplineCoupling(NetworkCoupling):
    """An affine map of b and then a monotone rational-quadratic spline, given by the half a
    (Neural Spline Flows, arXiv 1906.04032, section 3.1, with its linear tails).

    The affine map is `AffineCoupling`'s and brings b into the interval of the spline, which maps [-tail, tail] to
    itself and leaves values outside unchanged; its slope is 1 at both ends, so that the whole is continuously
    differentiable.
    Zeros from the conditioner are the identity. The formulas are the paper's, with denominators and the inverse's
    discriminant written as sums of positive terms: there is nothing to clamp.

    The bounds are tighter than in the paper, because activations are reconstructed by the inverse: a slope at a knot is
    between exp(-2) and exp(2), and a bin is at least a fifth as wide and as high as with equal bins. With 8 bins the
    spline's slope is then between 2e-4 and 70, and its inverse in float32 errs by less than 1e-3 at the worst
    parameters; with the bounds usual elsewhere, least widths, heights and slopes of 1e-3, by the size of a bin.

    Where activations are stored, 8 bins keep about 370 bytes for each element transformed (float32).

    Args:
        conditioner: see `NetworkCoupling`; 3 * bins + 1 outputs a channel.
        bins: K, the number of bins, at least 2.
        tail: half the length of the interval.
        bound: largest absolute log-scale of the affine map, in nats.

    Raises:
        ValueError: for fewer bins, or a tail that is not positive.
    """

    def __init__(
        self, conditioner: nn.Module, bins: int = 8, tail: float = 4.0, bound: float = 2.0, mirrored: bool = False
    ) -> None:
        super().__init__(conditioner, mirrored)
        if bins < 2:
            raise ValueError(f"bins: {bins} is not at least 2")
        if not tail > 0:
            raise ValueError(f"tail: {tail} is not positive")
        self.bins, self.tail, self.bound = bins, tail, bound
        self.outputs_per_channel = self.outputs_for(bins)

    @staticmethod
    def outputs_for(bins: int) -> int:
        """Return `outputs_per_channel` before the coupling exists: log-scale, shift, widths, heights, inner slopes."""
        return 3 * bins + 1

    def parameters_from(self, raw: Tensor) -> tuple[Tensor, ...]:
        """Return log-scale and shift, (B, C', H, W), and knots and their slopes, (B, C', bins + 1, H, W) each."""
        scale, shift, widths, heights, slopes = raw.unflatten(1, (-1, self.outputs_per_channel)).split(
            (1, 1, self.bins, self.bins, self.bins - 1), dim=2
        )
        log_scale = bounded(scale.squeeze(2), self.bound)
        slopes = bounded(slopes, _LOG_SLOPE_BOUND).exp()
        at_ends = (0, 0, 0, 0, 1, 1)
        return (log_scale, shift.squeeze(2), self._knots(widths), self._knots(heights), F.pad(slopes, at_ends, value=1))

    def transform(self, b: Tensor, params: tuple[Tensor, ...]) -> Half:
        log_scale, shift, xs, ys, slopes, *_ = params
        b = b * log_scale.exp() + shift
        # Outside the interval the spline is computed at its end, so value and gradients are finite, and not selected.
        inside, x = b.abs() < self.tail, b.clamp(-self.tail, self.tail)
        at = _bin(x, xs, xs, ys, slopes)
        t = (x - at.x) / at.width
        slope, product = at.height / at.width, t * (1 - t)
        below = slope * (1 - 2 * product) + (at.left + at.right) * product
        y = at.y + at.height * t * (slope * t + at.left * (1 - t)) / below
        # left * (1-t)^2 + 2 * slope * t * (1-t) + right * t^2, whose weights sum to 1, so that it is exactly 1 if all
        # three are. It doesn't depend on the least.
        least = torch.minimum(torch.minimum(at.left, at.right), slope).detach()
        above = least + (
            (at.left - least) * (1 - t).square() + 2 * (slope - least) * product + (at.right - least) * t.square()
        )
        log_slope = 2 * (slope.log() - below.log()) + above.log()
        log_det = log_scale + torch.where(inside, log_slope, torch.zeros_like(log_slope))
        return Half(torch.where(inside, y, b), log_det.flatten(1).sum(1))

    def untransform(self, b: Tensor, params: tuple[Tensor, ...]) -> Tensor:
        log_scale, shift, xs, ys, slopes, *_ = params
        inside, y = b.abs() < self.tail, b.clamp(-self.tail, self.tail)
        at = _bin(y, ys, xs, ys, slopes)
        t = (y - at.y) / at.height
        slope = at.height / at.width
        # The paper's quadratic over the height of the bin: its b is balance + twice, its discriminant root^2.
        balance, twice = at.left * (1 - t) - at.right * t, 2 * slope * t
        root = (balance.square() + 2 * slope * (1 - t) * twice).sqrt()
        share = twice / (twice + balance + root)
        x = torch.where(inside, at.x + at.width * share, b)
        return (x - shift) * (-log_scale).exp()

    def _knots(self, raw: Tensor) -> Tensor:
        """Return knots from -tail to tail, at distances like softmax(raw) except for the least share."""
        shares = _LEAST_SHARE / self.bins + (1 - _LEAST_SHARE) * raw.softmax(dim=2)
        end = torch.full_like(raw[:, :, :1], self.tail)
        return torch.cat((-end, self.tail * (2 * shares[:, :, :-1].cumsum(dim=2) - 1), end), dim=2)


def _bin(x: Tensor, knots: Tensor, xs: Tensor, ys: Tensor, slopes: Tensor) -> _Bin:
    """Find the bin of each x among the knots, which are `xs` or `ys`."""
    # A comparison with all knots, as searchsorted needs them in the last dimension, and contiguous.
    left = (x.unsqueeze(2) >= knots[:, :, 1:-1]).sum(dim=2, keepdim=True)

    def ends(values: Tensor) -> tuple[Tensor, Tensor]:
        return values.gather(2, left).squeeze(2), values.gather(2, left + 1).squeeze(2)

    (x0, x1), (y0, y1), (left_slope, right_slope) = ends(xs), ends(ys), ends(slopes)
    return _Bin(x0, y0, x1 - x0, y1 - y0, left_slope, right_slope)
