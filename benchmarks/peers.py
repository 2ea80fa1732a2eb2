"""The Glow steps of a flow in peer libraries, with the flow's own weights. Not for measuring them: that is `backprop`.

Each peer is made as favourable as is fair:

- memcnn 1.5.2 keeps no activations. One `InvertibleModuleWrapper(keep_input=False)` goes around a whole step of our
  layers (around each layer it would keep and invert more). On the way back it inverts the step and then runs it forward
  again, so a conditioner runs three times a training step. It knows nothing of log-determinants, and its own
  `AffineCoupling` gives none and always transforms both halves, with two networks: hence our layers, and the
  log-determinant as the step's second output.
- FrEIA 0.2 stores activations. `SequenceINN` of its `ActNorm`, `Fixed1x1Conv` and `AffineCouplingOneSided`, with our
  conditioner as the subnet and our bound as the clamp. Its 1x1 convolution for images is a fixed matrix, not a trained
  one: it has less to keep and less to compute than the others.

Neither depends on the other, and both are optional. What they are imported with: torch and numpy; FrEIA also scipy.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from eiwtrain import flow

PEERS = ("memcnn", "FrEIA")

Steps = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(B, C, H, W) to the same and the log-determinants, (B,)."""


def installed(peer: str) -> bool:
    """Whether the package can be imported."""
    return importlib.util.find_spec(peer) is not None


def loss(peer: str, model: flow.EIWFlow) -> Callable[[Tensor], Tensor]:
    """What a peer makes of `-model.log_prob(x).mean()`, up to a constant.

    Args:
        peer: one of `PEERS`, installed.
        model: of one level, with affine couplings, no shuffle and a standard normal prior, as it is at the start. Its
            conditioners are shared, not copied: their gradients are found there.
    """
    chains = list(cast(Any, model.levels[0]).bijections())
    channels, height, width = model.latent_shapes[0]
    prior = flow.ActNorm(channels).to(next(model.parameters()).device)
    steps = {"memcnn": _memcnn, "FrEIA": _freia}[peer](chains, prior, (channels, height, width))

    def of(x: Tensor) -> Tensor:
        z, log_det = steps(flow.squeeze(x))
        return (0.5 * z.square().flatten(1).sum(1) - log_det).mean()

    return of


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


def _memcnn(chains: list[Any], prior: flow.ActNorm, shape: tuple[int, int, int]) -> Steps:
    with warnings.catch_warnings():  # it uses what torch deprecates, and would silence all UserWarnings forever
        warnings.simplefilter("ignore")
        import memcnn

    wrapped = [memcnn.InvertibleModuleWrapper(_Step(part), keep_input=False) for part in (*chains, prior)]

    def steps(x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for step in wrapped:
            x, log_det = step(x)
            total = total + log_det
        return x, total

    return steps


def _freia(chains: list[Any], prior: flow.ActNorm, shape: tuple[int, int, int]) -> Steps:
    import FrEIA.framework
    import FrEIA.modules as parts

    inn = FrEIA.framework.SequenceINN(*shape)
    for chain in chains:
        actnorm, mixing, coupling = chain
        with torch.no_grad():
            weight = mixing(torch.eye(shape[0])[:, :, None, None].to(mixing.factors.device)).y[:, :, 0, 0].mT
        inn.append(parts.ActNorm)
        inn.append(parts.Fixed1x1Conv, M=weight.mT)  # it convolves with the transpose of M
        inn.append(
            parts.AffineCouplingOneSided,
            subnet_constructor=lambda _inputs, _outputs, coupling=coupling: coupling.conditioner,
            clamp=coupling.bound,
            clamp_activation=lambda raw, coupling=coupling: torch.tanh(raw / coupling.bound),
        )
        _copy(actnorm, inn[len(inn) - 3])
    inn.append(parts.ActNorm)
    _copy(prior, inn[len(inn) - 1])
    return inn.to(prior.bias.device)


@torch.no_grad()
def _copy(ours: flow.ActNorm, theirs: Any) -> None:
    theirs.init_on_next_batch = False
    theirs.scale.copy_(ours.log_scale)
    theirs.bias.copy_(ours.bias * ours.log_scale.exp())  # theirs comes after the scale
