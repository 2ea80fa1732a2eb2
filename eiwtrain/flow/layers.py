"""The layers of Glow (arXiv 1807.03039): squeeze, actnorm, invertible 1x1 convolution, affine coupling.

Not for the networks inside couplings (`conditioners`) nor for the shuffle before a split (`shuffle`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .bijection import (
    Bijection,
    Coupling,
    Grads,
    Half,
    Kept,
    Reversed,
    Transformed,
    halves_of,
    with_own_randomness,
    without_autocast,
    zeros_per_sample,
)

_LEAST_VARIANCE = 1e-6
"""Under 8-bit dequantisation a constant channel still has a variance of 1/12/256^2 = 1.3e-6."""


def squeeze(x: Tensor) -> Tensor:
    """Move space to depth: (B, C, H, W) to (B, 4C, H/2, W/2). Raises ValueError for odd sides."""
    b, c, h, w = x.shape
    if h % 2 or w % 2:
        raise ValueError(f"squeeze halves the sides, and {h}x{w} has an odd one")
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def unsqueeze(y: Tensor) -> Tensor:
    """Move depth to space, the inverse of `squeeze`: (B, 4C, H, W) to (B, C, 2H, 2W)."""
    b, c, h, w = y.shape
    if c % 4:
        raise ValueError(f"unsqueeze needs a multiple of 4 channels, not {c}")
    return y.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)


def mix_channels(matrix: Tensor, x: Tensor) -> Tensor:
    """A matrix of channels, (C, C) or one a sample (B, C, C), times (B, C, H, W), at every place; never autocast.

    A matrix product and not a convolution: cuDNN's convolutions may round float32 to TF32 by default, which would
    cost the inverse its accuracy; products don't unless `torch.set_float32_matmul_precision` asks for it.
    """
    with without_autocast(x):
        return torch.bmm(matrix.expand(x.shape[0], -1, -1), x.flatten(2)).view(x.shape)


def bounded(raw: Tensor, bound: float) -> Tensor:
    """`raw` squeezed into (-bound, bound), with the slope 1 at zero."""
    return bound * torch.tanh(raw / bound)


class Squeeze(Bijection):
    """`squeeze` as a bijection: (B, C, H, W) to (B, 4C, H/2, W/2)."""

    def forward(self, x: Tensor) -> Transformed:
        return Transformed(squeeze(x), zeros_per_sample(x), zeros_per_sample(x))

    def inverse(self, y: Tensor) -> Tensor:
        return unsqueeze(y)

    def reverse(self, y: Tensor, kept: Kept, grad_y: Tensor, grad_log_det: Tensor, grad_penalty: Tensor) -> Reversed:
        return unsqueeze(y), unsqueeze(grad_y), ()


class Exchange(Bijection):
    """Put the second half of the channels first, so that the next coupling transforms what this one used."""

    def forward(self, x: Tensor) -> Transformed:
        return Transformed(x.roll(-halves_of(x.shape[1])[0], dims=1), zeros_per_sample(x), zeros_per_sample(x))

    def inverse(self, y: Tensor) -> Tensor:
        return y.roll(halves_of(y.shape[1])[0], dims=1)

    def reverse(self, y: Tensor, kept: Kept, grad_y: Tensor, grad_log_det: Tensor, grad_penalty: Tensor) -> Reversed:
        return self.inverse(y), self.inverse(grad_y), ()


class OnFirst(Bijection):
    """A bijection of the first `channels` channels; the others, a condition that comes along, pass unchanged.

    Args:
        bijection: deterministic; its output has as many channels as its input.
    """

    def __init__(self, bijection: Bijection, channels: int) -> None:
        super().__init__()
        self.bijection, self.channels = bijection, channels

    def forward(self, x: Tensor) -> Transformed:
        out: Transformed = self.bijection(x[:, : self.channels])
        return out._replace(y=torch.cat((out.y, x[:, self.channels :]), dim=1))

    def inverse(self, y: Tensor) -> Tensor:
        return torch.cat((self.bijection.inverse(y[:, : self.channels]), y[:, self.channels :]), dim=1)

    def reverse(self, y: Tensor, kept: Kept, grad_y: Tensor, grad_log_det: Tensor, grad_penalty: Tensor) -> Reversed:
        n = self.channels
        x, grad_x, grads = self.bijection.reverse(y[:, :n], kept, grad_y[:, :n], grad_log_det, grad_penalty)
        return torch.cat((x, y[:, n:]), dim=1), torch.cat((grad_x, grad_y[:, n:]), dim=1), grads


class ActNorm(Bijection):
    """y = (x + bias) * exp(log_scale), per channel; `initialize` gives its output zero mean and unit variance
    (Glow, section 3.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Transformed:
        log_scale = self.log_scale.to(x.dtype)
        y = (x + self.bias.to(x.dtype)) * log_scale.exp()
        log_det = x.shape[2] * x.shape[3] * log_scale.sum()
        return Transformed(y, log_det.expand(x.shape[0]), zeros_per_sample(x))

    def inverse(self, y: Tensor) -> Tensor:
        return y * (-self.log_scale.to(y.dtype)).exp() - self.bias.to(y.dtype)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
        self.bias.copy_(-mean[:, None, None])
        self.log_scale.copy_(-0.5 * var.clamp(min=_LEAST_VARIANCE).log()[:, None, None])
        return self.forward(x).y


def _rotation(channels: int, identity: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors, signs and rows with which `InvertibleConv1x1` starts: a random rotation, or the identity."""
    start = torch.empty(channels, channels, dtype=torch.float64)
    if start.is_meta:  # arithmetic without numbers would import torch's compiler, for a second
        return start, start[0], torch.empty(channels, dtype=torch.int64)
    start.zero_().fill_diagonal_(1.0)
    if not identity:
        start = torch.linalg.qr(torch.randn_like(start))[0]
    p, lower, upper = torch.linalg.lu(start)
    s = upper.diagonal()
    factors = lower + upper
    factors.diagonal().copy_(s.abs().log())
    return factors, s.sign(), p.argmax(dim=1)


class InvertibleConv1x1(Bijection):
    """y = W x at every place, W = P L (U + diag(sign * exp(log_s))); starts as a random rotation
    (Glow, section 3.2), or as the identity.

    The log-determinant is H * W * sum(log_s): O(C). The one parameter is a matrix, which holds L below its diagonal, U
    above it, and log_s on it; the permutation P and the signs stay what they were at the start.
    """

    def __init__(self, channels: int, identity: bool = False) -> None:
        super().__init__()
        factors, sign, rows = _rotation(channels, identity)
        dtype = torch.get_default_dtype()
        self.factors = nn.Parameter(factors.to(dtype))
        self.sign: Tensor
        self.rows: Tensor
        self.register_buffer("sign", sign.to(dtype))
        self.register_buffer("rows", rows)  # P M = M[rows]

    def forward(self, x: Tensor) -> Transformed:
        log_det = x.shape[2] * x.shape[3] * self.factors.diagonal().to(x.dtype).sum()
        return Transformed(mix_channels(self._weight().to(x.dtype), x), log_det.expand(x.shape[0]), zeros_per_sample(x))

    def inverse(self, y: Tensor) -> Tensor:
        return mix_channels(self._inverse_weight().to(y.dtype), y)

    def _weight(self) -> Tensor:
        """Return W in float64, so that W and its inverse are each rounded only once."""
        return product_of(self.factors.double(), self.sign.double(), self.rows)

    def _inverse_weight(self) -> Tensor:
        return inverse_of(self.factors.double(), self.sign.double(), self.rows)


def product_of(factors: Tensor, sign: Tensor, rows: Tensor) -> Tensor:
    """Return the matrix P L (U + diag(sign * exp(log_s))) of `InvertibleConv1x1`'s factors, (..., C, C)."""
    lower, upper = _triangles(factors, sign)
    return _permutation(rows, factors) @ (lower @ upper)


def inverse_of(factors: Tensor, sign: Tensor, rows: Tensor) -> Tensor:
    """Return the inverse of `product_of` the same, (..., C, C)."""
    lower, upper = _triangles(factors, sign)
    half = torch.linalg.solve_triangular(lower, _permutation(rows, factors).mT, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(upper, half, upper=True)


def _triangles(factors: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    diagonal = factors.diagonal(dim1=-2, dim2=-1)
    return factors.tril(-1) + _eye(factors), factors.triu(1) + torch.diag_embed(sign * diagonal.exp())


def _permutation(rows: Tensor, like: Tensor) -> Tensor:
    """Return P as a matrix: a product with it has a gradient that is one, too."""
    return _eye(like)[rows]


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


class NetworkCoupling(Coupling):
    """A coupling with a network as conditioner, whose raw output a subclass turns into parameters.

    A network with dropout runs with a seed of its own, which is kept, so that the backward pass draws the same mask.

    Args:
        conditioner: maps the half that conditions, (B, C', H, W), to (B, outputs_per_channel * (C - C'), H, W). Its
            attribute `dropout`, if it has one, says whether it is random in training mode.
    """

    outputs_per_channel: int
    """Numbers that the conditioner returns for each transformed channel."""

    def __init__(self, conditioner: nn.Module, mirrored: bool = False) -> None:
        super().__init__(mirrored)
        self.conditioner = conditioner
        self.kept_count = 1 if getattr(conditioner, "dropout", 0.0) else 0

    def parameters_from(self, raw: Tensor) -> tuple[Tensor, ...]:
        """Turn the output of the conditioner into the parameters of `transform`."""
        raise NotImplementedError

    def condition(self, a: Tensor, kept: Kept = ()) -> tuple[Tensor, ...]:
        if not self.kept_count:
            return self.parameters_from(self.conditioner(a))
        if not self.training:
            return *self.parameters_from(self.conditioner(a)), torch.zeros((), dtype=torch.int64)
        seed = kept[0] if kept else torch.randint(2**62, ())
        with with_own_randomness(a, int(seed)):
            raw = self.conditioner(a)
        return *self.parameters_from(raw), seed

    def kept_of(self, params: tuple[Tensor, ...]) -> Kept:
        return params[len(params) - self.kept_count :]


class AffineCoupling(NetworkCoupling):
    """The map b * exp(log_scale) + shift, both predicted from the half a (RealNVP, arXiv 1605.08803, section 3.2).

    `log_scale` is `bound * tanh(raw / bound)`: the same slope as raw at zero, and never beyond the bound, so that
    neither the map nor its inverse can overflow.

    Args:
        conditioner: see `NetworkCoupling`; two outputs a channel.
        bound: largest absolute log-scale, in nats.
    """

    outputs_per_channel = 2

    def __init__(self, conditioner: nn.Module, bound: float = 2.0, mirrored: bool = False) -> None:
        super().__init__(conditioner, mirrored)
        self.bound = bound

    def parameters_from(self, raw: Tensor) -> tuple[Tensor, ...]:
        return (raw,)

    def transform(self, b: Tensor, params: tuple[Tensor, ...]) -> Half:
        return Half(*_Affine.apply(b, params[0], self.bound))

    def untransform(self, b: Tensor, params: tuple[Tensor, ...]) -> Tensor:
        _, scale, shift = _scale_and_shift(params[0], self.bound)
        return (b - shift) / scale.exp()

    def pull_back(
        self, b: Tensor, params: tuple[Tensor, ...], grads: Grads
    ) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
        """Do as `Coupling.pull_back`, by hand: autograd starts twice as many operations."""
        raw = params[0].detach()
        with torch.no_grad():
            tanh, log_scale, shift = _scale_and_shift(raw, self.bound)
            scale = log_scale.exp()
            b = (b - shift) / scale
            grad_b, grad_raw = _affine_gradients(b, tanh, scale, grads[0], grads[1])
        return b, grad_b, [grad_raw, *(None for _ in params[1:])]


def _scale_and_shift(raw: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return tanh, the log-scale that is `bound` times it, and the shift."""
    scale, shift = raw.chunk(2, dim=1)
    tanh = torch.tanh(scale / bound)
    return tanh, bound * tanh, shift


def _affine_gradients(
    b: Tensor, tanh: Tensor, scale: Tensor, grad_y: Tensor, grad_log_det: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients at b and at the raw parameters, from those at y and at the log-determinant."""
    grad_b = grad_y * scale
    grad_log_scale = torch.addcmul(grad_log_det[:, None, None, None], grad_b, b)
    # d(bound * tanh(s / bound)) / ds = 1 - tanh^2, whatever the bound
    return grad_b, torch.cat((torch.ops.aten.tanh_backward(grad_log_scale, tanh), grad_y), dim=1)


class _Affine(torch.autograd.Function):
    """y = b * exp(log_scale) + shift, and the log-determinant; raw has what `_scale_and_shift` takes."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, raw: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        _, log_scale, shift = _scale_and_shift(raw, bound)
        ctx.save_for_backward(b, raw)
        ctx.bound = bound
        return torch.addcmul(shift, b, log_scale.exp()), log_scale.sum((1, 2, 3))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_log_det: Tensor) -> tuple[Tensor, Tensor, None]:
        b, raw = ctx.saved_tensors
        tanh, log_scale, _ = _scale_and_shift(raw, ctx.bound)
        return *_affine_gradients(b, tanh, log_scale.exp(), grad_y, grad_log_det), None


class ConditionedCoupling(AffineCoupling):
    """An affine coupling of `first` and `second` channels, whose network also sees the channels after them: a
    condition, which passes unchanged.

    Args:
        conditioner: see `NetworkCoupling`; its inputs are the half that conditions, and the condition.
        first, second: channels of the half that conditions, which may be 0, and of the half that is transformed.
    """

    def __init__(self, conditioner: nn.Module, first: int, second: int) -> None:
        super().__init__(conditioner)
        self.first, self.second = first, second

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second, condition = x.split((self.first, self.second, x.shape[1] - self.first - self.second), dim=1)
        return torch.cat((first, condition), dim=1), second

    def whole(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat((a[:, : self.first], b, a[:, self.first :]), dim=1)
