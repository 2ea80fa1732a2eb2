"""Variational dequantization: noise whose density a small flow learns for each image (Flow++, arXiv 1902.00275).

Not for uniform dequantization, nor for pixels and their unit (`images`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import images as pixels
from .bijection import Bijection, Chain, Reversed, Transformed, align_gradients, halves_of, trainable
from .conditioners import Conditioner, DenseLayers, at_zero
from .config import DequantizerConfig
from .gaussian import log_normal, normal
from .layers import ActNorm, AffineCoupling, ConditionedCoupling, InvertibleConv1x1, OnFirst, squeeze, unsqueeze
from .network_layers import Conv2d
from .reversible import run_chain

_CONTEXT_DEPTH, _CONTEXT_GROWTH = 4, 16  # of the dense layers that make the features of the image


class VariationalDequantizer(nn.Module):
    """u = sigmoid(f(e; v)) in place of uniform noise, with e from N(0, 1) and a flow f that sees the image v: as in
    DenseFlow's program (arXiv 2106.04627).

    The density of u in (0, 1)^D is log q(u | v) = log N(e) - log |det du/de|. Uniform noise would have log q = 0, so
    that log p(x) - log q(u | v) takes the place of log p(x): its mean over e is a lower bound of log P(v) in the unit
    that `bits_per_dim` turns into bits, and `iwbo` of several is a tighter one.

    f works on squeezed noise: a mean and a scale per channel, then 1x1 convolutions and couplings in turn. A coupling's
    network sees the half that passes unchanged, and features of v.

    Args:
        image_shape: (C, H, W), of even sides.
        n_bits: of a pixel, 1 to 8.
        config: the flow's size.
        backprop: what its backward pass keeps; see `reversible`. With "auto" it is inverted.
        bfloat16: run the networks in bfloat16.

    Raises:
        ValueError: for odd sides.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        n_bits: int,
        config: DequantizerConfig,
        backprop: str = "stored",
        bfloat16: bool = False,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        if height % 2 or width % 2:
            raise ValueError(f"image_shape: {height}x{width} has an odd side")
        self.n_bits, self.backprop = n_bits, backprop
        self.flow = NoiseFlow(channels, config, bfloat16)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return x = (v + u) / 2^n - 1/2 in [-1/2, 1/2), and log q(u | v), (B,), in nats.

        `quantize(x)` is v, as with `dequantize`.

        Args:
            images: uint8, (B, C, H, W).
            noise: uniform in [0, 1), same shape, float32 or float64, the dtype of the computation.

        Raises:
            ValueError: for images that are not uint8, or noise of another shape.
        """
        pixels.check_pixels(images, noise)
        e = squeeze(normal(noise))
        values = (images >> (8 - self.n_bits)).to(noise.dtype) * (2 / (2**self.n_bits - 1)) - 1
        out = run_chain([self.flow], torch.cat((e, squeeze(values)), dim=1), self.backprop)
        z = unsqueeze(out.y[:, : e.shape[1]])
        log_slope = (F.logsigmoid(z) + F.logsigmoid(-z)).flatten(1).sum(1)
        x = pixels.dequantize(images, torch.sigmoid(z), self.n_bits)
        return x, log_normal(e) - out.log_det - log_slope


class NoiseFlow(Bijection):
    """The flow f of variational dequantization, of squeezed noise and, in the channels after it, the squeezed values of
    the image in [-1, 1], which pass unchanged: (B, 8C, H/2, W/2).

    `reverse` runs the network that makes features of the image once, and so each coupling's.
    """

    def __init__(self, channels: int, config: DequantizerConfig, bfloat16: bool = False) -> None:
        super().__init__()
        size = 4 * channels
        first, second = halves_of(size)
        self.size = size
        self.context = Context(channels, config.hidden, bfloat16)
        parts: list[Bijection] = [OnFirst(ActNorm(size), size)]
        for _ in range(config.couplings):
            outputs = second * AffineCoupling.outputs_per_channel
            network = DequantizerConditioner(first + config.hidden, outputs, config, bfloat16)
            parts += [OnFirst(InvertibleConv1x1(size), size), ConditionedCoupling(network, first, second)]
        self.parts = Chain([*parts, OnFirst(InvertibleConv1x1(size), size)])

    def forward(self, x: Tensor) -> Transformed:
        e, values = x[:, : self.size], x[:, self.size :]
        out: Transformed = self.parts(torch.cat((e, self.context(unsqueeze(values))), dim=1))
        return out._replace(y=torch.cat((out.y[:, : self.size], values), dim=1))

    def inverse(self, y: Tensor) -> Tensor:
        z, values = y[:, : self.size], y[:, self.size :]
        x = self.parts.inverse(torch.cat((z, self.context(unsqueeze(values))), dim=1))
        return torch.cat((x[:, : self.size], values), dim=1)

    def reverse(
        self, y: Tensor, kept: tuple[Tensor, ...], grad_y: Tensor, grad_log_det: Tensor, grad_penalty: Tensor
    ) -> Reversed:
        z, values = y[:, : self.size], y[:, self.size :]
        grad_z, grad_values = grad_y[:, : self.size], grad_y[:, self.size :]
        of_context = tuple(self.context.parameters())
        with torch.enable_grad():
            values = values.detach().requires_grad_()
            context = self.context(unsqueeze(values))
        whole = torch.cat((z, context.detach()), dim=1)
        grad_whole = torch.cat((grad_z, torch.zeros_like(context)), dim=1)
        x, grad_x, of_parts = self.parts.reverse(whole, kept, grad_whole, grad_log_det, grad_penalty)
        grads = torch.autograd.grad(context, [values, *trainable(of_context)], grad_x[:, self.size :])
        x = torch.cat((x[:, : self.size], values.detach()), dim=1)
        grad_x = torch.cat((grad_x[:, : self.size], grad_values + grads[0]), dim=1)
        return x, grad_x, (*align_gradients(of_context, grads[1:]), *of_parts)


class Context(Conditioner):
    """Features of an image at half its sides: dense layers, a 2x2 convolution of stride 2, dense layers."""

    def __init__(self, channels: int, hidden: int, bfloat16: bool = False) -> None:
        super().__init__(0.0, bfloat16)
        self.fine = DenseLayers(channels, hidden, _CONTEXT_DEPTH, _CONTEXT_GROWTH)
        self.down = Conv2d(hidden, hidden, 2, stride=2)
        self.coarse = DenseLayers(hidden, hidden, _CONTEXT_DEPTH, _CONTEXT_GROWTH)

    def network(self, x: Tensor) -> Tensor:
        return self.coarse(self.down(self.fine(x)))


class DequantizerConditioner(Conditioner):
    """1x1 -> h, h + dense layers(h) -> 1x1."""

    def __init__(self, inputs: int, outputs: int, config: DequantizerConfig, bfloat16: bool = False) -> None:
        super().__init__(0.0, bfloat16)
        self.first = Conv2d(inputs, config.hidden, 1)
        self.layers = DenseLayers(config.hidden, config.hidden, config.depth, config.growth)
        self.last = at_zero(Conv2d(config.hidden, outputs, 1))

    def network(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h + self.layers(h))


def iwbo(log_weights: Tensor) -> Tensor:
    """Return the importance-weighted bound of log P(v) (arXiv 1509.00519, section 3), (k, B) to (B,), in nats.

    Args:
        log_weights: log p(x) - log q of all noise, for k draws of the noise of each image. With k = 1 it is the ELBO;
            more draws give a higher bound in expectation, and the limit is log P(v).
    """
    return log_weights.logsumexp(dim=0) - math.log(len(log_weights))
