"""The networks inside couplings, and the precision they run in.

Not for anything invertible: a conditioner is an ordinary network, and the only place where bfloat16 is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .bijection import without_autocast
from .config import CONDITIONERS, ConditionerConfig
from .low_precision import cast_all, layers_of, slots_in_bfloat16, using
from .network_layers import Conv2d, Linear

_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu_, "gelu": F.gelu, "silu": F.silu}
"""What they are given is not used again, so that some work in place. What a layer remembers may then be its output
after the activation: to apply that again changes nothing."""


class Conditioner(nn.Module):
    """A network from (B, inputs, H, W) to (B, outputs, H, W), whose last layer starts at zero so that a coupling
    starts as the identity. A subclass writes `network`; layers with `remembered` are those that
    `backprop: selective` does not run again.

    It takes and returns the trunk's dtype and runs in its parameters' dtype (float32 or float64), or with `bfloat16`
    under its own autocast. What it computes for a sample depends neither on the rest of the batch nor on the
    caller's autocast state: forward and backward must agree to the last bit. The only randomness is dropout, in
    training mode, from PyTorch's global generator.

    Args:
        dropout: the rate.
        bfloat16: run convolutions, matrix products and attention in bfloat16.
    """

    def __init__(self, dropout: float = 0.0, bfloat16: bool = False) -> None:
        super().__init__()
        self.dropout = dropout
        self.in_bfloat16 = bfloat16

    def network(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W), in the parameters' dtype or in bfloat16, to (B, outputs, H, W). In memory the channels
        of a place lie together, which convolutions compute faster."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H, W), contiguous and in the dtype of `x`."""
        if not self.in_bfloat16 or self._dtype() != torch.float32:  # `fused` casts the weights of many networks at once
            return self._run(x)
        slots = slots_in_bfloat16(self)
        with using(slots, cast_all([parameters[name] for parameters, name in slots], torch.bfloat16)):
            return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            # One memory format, so that forward and reverse give a convolution the same strides, hence the same kernel.
            out = self.network(x.to(self._dtype(), memory_format=torch.channels_last))
            return out.to(x.dtype, memory_format=torch.contiguous_format)

    def _dtype(self) -> torch.dtype:
        """Return the dtype of the first layer's weights, which is the one that the network computes in."""
        return next(layer.weight.dtype for layer in layers_of(self))


class ConvConditioner(Conditioner):
    """3x3 -> 1x1 (x depth) -> 3x3, an activation between any two (Glow, arXiv 1807.03039, section 3.3).

    Args:
        inputs, outputs: channels.
        config: the network's shape.
        bfloat16: see `Conditioner`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: ConditionerConfig,
        bfloat16: bool = False,
        *,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(config.dropout, bfloat16)
        hidden = config.hidden
        self.first = Conv2d(inputs, hidden, 3)
        self.middle = nn.ModuleList(Conv2d(hidden, hidden, 1, remembered=True) for _ in range(config.depth))
        self.last = at_zero(Conv2d(hidden, outputs, 3, remembered=True))
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[config.activation]

    def network(self, x: Tensor) -> Tensor:
        h = self._active(self.first(x))
        for layer in self.middle:
            h = self._active(layer(h))
        return self.last(h)

    def _active(self, h: Tensor) -> Tensor:
        return F.dropout(self.activation(h), self.dropout, self.training)


class ResidualConditioner(Conditioner):
    """3x3 -> gated residual blocks (x depth) -> normalisation, activation -> 3x3.

    The blocks are Flow++'s convolutional ones (arXiv 1902.00275, section 3.3, without its attention), with the
    normalisation before the branch and not after the sum, so that the sum is never rescaled
    (arXiv 2002.04745). Channels are normalised place by place, without statistics of a batch or of an image.
    With `bfloat16` the sum and the normalisation stay in the parameters' dtype.

    Args:
        inputs, outputs: channels.
        config: the network's shape.
        bfloat16: see `Conditioner`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: ConditionerConfig,
        bfloat16: bool = False,
        *,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(config.dropout, bfloat16)
        hidden = config.hidden
        self.first = Conv2d(inputs, hidden, 3)
        self.blocks = nn.ModuleList(_GatedBlock(hidden, config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(hidden)
        self.last = at_zero(Conv2d(hidden, outputs, 3, remembered=True))
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[config.activation]

    def network(self, x: Tensor) -> Tensor:
        h = _at_each_place(self.first, x.permute(0, 2, 3, 1)).to(self.norm.weight.dtype)
        for block in self.blocks:
            h = block(h)
        return _at_each_place(self.last, self.activation(self.norm(h))).permute(0, 3, 1, 2)


class _GatedBlock(nn.Module):
    """h + GLU(1x1(dropout(f(3x3(f(norm(h))))))) with an activation f, of (B, H, W, C) (GLU: arXiv 1612.08083)."""

    def __init__(self, channels: int, config: ConditionerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = Conv2d(channels, channels, 3, remembered=True)
        self.gate = Linear(channels, 2 * channels)
        self.dropout = nn.Dropout(config.dropout)
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[config.activation]

    def forward(self, h: Tensor) -> Tensor:
        branch = self.activation(_at_each_place(self.conv, self.activation(self.norm(h))))
        return h + F.glu(self.gate(self.dropout(branch)), dim=-1)


class TransformerConditioner(Conditioner):
    """A ViT over patches, as in Jet (arXiv 2412.15129): patches -> linear, plus position -> pre-norm blocks (x depth)
    -> normalisation -> linear -> patches.

    The position embedding is learned, one vector for each place of the grid of patches, with the standard
    deviation 1 / sqrt(hidden) at the start: what Jet's code does. Unlike Jet's, queries, keys and values have no
    bias (as in ViT-22B, arXiv 2302.05442, section 2): attention ignores the bias of a key, which would only drift.
    With `bfloat16` the sum and the normalisations stay in the parameters' dtype, and so does what attention's
    softmax accumulates.

    Args:
        inputs, outputs: channels.
        grid: (H, W) of its input.
        config: the network's shape.
        bfloat16: see `Conditioner`.

    Raises:
        ValueError: if `config.patch` does not divide the grid; from `forward`, if the input has another grid.
    """

    def __init__(
        self, inputs: int, outputs: int, config: ConditionerConfig, bfloat16: bool = False, *, grid: tuple[int, int]
    ) -> None:
        super().__init__(config.dropout, bfloat16)
        (height, width), patch, hidden = grid, config.patch, config.hidden
        if height % patch or width % patch:
            side = math.gcd(height, width)
            right = ", ".join(str(n) for n in range(1, side + 1) if side % n == 0)
            raise ValueError(f"patch: {patch} does not divide a level's grid of {height}x{width}; these do: {right}")
        self.grid, self.patch = grid, patch
        self.first = Linear(inputs * patch**2, hidden)
        position = torch.empty(height // patch * (width // patch), hidden)
        # not without numbers, for which torch would import its compiler
        self.position = nn.Parameter(position if position.is_meta else torch.randn_like(position) / math.sqrt(hidden))
        self.blocks = nn.ModuleList(_AttentionBlock(hidden, config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(hidden)
        self.last = at_zero(Linear(hidden, outputs * patch**2, remembered=True))

    def network(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        if (height, width) != self.grid:
            raise ValueError(f"the input has a grid of {height}x{width}, and the conditioner was made for {self.grid}")
        p = self.patch
        h, w = height // p, width // p
        patches = x.reshape(b, c, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, c * p * p)
        tokens = self.first(patches) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        out = self.last(self.norm(tokens)).view(b, h, w, -1, p, p)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(b, -1, height, width)


class _AttentionBlock(nn.Module):
    """h + attention(norm(h)), then h + MLP(norm(h)) with 4 x the channels and gelu, of (B, tokens, C)."""

    def __init__(self, channels: int, config: ConditionerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(channels)
        self.queries_keys_values = Linear(channels, 3 * channels, bias=False)
        self.attended = Linear(channels, channels)
        self.mlp_norm = nn.LayerNorm(channels)
        self.up = Linear(channels, 4 * channels, remembered=True)
        self.down = Linear(4 * channels, channels, remembered=True)
        self.dropout = nn.Dropout(config.dropout)
        # ViT's initialisation. The three are one matrix here, and each is initialised as if it were alone.
        for weight in self.queries_keys_values.weight.detach().chunk(3):
            nn.init.xavier_uniform_(weight)
        for layer in (self.attended, self.up, self.down):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor) -> Tensor:
        of_heads = self.queries_keys_values(self.attention_norm(h)).unflatten(-1, (3, self.heads, -1))
        q, k, v = of_heads.permute(2, 0, 3, 1, 4).unbind()  # each (B, heads, tokens, C / heads)
        of_heads = attend(q, k, v)
        h = h + self.dropout(self.attended(of_heads.transpose(1, 2).flatten(2)))
        return h + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(h)))))


class DenseConditioner(Conditioner):
    """DenseFlow's network (arXiv 2106.04627): 1x1 -> attention beside densely connected layers, concatenated
    -> normalisation, activation, 1x1 -> 1x1.

    Two differences to the authors' programs, whose normalisation takes statistics over a batch and whose attention is
    between runs of one channel's numbers: channels are normalised place by place, so that a sample depends on no
    other, and attention is between places. With `bfloat16` the normalisation stays in the parameters' dtype.

    Args:
        inputs, outputs: channels.
        config: the network's shape.
        bfloat16: see `Conditioner`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: ConditionerConfig,
        bfloat16: bool = False,
        *,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(config.dropout, bfloat16)
        hidden = config.hidden
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[config.activation]
        self.first = Conv2d(inputs, hidden, 1)
        self.layers = DenseLayers(hidden, hidden, config.depth, config.growth, self.activation)
        self.attention = PlaceAttention(hidden, max(1, hidden // 2)) if config.attention == "places" else None
        width = hidden if self.attention is None else 2 * hidden
        self.norm = PlaceNorm(width)
        self.mix = Conv2d(width, hidden, 1, bias=False)
        self.last = at_zero(Conv2d(hidden, outputs, 1, remembered=True))

    def network(self, x: Tensor) -> Tensor:
        h = self.first(x)
        features = self.layers(h)
        if self.attention is not None:
            features = torch.cat((self.attention(h), features), dim=1)
        features = F.dropout(
            self.activation(self.norm(features.to(self.norm.weight.dtype))), self.dropout, self.training
        )
        return self.last(self.mix(features))


class DenseLayers(nn.Module):
    """Layers that each see the input and the outputs of all layers before it, of (B, C, H, W).

    A layer is 1x1 -> activation -> 3x3 (to `growth` channels) -> activation. A gated 1x1 convolution ends them: of
    three outputs a channel, a + b * sigmoid(c).
    """

    def __init__(
        self, inputs: int, outputs: int, depth: int, growth: int, activation: Callable[[Tensor], Tensor] = F.relu_
    ) -> None:
        super().__init__()
        widths = [inputs + i * growth for i in range(depth)]
        # Of the 1x1 convolutions the last third has most of the arithmetic: the work is as the square of the width.
        self.narrow = nn.ModuleList(
            Conv2d(width, width, 1, remembered=3 * (i + 1) > 2 * depth) for i, width in enumerate(widths)
        )
        self.wide = nn.ModuleList(Conv2d(width, growth, 3, remembered=True) for width in widths)
        self.gate = Conv2d(inputs + depth * growth, 3 * outputs, 1)
        self.activation = activation

    def forward(self, h: Tensor) -> Tensor:
        for narrow, wide in zip(self.narrow, self.wide, strict=True):
            h = torch.cat((h, self.activation(wide(self.activation(narrow(h)))).to(h.dtype)), dim=1)
        a, b, c = self.gate(h).chunk(3, dim=1)
        return a + b * torch.sigmoid(c)


class PlaceAttention(nn.Module):
    """Attention of one head between the places of (B, C, H, W), with the values added to what is attended to."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.queries_keys_values = Conv2d(channels, 3 * width, 1)
        self.attended = Conv2d(width, channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        tokens = self.queries_keys_values(h).flatten(2).mT.unsqueeze(1)  # (B, one head, places, 3 * width)
        q, k, v = tokens.chunk(3, dim=-1)
        out = attend(q, k, v) + v
        return self.attended(out.squeeze(1).mT.unflatten(2, h.shape[2:]))


class PlaceNorm(nn.LayerNorm):
    """Layer normalisation of the channels of (B, C, H, W) at each place."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NoiseConditioner(Conditioner):
    """3x3 (to 4 times its inputs) -> activation -> 1x1: the network of a cross-unit coupling (arXiv 2106.04627)."""

    def __init__(self, inputs: int, outputs: int, bfloat16: bool = False) -> None:
        super().__init__(0.0, bfloat16)
        self.first = Conv2d(inputs, 4 * inputs, 3)
        self.last = at_zero(Conv2d(4 * inputs, outputs, 1))

    def network(self, x: Tensor) -> Tensor:
        return self.last(F.relu_(self.first(x)))


def make_conditioner(
    inputs: int, outputs: int, grid: tuple[int, int], config: ConditionerConfig, bfloat16: bool = False
) -> Conditioner:
    """Make the conditioner of `config.kind`, from (B, inputs, H, W) to (B, outputs, H, W).

    Args:
        inputs, outputs: channels.
        grid: (H, W).
        config: kind and size.
        bfloat16: see `Conditioner`.

    Raises:
        ValueError: if the kind is transformer and its patch does not divide the grid.
    """
    made_by: Callable[..., Conditioner] = globals()[CONDITIONERS[config.kind]]
    return made_by(inputs, outputs, config, bfloat16, grid=grid)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return scaled dot-product attention, on GPUs by any kernel but cuDNN's: that may run another graph with gradients
    than without, and the backward pass of a flow runs again with gradients what its forward pass ran without."""
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def at_zero(layer: Layer) -> Layer:
    """Set the parameters of a layer to zero, and return it."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _at_each_place(conv: nn.Conv2d, h: Tensor) -> Tensor:
    """Apply a convolution to (B, H, W, C): normalisation and gates need the channels last, convolutions accept that
    too, and a permuted view costs nothing."""
    return conv(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
