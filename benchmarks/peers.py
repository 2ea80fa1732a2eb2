"""Glow in other libraries, at the size of one of our configs, for `benchmarks.step` and `benchmarks.density`. Not
for measuring it.

Each is built from the library's own parts, as its documentation builds Glow: levels that begin with a squeeze, steps of
actnorm, 1x1 convolution and affine coupling, and half of the channels leaving after each level but the last. The
networks of the couplings are Glow's: convolutions of 3x3, 1x1 and 3x3 with rectifiers between them.

- normflows: `MultiscaleFlow` of `GlowBlock` under a trained diagonal Gaussian, as in its example, without classes.
- nflows: `MultiscaleCompositeTransform` of `ActNorm`, `OneByOneConvolution` and `AffineCouplingTransform` under a
  standard normal.
- FrEIA: `GraphINN` of `AllInOneBlock`, which is such a step, under a standard normal. Its 1x1 convolution is a fixed
  rotation: it has less to train and to compute than the others.
- memcnn keeps no activations. It knows nothing of log-determinants, and its own couplings transform both halves with
  two networks, so it gets our layers: one `InvertibleModuleWrapper(keep_input=False)` goes around a whole step (around
  each layer it would keep and invert more), with the log-determinant as the step's second output. On the way back it
  inverts the step and runs it forward again: a network runs three times a training step.

All are optional and depend on nothing of each other. What they are imported with: torch, numpy, and scipy for FrEIA.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from eiwtrain import flow


def installed(peer: str) -> bool:
    """Whether the package can be imported."""
    return importlib.util.find_spec(peer) is not None


def glow(peer: str, config: flow.FlowConfig) -> nn.Module:
    """Return a Glow of the peer that maps reals, (B, C, H, W), to -log p(x), (B,), in nats.

    Args:
        peer: one of `PEERS`, installed.
        config: the image's shape, and the levels, steps of each, and hidden channels.
    """
    with warnings.catch_warnings():  # memcnn uses what torch deprecates, and would silence all UserWarnings forever
        warnings.simplefilter("ignore")
        return PEERS[peer](config)


class _NegativeLogProb(nn.Module):
    """A flow of a peer and the function that makes of it -log p(x)."""

    def __init__(self, model: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _levels(config: flow.FlowConfig) -> list[tuple[int, int, int]]:
    """Return (C, H, W) of each level, after its squeeze."""
    channels, height, width = config.image_shape
    return [(channels << n + 1, height >> n, width >> n) for n in range(1, config.levels + 1)]


def _network(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, 1),
        nn.ReLU(),
        nn.Conv2d(hidden, outputs, 3, padding=1),
    )


def _normflows(config: flow.FlowConfig) -> nn.Module:
    import normflows as nf

    priors, flows, merges = [], [], []
    for level, (channels, *grid) in reversed(list(enumerate(_levels(config)))):  # in the order of sampling
        last = level == config.levels - 1
        steps = config.steps_of_levels[level]
        flows.append([nf.flows.GlowBlock(channels, config.conditioner.hidden) for _ in range(steps)])
        flows[-1].append(nf.flows.Squeeze())
        if not last:
            merges.append(nf.flows.Merge())
        priors.append(nf.distributions.DiagGaussian((channels if last else channels // 2, *grid)))
    model = nf.MultiscaleFlow(priors, flows, merges, class_cond=False)
    return _NegativeLogProb(model, lambda x: model(x))


class _WithoutContext(nn.Module):
    """A network as nflows calls it, with a condition, which there is not."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        return cast(Tensor, self.network(x))


def _nflows(config: flow.FlowConfig) -> nn.Module:
    from nflows import transforms
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow

    def network(inputs: int, outputs: int) -> nn.Module:
        return _WithoutContext(_network(inputs, outputs, config.conditioner.hidden))

    multiscale = transforms.MultiscaleCompositeTransform(config.levels)
    for (channels, *grid), steps in zip(_levels(config), config.steps_of_levels, strict=True):
        parts: list[nn.Module] = [transforms.SqueezeTransform()]
        for _ in range(steps):
            parts.append(transforms.ActNorm(channels))
            parts.append(transforms.OneByOneConvolution(channels))
            mask = torch.arange(channels) >= channels // 2
            parts.append(transforms.AffineCouplingTransform(mask, network))
        multiscale.add_transform(transforms.CompositeTransform(parts), (channels, *grid))
    model = Flow(multiscale, StandardNormal([config.dims]))
    return _NegativeLogProb(model, lambda x: -model.log_prob(x))


def _freia(config: flow.FlowConfig) -> nn.Module:
    import FrEIA.framework as framework
    import FrEIA.modules as parts

    def network(inputs: int, outputs: int) -> nn.Module:
        return _network(inputs, outputs, config.conditioner.hidden)

    nodes = [framework.InputNode(*config.image_shape)]
    latents = []
    for level, steps in enumerate(config.steps_of_levels):
        nodes.append(framework.Node(nodes[-1], parts.IRevNetDownsampling, {}))
        for _ in range(steps):
            options = {"subnet_constructor": network, "permute_soft": True}
            nodes.append(framework.Node(nodes[-1], parts.AllInOneBlock, options))
        if level < config.levels - 1:
            nodes.append(framework.Node(nodes[-1], parts.Split, {}))
            latents.append(framework.OutputNode(nodes[-1].out1))
    latents.append(framework.OutputNode(nodes[-1]))
    model = framework.GraphINN([*nodes, *latents])

    def negative_log_prob(x: Tensor) -> Tensor:
        z, log_det = model(x)
        return -_standard_normal(z if isinstance(z, (tuple, list)) else [z]) - log_det

    return _NegativeLogProb(model, negative_log_prob)


class _Step(nn.Module):
    """A bijection in the form that memcnn needs."""

    def __init__(self, bijection: flow.Bijection) -> None:
        super().__init__()
        self.bijection = bijection

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det, _ = self.bijection(x)
        return y, log_det.clone()  # memcnn detaches it in place, which a view refuses

    def inverse(self, y: Tensor, log_det: Tensor) -> Tensor:
        return self.bijection.inverse(y)


def _memcnn(config: flow.FlowConfig) -> nn.Module:
    import memcnn

    model = flow.EIWFlow(config)
    levels = [cast(flow.Level, level) for level in model.levels]
    chains = [
        [
            memcnn.InvertibleModuleWrapper(_Step(part), keep_input=False)
            for part in (*level.bijections(), cast(flow.Bijection, level.prior))
        ]
        for level in levels
    ]

    def negative_log_prob(x: Tensor) -> Tensor:
        total, latents = x.new_zeros(len(x)), []
        for level, chain in zip(levels, chains, strict=True):
            x = flow.squeeze(x).clone()  # memcnn frees the memory of its input, which latents may share
            for step in chain:
                x, log_det = step(x)
                total = total + log_det
            x, z = level.split(x)
            latents.append(z)
        return -_standard_normal(latents) - total

    return _NegativeLogProb(model, negative_log_prob)


def _standard_normal(latents: Any) -> Tensor:
    flat = torch.cat([z.flatten(1) for z in latents], dim=1)
    return -0.5 * (flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi))


PEERS: dict[str, Callable[[flow.FlowConfig], nn.Module]] = {
    "normflows": _normflows,
    "nflows": _nflows,
    "FrEIA": _freia,
    "memcnn": _memcnn,
}
