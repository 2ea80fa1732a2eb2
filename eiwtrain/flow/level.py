"""A level of a multiscale flow: units of steps, the noise that joins them, the shuffle, the prior of what leaves.

Not for how levels make an image model: splits, latents and sampling are `multiscale`'s. Nor for what a level of a
backbone is made of: that is `backbones`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .bijection import Bijection
from .config import FlowConfig
from .fused import Fused, Run
from .gaussian import log_normal, normal
from .layers import ConditionedCoupling, bounded, squeeze, unsqueeze
from .memory import bytes_saved
from .reversible import INVERTED, Plan, run, run_chain

PRIOR_BOUND = 4.0
"""Largest absolute log-scale of a prior, in nats: wider than a step's, as nothing after it can make up for it."""

Costs = list[tuple[int, int]]
"""Bytes that each bijection keeps, stored and selective."""

_LEAST_VARIANCE = 1e-12


@torch.no_grad()
def entropy_proxy(x: Tensor) -> Tensor:
    """Return the entropy of Gaussians with the variances of the channels of x, (B, C, H, W), in nats per dimension."""
    places = (0, 2, 3)
    variance = (x - x.mean(places, keepdim=True)).square().mean(places)  # several times as fast as torch.var on CPUs
    variance = variance.clamp(min=_LEAST_VARIANCE)
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
        return mean, bounded(raw, PRIOR_BOUND)


class Level(nn.Module):
    """Units of bijections, noise that joins before each unit but the first, and the prior of the channels that leave.

    The split itself is in `EIWFlow`. A level is the smallest module whose `forward` runs reversible functions, so ZeRO
    3 must treat it as a leaf.

    The channels that join before unit i are mu + exp(s) e with e from N(0, 1), where mu and s come from the input of
    the level and the outputs of the units before i, except for the last of them (cross-unit coupling, DenseFlow,
    arXiv 2106.04627; as its program computes it). Backward keeps the output of each unit, and nothing for the joining
    noise, which it draws again.

    Args:
        config: of the flow.
        units: bijections, to be run one after the other.
        joins: the cross-unit coupling before each unit but the first: of the channels that join, and of those that
            they depend on.
        prior: maps what leaves to a standard normal; it may see what stays. None if what leaves is one already.
        squeezes: whether the level begins with `squeeze`.
        shape: (C, H, W) after the last unit.
        leaving: how many of these channels leave: the last ones.
    """

    def __init__(
        self,
        config: FlowConfig,
        units: Sequence[Sequence[Bijection]],
        joins: Sequence[ConditionedCoupling],
        prior: Bijection | None,
        squeezes: bool,
        shape: tuple[int, int, int],
        leaving: int,
    ) -> None:
        super().__init__()
        self.backprop, self.anchor_every = config.backprop, config.anchor_every
        self.units = nn.ModuleList(nn.ModuleList(unit) for unit in units)
        self.joins = nn.ModuleList(joins)
        self.prior = prior
        self.squeezes, self.shape, self.leaving = squeezes, shape, leaving
        self.last = leaving == shape[0]
        self.class_prior = ClassPrior(config.classes, leaving) if config.classes else None

    def forward(
        self,
        x: Tensor,
        noise: Tensor | None = None,
        labels: Tensor | None = None,
        plan: Plan = INVERTED,
        costs: Costs | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map (B, C, H, W) to (B, *shape), whose last `leaving` channels leave; log-determinant and
        penalty, (B,); entropy proxies, (2,). All are in one flat tuple, because ZeRO 3 sees no tensors in nested ones.

        Args:
            noise: uniform in [0, 1), (B, C'', H', W'), for all channels that join, if any do. The log-determinant is
                then that of the map of x and the noise e, minus log N(e).
            labels: int64 (B,), if there are classes.
            plan: with `backprop="auto"`, what the last bijections keep, of which the prior is the very last.
            costs: a list to which the bytes are appended that each bijection keeps when stored, and when selective.
        """
        body = self._through_units(x, noise, plan, costs)
        # Measured before the prior whitens the channels that leave.
        stays, leaves = self.split(body.y.detach())
        nothing = leaves.new_full((), math.nan)
        entropy = torch.stack((entropy_proxy(leaves), nothing if self.last else entropy_proxy(stays)))
        out = body
        if self.prior is not None:
            self._measure([self.prior], body.y, costs)
            out = body.then(run([self.prior], body.y, self.backprop, kept=plan.part(1, 0)))
        if self.class_prior is not None and labels is not None:
            stays, z = self.split(out.y)
            z, log_det = self.class_prior(z, labels)
            out = out.then(Run(torch.cat((stays, z), dim=1), (log_det,)))
        return *out.transformed(), entropy

    def inverse(self, y: Tensor, labels: Tensor | None = None) -> Tensor:
        """Invert the map of `forward` from x to y, whatever the noise was."""
        if self.class_prior is not None and labels is not None:
            stays, z = self.split(y)
            y = torch.cat((stays, self.class_prior.inverse(z, labels)), dim=1)
        if self.prior is not None:
            y = self.prior.inverse(y)
        joining = [0, *(join.second for join in self._joins())]
        for unit, joined in zip(reversed(self._units()), reversed(joining), strict=True):
            y = Fused(unit).inverse(y)
            y = y[:, : y.shape[1] - joined]
        return unsqueeze(y) if self.squeezes else y

    def initialize(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Initialise all but the prior, which starts as a standard normal, from data; return y."""
        y = squeeze(x) if self.squeezes else x
        inputs = [y]
        for unit, join, uniform in zip(self._units(), self._joining(), self._pieces(noise), strict=True):
            if join is not None and uniform is not None:
                joined, _ = _join(join, uniform, *inputs)
                inputs.append(y)
                y = torch.cat((y, joined), dim=1)
            for bijection in unit:
                y = bijection.initialize(y)
        return y

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Split y into the channels that stay, none at the last level, and those that leave."""
        return y[:, : y.shape[1] - self.leaving], y[:, y.shape[1] - self.leaving :]

    def bijections(self) -> Iterator[Bijection]:
        """Yield the bijections of all units, in order."""
        for unit in self._units():
            yield from unit

    def _through_units(self, x: Tensor, noise: Tensor | None, plan: Plan, costs: Costs | None) -> Run:
        y = squeeze(x) if self.squeezes else x
        out = Run(y)
        inputs = [y]
        later = sum(len(unit) for unit in self._units()) + (self.prior is not None)
        for unit, join, uniform in zip(self._units(), self._joining(), self._pieces(noise), strict=True):
            later -= len(unit)
            of_unit = plan.part(len(unit), later)
            of_join = 0
            if join is not None and uniform is not None:
                keeps = self.backprop == "stored" or (self.backprop == "auto" and of_unit.stored == len(unit))
                joined, gained = _run_join(join, uniform, inputs, keeps)
                if costs is not None:
                    of_join = self._bytes_of_join(join, uniform, inputs)
                inputs.append(out.y)
                out = out.then(Run(torch.cat((out.y, joined), dim=1), (gained,)))
            self._measure(unit, out.y, costs, of_join)
            out = out.then(run(unit, out.y, self.backprop, self.anchor_every, of_unit))
        return out

    def _measure(self, bijections: Sequence[Bijection], y: Tensor, costs: Costs | None, more: int = 0) -> None:
        """Append the bytes of activations of each of the bijections to `costs`, if given; `more` counts with the first,
        as the network of noise that joins is stored where a whole unit is."""
        if costs is None:
            return
        parameters = list(self.parameters())
        for bijection in bijections:
            alone = partial(run_chain, [bijection], y.detach().requires_grad_())
            stored, out = bytes_saved(partial(alone, "stored"), parameters)
            selective, out = bytes_saved(partial(alone, "selective"), parameters)
            costs.append(
                (stored + more, min(stored, selective - out.y.nbytes))
            )  # of a chain one y is kept, not of each
            y, more = out.y, 0

    def _bytes_of_join(self, join: ConditionedCoupling, uniform: Tensor, inputs: Sequence[Tensor]) -> int:
        alone = partial(_join, join, uniform, *(x.detach().requires_grad_() for x in inputs))
        return bytes_saved(alone, self.parameters())[0]

    def _pieces(self, noise: Tensor | None) -> list[Tensor | None]:
        """Return the noise that joins before each unit: none before the first."""
        if noise is None:
            return [None] * len(self.units)
        return [None, *noise.split([join.second for join in self._joins()], dim=1)]

    def _joining(self) -> list[ConditionedCoupling | None]:
        return [None, *self._joins()]

    def _joins(self) -> list[ConditionedCoupling]:
        return [cast(ConditionedCoupling, join) for join in self.joins]

    def _units(self) -> list[list[Bijection]]:
        return [[cast(Bijection, b) for b in cast(nn.ModuleList, unit)] for unit in self.units]


def _run_join(
    join: ConditionedCoupling, uniform: Tensor, inputs: Sequence[Tensor], keeps: bool
) -> tuple[Tensor, Tensor]:
    """Run `_join`, keeping activations for the backward pass only if `keeps`."""
    if keeps or not torch.is_grad_enabled():
        return _join(join, uniform, *inputs)
    out: tuple[Tensor, Tensor] = checkpoint(
        _join, join, uniform, *inputs, use_reentrant=False, preserve_rng_state=False
    )
    return out


def _join(join: ConditionedCoupling, uniform: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mu + exp(s) e, (B, C'', H, W), and sum(s) - log N(e), (B,), in nats; mu and s come from the inputs."""
    condition = torch.cat(inputs, dim=1)
    e = normal(uniform).to(condition.dtype)
    out = join.transform(e, join.condition(condition))
    return out.y, out.log_det - log_normal(e)
