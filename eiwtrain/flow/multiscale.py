"""EIWFlow: levels of steps, shuffles, splits and priors; log_prob, bits_per_dim, encode, decode, sample.

Not for training it, nor for files (`files`).
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from . import images
from .bijection import Bijection, Chain, Transformed, then, without_autocast, zeros
from .conditioners import ConvConditioner
from .config import FlowConfig
from .layers import ActNorm, AffineCoupling, InvertibleConv1x1, squeeze, unsqueeze
from .reversible import run
from .shuffle import make_shuffle

_SPLIT_PRIOR_BOUND = 4.0
"""Of the absolute log-scale, in nats: wider than a step's, as nothing after the prior can make up for it."""

_LEAST_VARIANCE = 1e-12


class FlowOutput(NamedTuple):
    """What the loss and the metrics of a batch need.

    Attributes:
        log_prob: log p(x), (B,), in nats.
        penalty: the shuffles' regulariser, (B,): the mean of squared log-weights, summed over shuffles and halves.
        entropy: (levels, 2), detached: the entropy proxy, in nats per dimension, of what leaves at a level and of
            what stays. At the last level all leaves and nothing stays, so its second entry is NaN.
    """

    log_prob: Tensor
    penalty: Tensor
    entropy: Tensor


@torch.no_grad()
def entropy_proxy(x: Tensor) -> Tensor:
    """The entropy of Gaussians with the variances of the channels of x, (B, C, H, W), in nats per dimension."""
    variance = x.var(dim=(0, 2, 3), correction=0).clamp(min=_LEAST_VARIANCE)
    return 0.5 * (2 * math.pi * math.e * variance).log().mean()


def standard_normal(z: Tensor) -> Tensor:
    """log N(z; 0, 1) of each sample, (B,), in nats."""
    flat = z.flatten(1)
    return -0.5 * (flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi))


class Level(nn.Module):
    """Squeeze, steps, shuffle, and the prior of what leaves; the split itself is `EIWFlow`'s.

    It is the smallest module whose `forward` runs reversible functions: what ZeRO 3 has to be told is a leaf.

    The prior is a Gaussian: at a split, with mean and log-scale from the half that stays (as in Glow's code), at
    the top, with learned ones per channel. Both are written as an affine map to a standard normal.
    """

    def __init__(self, config: FlowConfig, channels: int, last: bool) -> None:
        super().__init__()
        self.backprop, self.anchor_every, self.last = config.backprop, config.anchor_every, last
        half = channels // 2

        def conditioner() -> nn.Module:
            return ConvConditioner(half, channels, config.conditioner, config.conditioner_dtype == "bfloat16")

        steps = [
            Chain([ActNorm(channels), InvertibleConv1x1(channels), AffineCoupling(conditioner())])
            for _ in range(config.steps)
        ]
        shuffle = None if last else make_shuffle(config.shuffle, channels)
        self.bijections = nn.ModuleList(steps if shuffle is None else [*steps, shuffle])
        self.prior: Bijection = ActNorm(channels) if last else AffineCoupling(conditioner(), bound=_SPLIT_PRIOR_BOUND)

    def forward(self, x: Tensor) -> tuple[Transformed, Tensor]:
        """(B, C, H, W) to (B, 4C, H/2, W/2), whose first half of channels stays; and the entropy proxies (2,)."""
        body = run(self._bijections(), squeeze(x), self.backprop, self.anchor_every)
        # Before the prior has whitened what leaves.
        stays, leaves = body.y.detach().chunk(2, dim=1)
        if self.last:
            entropy = torch.stack((entropy_proxy(body.y.detach()), leaves.new_tensor(math.nan)))
        else:
            entropy = torch.stack((entropy_proxy(leaves), entropy_proxy(stays)))
        return then(body, run([self.prior], body.y, self.backprop)), entropy

    def inverse(self, y: Tensor) -> Tensor:
        """The inverse of `forward`'s y."""
        y = self.prior.inverse(y)
        for bijection in reversed(self._bijections()):
            y = bijection.inverse(y)
        return unsqueeze(y)

    def initialize(self, x: Tensor) -> Tensor:
        """Data-dependent initialisation of all but the prior, which starts as a standard normal; returns y."""
        y = squeeze(x)
        for bijection in self._bijections():
            y = bijection.initialize(y)
        return y

    def _bijections(self) -> list[Bijection]:
        return [cast(Bijection, b) for b in self.bijections]


class EIWFlow(nn.Module):
    """A multiscale flow with an entropy-informed shuffle before each split (EIW-Flow, arXiv 2407.04958; how
    far it is the paper's, `eiwtrain.flow.shuffle` says), on Glow's steps (arXiv 1807.03039, figure 2).

    It models `dequantize`d images: x in [-1/2, 1/2), (B, C, H, W). Whatever the dtype of x, it computes in
    `trunk_dtype`, or in the dtype of the parameters if that is wider. Autocast around its methods changes nothing.

    Raises (all methods that take images): ValueError for uint8 or images of another shape.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        channels, height, width = config.image_shape
        levels = []
        self.latent_shapes: list[tuple[int, int, int]] = []
        """(C, H, W) of what leaves at each level."""
        for level in range(config.levels):
            last = level == config.levels - 1
            channels, height, width = 4 * channels, height // 2, width // 2
            levels.append(Level(config, channels, last))
            channels = channels if last else channels // 2
            self.latent_shapes.append((channels, height, width))
        self.levels = nn.ModuleList(levels)

    @property
    def dims(self) -> int:
        """C * H * W."""
        return self.config.dims

    def forward(self, x: Tensor) -> FlowOutput:
        """log p(x) and what training reports beside it; see `FlowOutput`."""
        latents, log_det, penalty, entropy = self._encode(x)
        prior = torch.stack([standard_normal(z) for z in latents]).sum(0)
        return FlowOutput(log_det + prior, penalty, entropy)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), (B,), in nats."""
        return self.forward(x).log_prob

    def bits_per_dim(self, x: Tensor) -> Tensor:
        """Bits per dimension of each image, (B,): `n_bits - log p(x) / (D ln 2)`."""
        return images.bits_per_dim(self.log_prob(x), self.dims, self.config.n_bits)

    def encode(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The latents of each level, standard normal under the model, and log |det dz/dx|, (B,), in nats."""
        latents, log_det, _, _ = self._encode(x)
        return latents, log_det

    def decode(self, latents: list[Tensor]) -> Tensor:
        """The images of which `encode` makes these latents, (B, C, H, W). Raises ValueError for other shapes."""
        shapes = [tuple(z.shape[1:]) for z in latents]
        if shapes != self.latent_shapes:
            raise ValueError(f"latents of shapes {shapes}, and the flow has {self.latent_shapes}")
        with without_autocast(latents[-1]):
            y = latents[-1].to(self._trunk_dtype())
            for level, z in zip(reversed(self._levels()), [None, *reversed(latents[:-1])], strict=True):
                y = level.inverse(y if z is None else torch.cat((y, z.to(y.dtype)), dim=1))
        return y

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """`n` images as reals, (n, C, H, W); `to_images` makes pixels of them.

        Args:
            temperature: the standard deviation of the latents; below 1 gives likelier, less varied images.
            generator: of the noise, on any device; the same seed gives the same images.
        """
        device = next(self.parameters()).device
        source = device if generator is None else generator.device
        dtype = self._trunk_dtype()
        latents = [
            torch.randn(n, *shape, generator=generator, device=source, dtype=dtype).to(device) * temperature
            for shape in self.latent_shapes
        ]
        return self.decode(latents)

    def to_images(self, x: Tensor) -> Tensor:
        """Reals to uint8 images, clamped to what pixels can be."""
        return images.quantize(x, self.config.n_bits)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Data-dependent initialisation of the actnorms from a batch, before training (Glow, section 3.1)."""
        x = self._checked(x)
        with without_autocast(x):
            for level in self._levels():
                x = level.initialize(x)
                x = x.chunk(2, dim=1)[0]

    @torch.no_grad()
    def drift(self, x: Tensor) -> float:
        """||decode(encode(x)) - x|| / ||x|| over the batch: the reconstruction error that invertible backprop lives
        with, without anchors. No gradients."""
        x = self._checked(x)
        back = self.decode(self.encode(x)[0])
        return ((back - x).double().norm() / x.double().norm().clamp(min=1e-30)).item()

    def _encode(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        x = self._checked(x)
        with without_autocast(x):
            total = Transformed(x, zeros(x), zeros(x))
            latents, entropies = [], []
            for level in self._levels():
                out, entropy = level(total.y)
                total = then(total, out)
                entropies.append(entropy)
                if level.last:
                    latents.append(total.y)
                else:
                    stays, leaves = total.y.chunk(2, dim=1)
                    latents.append(leaves)
                    total = total._replace(y=stays)
        return latents, total.log_det, total.penalty, torch.stack(entropies)

    def _levels(self) -> list[Level]:
        return [cast(Level, level) for level in self.levels]

    def _trunk_dtype(self) -> torch.dtype:
        return torch.promote_types(getattr(torch, self.config.trunk_dtype), next(self.parameters()).dtype)

    def _checked(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise ValueError(f"the flow takes dequantized images, not {x.dtype}: see eiwtrain.flow.dequantize")
        if x.dim() != 4 or tuple(x.shape[1:]) != self.config.image_shape:
            raise ValueError(f"images of shape {tuple(x.shape)}, and the flow takes (B, *{self.config.image_shape})")
        return x.to(self._trunk_dtype())
