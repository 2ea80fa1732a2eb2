"""EIW-Flow's learned order of channels before a split, and the regulariser that it learns from.

The construction of the authors' public program (github.com/studying910/EIW-Flow, commit 0c4ddeb), re-expressed; that
program has no licence, and none of its code is here. Two things differ, because as published they break: channels are
sorted by logits and the regulariser is computed from log-probabilities. With the constant input C the softmax saturates
(at C = 248 some 200 weights are exactly 0 in float32), which leaves the order among most channels to how a sort treats
ties, and makes the gradient of the published regulariser NaN.

Not for shuffles that look at an image (`shuffle`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bijection import Bijection, Transformed, without_autocast, zeros_per_sample

_REDUCTION = 16  # of channels, in the network that looks at features (squeeze and excitation, arXiv 1709.01507)


class Order(Bijection):
    """The channels in the order of learned weights, the greatest first, the same order for every image.

    The weights are the softmax of a two-layer network that sees one constant, so no gradient of the likelihood reaches
    them: they learn from the regulariser alone, which compares them with weights se(y) that a squeeze-and-excitation
    network gives each image y, its channels in the new order. With weights w over channels c it is, for each image,

    - `as-published`: sum of w_c (log w_c - se_c), as the authors' program passes probabilities where log-probabilities
      are expected;
    - `true`: sum of w_c (log w_c - log se_c), the divergence KL(w | se(y)).

    It is `Transformed.penalty`, and its gradient reaches the weights, the network and the features.

    Args:
        channels: C.
        order_input: the constant: "channels" for C, "one" for 1.
        kl: "as-published" or "true".
    """

    def __init__(self, channels: int, order_input: str = "channels", kl: str = "as-published") -> None:
        super().__init__()
        self.constant = float(channels) if order_input == "channels" else 1.0
        self.kl = kl
        self.weigh_first = nn.Linear(1, max(1, channels // 2), bias=False)
        self.weigh_last = nn.Linear(max(1, channels // 2), channels, bias=False)
        reduced = max(1, channels // _REDUCTION)
        self.excite_first = nn.Linear(channels, reduced, bias=False)
        self.excite_last = nn.Linear(reduced, channels, bias=False)
        self.latest: Tensor
        """The order of the latest forward pass in training mode. In eval mode it is the order, so that an average of
        weights, whose own logits may sort otherwise, keeps the order that its weights were trained with."""
        self.changes: Tensor
        """How often a forward pass in training mode has found another order than the one before it."""
        latest = torch.empty(channels, dtype=torch.int64)
        if not latest.is_meta:  # arithmetic without numbers would import torch's compiler, for a second
            latest = self._order(self.logits(torch.get_default_dtype()).detach())
        self.register_buffer("latest", latest)
        self.register_buffer("changes", torch.zeros((), dtype=torch.int64))

    def logits(self, dtype: torch.dtype) -> Tensor:
        """Return the logarithms of the weights up to a constant, (C,), in this dtype."""
        first, last = self.weigh_first.weight.to(dtype), self.weigh_last.weight.to(dtype)
        return (last * F.relu(self.constant * first[:, 0])).sum(dim=1)  # no product, which autocast would round

    @torch.no_grad()
    def entropy(self) -> Tensor:
        """Return the entropy of the weights, a scalar, in nats: from 0 to log C."""
        log_weights = F.log_softmax(self.logits(torch.float64), dim=0)
        return -(log_weights.exp() * log_weights).sum()

    def forward(self, x: Tensor) -> Transformed:
        logits = self.logits(x.dtype)
        order = self._current(logits)
        if self.training:
            self._count(order)
        y = x[:, order]
        return Transformed(y, zeros_per_sample(x), self._penalty(y, logits))

    def inverse(self, y: Tensor) -> Tensor:
        return y[:, self._current(self.logits(y.dtype)).argsort()]

    def _penalty(self, y: Tensor, logits: Tensor) -> Tensor:
        log_weights = F.log_softmax(logits, dim=0)
        first, last = self.excite_first.weight.to(y.dtype), self.excite_last.weight.to(y.dtype)
        with without_autocast(y):
            excited = F.linear(F.relu(F.linear(y.mean(dim=(2, 3)), first)), last)
        of_image = F.log_softmax(excited, dim=1) if self.kl == "true" else F.softmax(excited, dim=1)
        return (log_weights.exp() * (log_weights - of_image)).sum(dim=1)

    def sort(self) -> None:
        """Make the order of the weights that of eval mode, too: after weights were set without it."""
        self.latest.copy_(self._order(self.logits(self.weigh_first.weight.dtype).detach()))

    def _current(self, logits: Tensor) -> Tensor:
        return self._order(logits.detach()) if self.training else self.latest

    @torch.no_grad()
    def _count(self, order: Tensor) -> None:
        self.changes += (order != self.latest).any()
        self.latest.copy_(order)

    def _order(self, logits: Tensor) -> Tensor:
        return logits.argsort(descending=True, stable=True)
