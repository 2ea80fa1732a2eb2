"""The networks inside couplings, and the precision they run in.

Not for anything invertible: a conditioner is an ordinary network, and the only place where bfloat16 is allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_choice, check_count

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclass(frozen=True)
class ConditionerConfig:
    """A convolutional conditioner: 3x3, then `depth` times 1x1, then 3x3, an activation between any two.

    Raises ValueError where a field makes no sense.
    """

    hidden: int = 128
    """Channels between the convolutions. Glow has 512."""
    depth: int = 1
    """1x1 convolutions between the two 3x3 ones. Glow has 1."""
    activation: str = "relu"
    """One of relu, gelu, silu."""

    def __post_init__(self) -> None:
        check_count("hidden", self.hidden, least=1)
        check_count("depth", self.depth, least=0)
        check_choice("activation", self.activation, tuple(ACTIVATIONS))


class ConvConditioner(nn.Module):
    """3x3 -> 1x1 (x depth) -> 3x3, whose last layer starts at zero so that a coupling starts as the identity.

    It takes and gives the trunk's dtype and runs in its parameters' dtype, or with `bfloat16` under its own
    autocast. What it computes does not depend on the caller's autocast state: forward and backward must agree to
    the last bit. There is no dropout or other randomness in it, for the same reason.

    Args:
        inputs, outputs: channels.
        config: the network's shape.
        bfloat16: run the convolutions in bfloat16.
    """

    def __init__(self, inputs: int, outputs: int, config: ConditionerConfig, bfloat16: bool = False) -> None:
        super().__init__()
        hidden = config.hidden
        self.first = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.middle = nn.ModuleList(nn.Conv2d(hidden, hidden, 1) for _ in range(config.depth))
        self.last = nn.Conv2d(hidden, outputs, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[config.activation]
        self.in_bfloat16 = bfloat16

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W), in the dtype of `x`."""
        # No cache: each weight is used once, and a copy cast in forward's no_grad must not serve the backward pass.
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.in_bfloat16, cache_enabled=False):
            # Contiguous, so that forward and reverse give the convolution the same strides, hence the same kernel.
            h = self.activation(self.first(x.to(self.first.weight.dtype).contiguous()))
            for layer in self.middle:
                h = self.activation(layer(h))
            return self.last(h).to(x.dtype)
