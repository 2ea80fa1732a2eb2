"""Variational dequantization: noise whose density a small flow learns for each image (Flow++, arXiv 1902.00275).

Not for uniform dequantization, nor for pixels and their unit (`images`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from . import images as pixels
from .conditioners import ConvConditioner, make_conditioner
from .config import ConditionerConfig
from .layers import AffineCoupling, squeeze, unsqueeze

_HALF_STEP = 2.0**-25
"""Half the spacing of float32 uniform noise: added, it centres the noise in its cell, away from 0 and 1."""

_CONTRAST = 4.0
"""Factor on the pixels that the feature network sees: in [-1/2, 1/2) they have a standard deviation of some 1/4."""

_ORDERS = ((0, 3, 1, 2), (0, 1, 2, 3), (0, 2, 1, 3))
"""Orders of the places of a 2x2 block, numbered by rows, whose first two are one half: diagonals, rows, columns."""


class VariationalDequantizer(nn.Module):
    """u = Phi(f(Phi^-1(u0); v)) in place of uniform noise u0, with a flow f that sees the image v
    (Flow++, arXiv 1902.00275, section 3.1).

    With eps = Phi^-1(u0), which is standard normal, and z = f(eps; v), the density of u in [0, 1)^D is

        log q(u | v) = log N(eps) - log |det df/deps| - log N(z)

    as z has the density N(eps) / |det df/deps|, and u = Phi(z) the slopes dPhi/dz = N(z). Uniform noise would have
    log q = 0, so that log p(x) - log q(u | v) takes the place of log p(x): its mean over u0 is a lower bound of
    log P(v) in the unit that `bits_per_dim` turns into bits, and `iwbo` of several is a tighter one.

    f is affine couplings on `squeeze`d noise. Its halves are two of the four places of each 2x2 block, by diagonals,
    rows and columns in turn, and each division serves two steps, one for either half. A conditioner sees the half
    that passes unchanged, and features of v. At the start f is the identity and u is u0 up to rounding.

    Gradients are by ordinary autograd: activations are stored, a few steps' worth at half the image's sides.

    Args:
        image_shape: (C, H, W), of even sides.
        n_bits: of a pixel, 1 to 8.
        conditioner: the network in each coupling, and the size of the convolutional one that makes the features.
        steps: couplings in f, at least 2, so that no pixel is left with uniform noise.
        bfloat16: run these networks in bfloat16.

    Raises:
        ValueError: for odd sides, or fewer steps.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        n_bits: int,
        conditioner: ConditionerConfig,
        steps: int = 4,
        bfloat16: bool = False,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        if height % 2 or width % 2:
            raise ValueError(f"image_shape: {height}x{width} has an odd side")
        if steps < 2:
            raise ValueError(f"steps: {steps} is not at least 2")
        self.n_bits = n_bits
        self.features = ConvConditioner(4 * channels, conditioner.hidden, conditioner, bfloat16)
        self.features.last.reset_parameters()  # not a coupling's: it need not start at zero
        inputs, outputs = 2 * channels + conditioner.hidden, 2 * channels * AffineCoupling.outputs_per_channel
        grid = (height // 2, width // 2)
        self.couplings = nn.ModuleList(
            AffineCoupling(make_conditioner(inputs, outputs, grid, conditioner, bfloat16), mirrored=bool(i % 2))
            for i in range(steps)
        )
        orders = [
            [4 * channel + place for place in _ORDERS[i // 2 % len(_ORDERS)] for channel in range(channels)]
            for i in range(steps)
        ]
        self.orders: Tensor
        """Order of the channels for each step: first those of one half, then those of the other."""
        self.register_buffer("orders", torch.tensor(orders), persistent=False)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return x = (v + u) / 2^n - 1/2 in [-1/2, 1/2), and log q(u | v), (B,), in nats.

        `quantize(x)` is v, as with `dequantize`.

        Args:
            images: uint8, (B, C, H, W).
            noise: u0, uniform in [0, 1), same shape, float32 or float64, the dtype of the computation.

        Raises:
            ValueError: for images that are not uint8, or noise of another shape.
        """
        centred = pixels.dequantize(images, torch.full_like(noise, 0.5), self.n_bits)
        features = self.features(squeeze(_CONTRAST * centred))
        eps = _normal(noise)
        start = y = squeeze(eps)
        log_det = noise.new_zeros(len(noise))
        for coupling, order in zip(cast(Iterable[AffineCoupling], self.couplings), self.orders, strict=True):
            a, b = coupling.halves(y[:, order])
            # A coupling's condition takes whatever its conditioner does: here the features too.
            out = coupling.transform(b, coupling.condition(torch.cat((a, features), dim=1)))
            y = coupling.whole(a, out.y)[:, order.argsort()]
            log_det = log_det + out.log_det
        # log N(eps) - log N(z), as a product, which is exactly zero where the two are equal.
        gained = 0.5 * ((y - start) * (y + start)).flatten(1).sum(1)
        u = torch.special.ndtr(unsqueeze(y))
        return pixels.dequantize(images, u, self.n_bits), gained - log_det


def iwbo(log_weights: Tensor) -> Tensor:
    """Return the importance-weighted bound of log P(v) (arXiv 1509.00519, section 3), (k, B) to (B,), in nats.

    Args:
        log_weights: log p(x) - log q(u | v) for k draws of the noise of each image. With k = 1 it is the ELBO; more
            draws give a higher bound in expectation, and the limit is log P(v).
    """
    return log_weights.logsumexp(dim=0) - math.log(len(log_weights))


def _normal(noise: Tensor) -> Tensor:
    """Turn uniform noise into standard normal noise, finite for all of [0, 1)."""
    # Computed from the nearer end: the largest float32 below 1 has no neighbour to move to.
    upper = noise >= 0.5
    tail = torch.where(upper, 1 - noise - _HALF_STEP, noise + _HALF_STEP).clamp(min=_HALF_STEP)
    eps = torch.special.ndtri(tail)
    return torch.where(upper, -eps, eps)
