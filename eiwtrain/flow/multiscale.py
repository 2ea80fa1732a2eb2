"""EIWFlow: levels, splits and latents; log_prob, bits_per_dim, encode, decode, sample.

Not for training it, nor for files (`files`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import images
from .backbones import make_level
from .bijection import Transformed, compose, with_own_randomness, without_autocast, zeros_per_sample
from .config import FlowConfig
from .dequantization import VariationalDequantizer, iwbo
from .gaussian import log_normal
from .level import Costs, Level
from .memory import free_bytes, how_many_fit
from .order import Order
from .presets import preset
from .reversible import INVERTED, Plan


class FlowOutput(NamedTuple):
    """The values of a batch that the loss and the metrics need.

    Attributes:
        log_prob: log p(x), (B,), in nats; for pixels, a lower bound of log P, in the unit of `bits_per_dim`.
        penalty: the shuffles' regulariser, (B,), summed over shuffles: of ours the mean of squared log-weights of each
            half, of EIW-Flow's order that of `Order`.
        entropy: (levels, 2), detached: the entropy proxy, in nats per dimension, of the channels that leave
            at a level and of those that stay. At the last level all leave, so its second entry is NaN.
    """

    log_prob: Tensor
    penalty: Tensor
    entropy: Tensor


class EIWFlow(nn.Module):
    """A multiscale flow: EIW-Flow (arXiv 2407.04958) as its authors' program builds it (`backbone: dense`, DenseFlow's
    units with a learned order before each split), or with Glow's steps (arXiv 1807.03039, figure 2) and any shuffle.

    It models images as reals in [-1/2, 1/2), (B, C, H, W). Methods that take `x` take those (`dequantize` makes them),
    or pixels, uint8, together with `noise`, and dequantize them. `noise` is uniform in [0, 1), of shape
    (B, *config.noise_shape): an image's, or (B, n) where noise also joins on the way through the flow. Such a flow
    needs it with reals too, and its log-probabilities are lower bounds.

    Whatever the dtype of x, it computes in `trunk_dtype`, or in the dtype of the parameters if that is wider. Autocast
    around its methods changes nothing.

    Raises (all methods that take images): ValueError for images or noise of another shape, pixels without noise, labels
    that are missing or not expected.
    """

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        channels, *grid = config.image_shape
        levels = []
        self.latent_shapes: list[tuple[int, int, int]] = []
        """Shapes (C, H, W) of the latents that leave at each level."""
        for number in range(config.levels):
            level = make_level(config, number, channels, (grid[0], grid[1]))
            levels.append(level)
            channels, *grid = level.shape
            self.latent_shapes.append((level.leaving, grid[0], grid[1]))
            channels -= level.leaving
        self.levels = nn.ModuleList(levels)
        self.dequantizer: VariationalDequantizer | None = None
        if config.dequantization == "variational":
            bfloat16 = config.conditioner_dtype == "bfloat16"
            self.dequantizer = VariationalDequantizer(
                config.image_shape, config.n_bits, config.dequantizer, config.backprop, bfloat16
            )
        self._plans: dict[tuple[torch.Size, torch.dtype, torch.device, bool], list[Plan]] = {}
        self.memory_share = 1.0
        """Share of the memory budget that activations may fill under `backprop="auto"`."""
        self.kept: tuple[int, int] | None = None
        """Number of bijections that keep their activations under `backprop="auto"`, and of all, as last measured."""
        self._numbers = sum(p.numel() for p in self.parameters())  # now, as ZeRO 3 empties parameters

    @classmethod
    def from_config(cls, config: FlowConfig | dict[str, Any]) -> EIWFlow:
        """Make a flow from a config, or from a mapping as `FlowConfig.to_dict` returns. A `preset` in it
        gives the defaults: `EIWFlow.from_config({"preset": "glow", "image_shape": [3, 32, 32]})`. Raises ValueError for
        values that make no sense."""
        if isinstance(config, dict):
            changes = dict(config)
            name = changes.pop("preset", None)
            config = FlowConfig.from_dict(changes if name is None else preset(name, changes))
        return cls(config)

    @property
    def dims(self) -> int:
        """Dimensions of an image, C * H * W."""
        return self.config.dims

    def forward(self, x: Tensor, noise: Tensor | None = None, labels: Tensor | None = None) -> FlowOutput:
        """Return log p(x) and the other values that training reports; see `FlowOutput`."""
        self._need_noise(noise)
        x, log_q, joining = self._reals(x, noise)
        latents, log_det, penalty, entropy = self._encode(x, joining, labels)
        prior = torch.stack([log_normal(z) for z in latents]).sum(0)
        return FlowOutput(log_det + prior - log_q, penalty, entropy)

    def log_prob(self, x: Tensor, noise: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return log p(x), (B,), in nats; for pixels a lower bound, one draw of the ELBO: see `FlowOutput`."""
        return self.forward(x, noise, labels).log_prob

    def bits_per_dim(self, x: Tensor, noise: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return bits per dimension of each image, (B,): `n_bits - log p(x) / (D ln 2)`; for pixels an upper bound."""
        return images.bits_per_dim(self.log_prob(x, noise, labels), self.dims, self.config.n_bits)

    def iwbo(self, pixels: Tensor, noises: Iterable[Tensor], labels: Tensor | None = None) -> Tensor:
        """Return the importance-weighted bound of log P(pixels), (B,), in nats as `log_prob`, over k draws of noise.

        At k = 1 it is the ELBO; it grows with k towards log P (arXiv 1509.00519, theorem 1; for dequantization
        arXiv 1902.00275, section 4). `images.bits_per_dim` converts it to the unit in which models are compared.
        """
        return iwbo(torch.stack([self.log_prob(pixels, noise, labels) for noise in noises]))

    def encode(
        self, x: Tensor, labels: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Return the latents of each level, standard normal under the model, and log |det dz/dx|, (B,), in nats.

        It takes reals: dequantize pixels first. Where noise joins on the way, its log q is subtracted; with `noise`
        None, its median, zero, joins.
        """
        if not x.is_floating_point():
            raise ValueError(f"encode takes dequantized images, not {x.dtype}")
        x, _, joining = self._reals(x, noise)
        latents, log_det, _, _ = self._encode(x, joining, labels)
        return latents, log_det

    def decode(self, latents: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """Return the images that `encode` maps to these latents, (B, C, H, W).

        Raises:
            ValueError: for other shapes.
            RuntimeError: in training mode if conditioners have dropout, because it would invert another map.
        """
        shapes = [tuple(z.shape[1:]) for z in latents]
        if shapes != self.latent_shapes:
            raise ValueError(f"latents of shapes {shapes}, and the flow has {self.latent_shapes}")
        if self.training and self.config.conditioner.dropout:
            raise RuntimeError("a flow with dropout has no inverse in training mode: call eval() first")
        self._check_labels(labels, len(latents[-1]))
        with without_autocast(latents[-1]):
            y = latents[-1].to(self._trunk_dtype())
            for level, z in zip(reversed(self._levels()), [None, *reversed(latents[:-1])], strict=True):
                y = level.inverse(y if z is None else torch.cat((y, z.to(y.dtype)), dim=1), labels)
        return y

    @torch.no_grad()
    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Draw `n` images as reals, (n, C, H, W); `to_images` turns them into pixels.

        Args:
            temperature: the standard deviation of the latents; below 1 gives likelier, less varied images.
            generator: source of the noise, on any device; the same seed gives the same images.
            labels: int64 (n,), if there are classes; None for 0, 1, ... in turn.
        """
        device = next(self.parameters()).device
        source = device if generator is None else generator.device
        dtype = self._trunk_dtype()
        latents = [
            torch.randn(n, *shape, generator=generator, device=source, dtype=dtype).to(device) * temperature
            for shape in self.latent_shapes
        ]
        if labels is None and self.config.classes:
            labels = torch.arange(n, device=device) % self.config.classes
        return self.decode(latents, labels)

    def dequantize(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Turn pixels, uint8, into reals; also return log q of the added noise, (B,), in nats: zero if uniform.

        Args:
            noise: (B, *config.noise_shape); where noise also joins on the way, that of the image's shape is enough.
        """
        if noise.dim() == 2 and noise.shape[1] == self.dims + self._joining_dims:
            noise = noise[:, : self.dims].view(-1, *self.config.image_shape)
        noise = noise.to(self._trunk_dtype())
        if self.dequantizer is None:
            return images.dequantize(pixels, noise, self.config.n_bits), zeros_per_sample(noise)
        x, log_q = self.dequantizer(pixels, noise)
        return x, log_q

    def to_images(self, x: Tensor) -> Tensor:
        """Turn reals into uint8 images, clamped to the range of pixels."""
        return images.quantize(x, self.config.n_bits)

    @torch.no_grad()
    def initialize(self, x: Tensor, noise: Tensor | None = None) -> None:
        """Initialise the actnorms of the levels from a first batch, before training (Glow, section 3.1)."""
        self._need_noise(noise)
        x, _, joining = self._reals(x, noise)
        with without_autocast(x):
            for level, joins in zip(self._levels(), joining, strict=True):
                x, _ = level.split(level.initialize(x, joins))

    @torch.no_grad()
    def drift(self, x: Tensor, labels: Tensor | None = None) -> float:
        """Return ||decode(encode(x)) - x|| / ||x|| over the batch of reals: the reconstruction error of invertible
        backprop without anchors. No gradients."""
        x, _, _ = self._reals(x, None)
        back = self.decode(self.encode(x, labels)[0], labels)
        return ((back - x).double().norm() / x.double().norm().clamp(min=1e-30)).item()

    def orders(self) -> list[Order]:
        """Return the learned orders, one for each level but the last; none with another shuffle."""
        return [module for module in self.modules() if isinstance(module, Order)]

    def _encode(
        self, x: Tensor, joining: Sequence[Tensor | None], labels: Tensor | None
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        self._check_labels(labels, len(x))
        plans = self._plans_of(x, labels)
        with without_autocast(x):
            total = Transformed(x, zeros_per_sample(x), zeros_per_sample(x))
            latents, entropies = [], []
            for level, joins, plan in zip(self._levels(), joining, plans, strict=True):
                *out, entropy = level(total.y, joins, labels, plan)
                total = compose(total, Transformed(*out))
                stays, leaves = level.split(total.y)
                entropies.append(entropy)
                latents.append(leaves)
                total = total._replace(y=stays)
        return latents, total.log_det, total.penalty, torch.stack(entropies)

    def _plans_of(self, x: Tensor, labels: Tensor | None) -> list[Plan]:
        """Return what the bijections of each level keep: measured once for each kind of batch."""
        if self.config.backprop != "auto" or not torch.is_grad_enabled() or not len(x):
            return [INVERTED] * len(self.levels)
        kind = (x.shape, x.dtype, x.device, self.training)
        if kind not in self._plans:
            self._plans[kind] = self._fill_budget(x.detach(), labels)
        return self._plans[kind]

    def _fill_budget(self, x: Tensor, labels: Tensor | None) -> list[Plan]:
        """Return plans that fit into the memory budget: selective saves more time a byte than stored, so bijections are
        stored only if there is memory for all of them to be selective."""
        costs = self._costs(x, labels)
        stored, selective = ([cost[which] for level in costs for cost in level] for which in (0, 1))
        budget = self.config.memory_budget
        if budget is None:
            budget = free_bytes(x.device, self._numbers)
            budget -= 2 * max(stored)  # memory to invert one of them
        budget = int(self.memory_share * budget)
        plan = Plan(0, how_many_fit(selective, budget))
        if plan.selective == len(stored):
            more = [a - b for a, b in zip(stored, selective, strict=True)]
            plan = Plan(how_many_fit(more, budget - sum(selective)), len(stored))
        self.kept = (plan.stored, len(stored))
        plans, after = [], 0
        for level in reversed(costs):
            plans.append(plan.part(len(level), after))
            after += len(level)
        return plans[::-1]

    def _costs(self, x: Tensor, labels: Tensor | None) -> list[Costs]:
        """Return what each bijection keeps: a constant and a multiple of the batch size, found from batches of two and
        of three. Not of one, whose tensors are contiguous where those of several are not."""
        with with_own_randomness(x):
            two, three = (
                self._measured(x[:1].expand(n, -1, -1, -1), labels if labels is None else labels[:1].expand(n))
                for n in (2, 3)
            )
        more = len(x) - 2

        def at_size(two: tuple[int, int], three: tuple[int, int]) -> tuple[int, int]:
            return two[0] + more * (three[0] - two[0]), two[1] + more * (three[1] - two[1])

        return [list(map(at_size, *level)) for level in zip(two, three, strict=True)]

    @torch.no_grad()
    def _measured(self, x: Tensor, labels: Tensor | None) -> list[Costs]:
        costs: list[Costs] = []
        for level, joins in zip(self._levels(), self._joining(None, x), strict=True):
            costs.append([])
            y, *_ = level(x, joins, labels, costs=costs[-1])
            x, _ = level.split(y)
        return costs

    def _levels(self) -> list[Level]:
        return [cast(Level, level) for level in self.levels]

    def _trunk_dtype(self) -> torch.dtype:
        return torch.promote_types(getattr(torch, self.config.trunk_dtype), next(self.parameters()).dtype)

    @property
    def _joining_dims(self) -> int:
        """How many numbers of noise join on the way."""
        return sum(c * h * w for c, h, w in self.config.noise_of_levels)

    def _need_noise(self, noise: Tensor | None) -> None:
        if noise is None and self._joining_dims:
            raise ValueError(
                "noise joins on the way through this flow, and its log-probability is a bound: pass `noise`"
            )

    def _reals(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Return x in the trunk's dtype, log q of the noise in it, zero unless x is pixels, and the noise that joins on
        each level."""
        if x.dim() != 4 or tuple(x.shape[1:]) != self.config.image_shape:
            raise ValueError(f"images of shape {tuple(x.shape)}, and the flow takes (B, *{self.config.image_shape})")
        if noise is not None and noise.shape != (len(x), *self.config.noise_shape):
            wanted = ("B", *self.config.noise_shape)
            raise ValueError(f"noise of shape {tuple(noise.shape)}, and the flow takes {wanted}")
        joining = self._joining(noise, x)
        if not x.is_floating_point():
            if noise is None:
                raise ValueError(f"the flow takes dequantized images, or noise beside them, not {x.dtype} alone")
            with without_autocast(x):
                x, log_q = self.dequantize(x, noise)
            return x.to(self._trunk_dtype()), log_q, joining
        if noise is not None and not self._joining_dims:
            raise ValueError(f"the flow adds noise to uint8 images, not to {x.dtype}")
        x = x.to(self._trunk_dtype())
        return x, zeros_per_sample(x), joining

    def _joining(self, noise: Tensor | None, x: Tensor) -> list[Tensor | None]:
        """Return the part of the noise that joins on each level, (B, C, H, W), None where none joins; the median of it
        if `noise` is None."""
        shapes = self.config.noise_of_levels
        sizes = [c * h * w for c, h, w in shapes]
        if not any(sizes):
            return [None] * len(shapes)
        numbers = x.new_full((len(x), sum(sizes)), 0.5, dtype=self._trunk_dtype())
        if noise is not None:
            numbers = noise[:, self.dims :]
        pieces = zip(numbers.split(sizes, dim=1), shapes, strict=True)
        return [piece.unflatten(1, shape) if shape[0] else None for piece, shape in pieces]

    def _check_labels(self, labels: Tensor | None, n: int) -> None:
        classes = self.config.classes
        if (labels is None) != (classes == 0):
            raise ValueError(f"a flow of {classes} classes takes {'labels' if classes else 'no labels'}")
        if labels is not None and (labels.dtype != torch.int64 or labels.shape != (n,)):
            raise ValueError(f"labels are int64 of shape ({n},), not {labels.dtype} of shape {tuple(labels.shape)}")
