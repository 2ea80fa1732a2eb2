"""A level of a multiscale flow: squeeze, steps, shuffle, and the prior of the channels that leave.

Not for how levels make an image model: splits, latents and sampling are `multiscale`'s.
"""

from __future__ import annotations

import math
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bijection import Bijection, Chain, compose
from .conditioners import make_conditioner
from .config import FlowConfig
from .layers import ActNorm, AffineCoupling, InvertibleConv1x1, NetworkCoupling, bounded, squeeze, unsqueeze
from .memory import bytes_saved
from .reversible import run_chain
from .shuffle import make_shuffle
from .spline import SplineCoupling

_SPLIT_PRIOR_BOUND = 4.0
"""Largest absolute log-scale, in nats: wider than a step's, because nothing after the prior can make up for it."""

_LEAST_VARIANCE = 1e-12


@torch.no_grad()
def entropy_proxy(x: Tensor) -> Tensor:
    """Return the entropy of Gaussians with the variances of the channels of x, (B, C, H, W), in nats per dimension."""
    variance = x.var(dim=(0, 2, 3), correction=0).clamp(min=_LEAST_VARIANCE)
    return 0.5 * (2 * math.pi * math.e * variance).log().mean()


class ClassPrior(nn.Module):
    """A mean and a scale for each class and channel, as an affine map to a standard normal; starts as the identity
    (as the class-conditional prior of Glow's code, on every level)."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(classes, channels))
        self.raw_log_scale = nn.Parameter(torch.zeros(classes, channels))

    def forward(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) and int64 labels (B,) to the same shape and log-determinants, (B,). A label out of range
        raises IndexError on the CPU, and fails an assertion on a GPU."""
        mean, log_scale = self._of(labels, z)
        return (z - mean) * (-log_scale).exp(), -z.shape[2] * z.shape[3] * log_scale.flatten(1).sum(1)

    def inverse(self, z: Tensor, labels: Tensor) -> Tensor:
        """Invert the first output of `forward`."""
        mean, log_scale = self._of(labels, z)
        return z * log_scale.exp() + mean

    def _of(self, labels: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        # No indexing: there -1, the mark of an image without a class, would be the last class.
        mean, raw = (F.embedding(labels, p).to(z.dtype)[:, :, None, None] for p in (self.mean, self.raw_log_scale))
        return mean, bounded(raw, _SPLIT_PRIOR_BOUND)


class Level(nn.Module):
    """Squeeze, steps, shuffle, and the prior of the channels that leave; the split itself is in `EIWFlow`.

    It is the smallest module whose `forward` runs reversible functions, so ZeRO 3 must treat it as a leaf.

    The prior is a Gaussian: at a split, with mean and log-scale from the half that stays (as in Glow's code), at
    the last level, with learned ones per channel. Both are written as an affine map to a standard normal.

    Args:
        channels, grid: C and (H, W) after the squeeze.
        last: whether all channels leave.
    """

    def __init__(self, config: FlowConfig, channels: int, grid: tuple[int, int], last: bool) -> None:
        super().__init__()
        self.backprop, self.anchor_every, self.last = config.backprop, config.anchor_every, last
        half = channels // 2

        def conditioner(outputs_per_channel: int) -> nn.Module:
            bfloat16 = config.conditioner_dtype == "bfloat16"
            return make_conditioner(half, outputs_per_channel * (channels - half), grid, config.conditioner, bfloat16)

        def coupling() -> NetworkCoupling:
            if config.coupling == "spline":
                return SplineCoupling(conditioner(SplineCoupling.outputs_for(config.bins)), config.bins)
            return AffineCoupling(conditioner(AffineCoupling.outputs_per_channel))

        steps = [Chain([ActNorm(channels), InvertibleConv1x1(channels), coupling()]) for _ in range(config.steps)]
        shuffle = None if last else make_shuffle(config.shuffle, channels, config.shuffle_block)
        self.bijections = nn.ModuleList(steps if shuffle is None else [*steps, shuffle])
        self.prior: Bijection = (
            ActNorm(channels)
            if last
            else AffineCoupling(conditioner(AffineCoupling.outputs_per_channel), bound=_SPLIT_PRIOR_BOUND)
        )
        self.leaving = channels if last else channels // 2
        self.class_prior = ClassPrior(config.classes, self.leaving) if config.classes else None

    def forward(
        self, x: Tensor, labels: Tensor | None = None, stored: int = 0, costs: list[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map (B, C, H, W) to (B, 4C, H/2, W/2), whose last `leaving` channels leave; log-determinant and
        penalty, (B,); entropy proxies, (2,). All are in one flat tuple, because ZeRO 3 sees no tensors in nested ones.

        Args:
            labels: int64 (B,), if there are classes.
            stored: with `backprop="auto"`, how many of the last bijections, of which the prior is the very last, keep
                their activations.
            costs: a list to which the bytes of activations of each bijection are appended, if given.
        """
        y = squeeze(x)
        if costs is not None:
            costs += self._costs(y)
        body = run_chain(self._bijections(), y, self.backprop, self.anchor_every, max(0, stored - 1))
        # Measured before the prior whitens the channels that leave.
        stays, leaves = self.split(body.y.detach())
        nothing = leaves.new_tensor(math.nan)
        entropy = torch.stack((entropy_proxy(leaves), nothing if self.last else entropy_proxy(stays)))
        out = compose(body, run_chain([self.prior], body.y, self.backprop, stored=stored))
        if self.class_prior is not None and labels is not None:
            stays, z = self.split(out.y)
            z, log_det = self.class_prior(z, labels)
            out = out._replace(y=torch.cat((stays, z), dim=1), log_det=out.log_det + log_det)
        return *out, entropy

    def inverse(self, y: Tensor, labels: Tensor | None = None) -> Tensor:
        """Invert the map of `forward` from x to y."""
        if self.class_prior is not None and labels is not None:
            stays, z = self.split(y)
            y = torch.cat((stays, self.class_prior.inverse(z, labels)), dim=1)
        y = self.prior.inverse(y)
        for bijection in reversed(self._bijections()):
            y = bijection.inverse(y)
        return unsqueeze(y)

    def initialize(self, x: Tensor) -> Tensor:
        """Initialise all but the prior, which starts as a standard normal, from data; return y."""
        y = squeeze(x)
        for bijection in self._bijections():
            y = bijection.initialize(y)
        return y

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Split y into the channels that stay, none at the last level, and those that leave."""
        return y[:, : y.shape[1] - self.leaving], y[:, y.shape[1] - self.leaving :]

    def _costs(self, y: Tensor) -> list[int]:
        costs = []
        parameters = list(self.parameters())
        for bijection in [*self._bijections(), self.prior]:
            alone = partial(run_chain, [bijection], y.detach().requires_grad_(), "stored")
            cost, out = bytes_saved(alone, parameters)
            costs.append(cost)
            y = out.y
        return costs

    def _bijections(self) -> list[Bijection]:
        return [cast(Bijection, b) for b in self.bijections]
