"""The optimizers of a config: torch's AdamW and Adamax, and Muon for the flow's networks.

Not for learning rates (`pace`), nor for what DeepSpeed does with an optimizer (`engine`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eiwtrain import flow
from eiwtrain.config import Train

_MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # coefficients and
_ITERATIONS = 5  # number of iterations of arXiv 2502.16982, as torch.optim.Muon has them


class Block(NamedTuple):
    """Matrices of one shape that lie one behind the other."""

    matrices: int
    rows: int
    columns: int

    @property
    def numbers(self) -> int:
        """How many numbers they are."""
        return self.matrices * self.rows * self.columns

    @property
    def flops(self) -> int:
        """FLOPs of `orthogonal` of all of them; a multiplication and an addition are two."""
        few, many = sorted((self.rows, self.columns))
        return self.matrices * _ITERATIONS * (4 * few**2 * many + 2 * few**3)


class _Passing:
    """Makes an optimizer of torch skip its steps on demand: at stage 0 DeepSpeed makes them whatever gradients are."""

    passes = False
    moments: tuple[str, ...]
    """Its state for each parameter, in addition to the count of its steps."""

    def step(self, closure: Any = None) -> Any:
        if self.passes:
            return None
        step = inspect.unwrap(super().step)  # type: ignore[misc]  # the wrapper would import torch's compiler
        with torch.no_grad():
            return step(self, closure)


class _AdamW(_Passing, torch.optim.AdamW):
    moments = ("exp_avg", "exp_avg_sq")


class _Adamax(_Passing, torch.optim.Adamax):
    moments = ("exp_avg", "exp_inf")


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/) for matrices, and AdamW for all else, of one flat parameter.

    A matrix moves by its momentum with all singular values made about 1, times 0.2 sqrt(max(rows, columns)): its
    numbers then move about as much as by AdamW, so that both have one learning rate (arXiv 2502.16982). The matrices
    come first in the parameter, those of one shape together, and each shape costs a few operations.

    Args:
        parameters: the one parameter, of one dimension.
        blocks: the matrices that it begins with.
        lr, betas, weight_decay: those of AdamW; the decay is Muon's, too.
    """

    passes = False
    moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        blocks: Sequence[Block],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        (self._flat,) = (p for group in self.param_groups for p in group["params"])
        self._blocks, self._sizes = list(blocks), [block.numbers for block in blocks]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make a step with the parameter's gradient, unless it `passes`. A closure is not called."""
        flat, gradient, (group,) = self._flat, self._flat.grad, self.param_groups
        if self.passes or gradient is None:
            return
        state = self.state[flat]
        if not state:
            state["step"] = torch.zeros((), device=flat.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
        begin = sum(self._sizes)
        betas, lr, decay = (group[name] for name in ("betas", "lr", "weight_decay"))
        state["step"] += 1
        if begin < len(flat):
            rest, grads, means, squares = ([t[begin:]] for t in (flat, gradient, state["exp_avg"], state["exp_avg_sq"]))
            torch._fused_adamw_(  # what torch.optim.AdamW calls with fused=True
                rest, grads, means, squares, [], [state["step"]], lr=lr, beta1=betas[0], beta2=betas[1],
                weight_decay=decay, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip
        if not begin:
            return
        matrices, momentum = flat[:begin], state["exp_avg"][:begin]
        momentum.lerp_(gradient[:begin], 1 - _MOMENTUM)
        update = gradient[:begin].lerp(momentum, _MOMENTUM)
        matrices.mul_(1 - lr * decay)
        for block, own, its in zip(self._blocks, matrices.split(self._sizes), update.split(self._sizes), strict=True):
            moved = orthogonal(its.view(*block))
            own.view(*block).sub_(moved, alpha=lr * 0.2 * max(block.rows, block.columns) ** 0.5)


def orthogonal(matrices: Tensor) -> Tensor:
    """Return matrices, (N, rows, columns), with the same singular vectors and singular values of about 1: 0.7 to 1.2,
    and less only where they were below some 1e-3 of the matrix's norm.

    By five Newton-Schulz iterations; on a GPU in bfloat16, which is enough for a direction.
    """
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    x = x.to(torch.bfloat16) if x.is_cuda else x
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def matrices_of(module: nn.Module) -> list[Tensor]:
    """Return the weights of a flow that Muon trains: those of the layers of its networks, except for their last ones,
    which start at zero."""
    networks = (m for m in module.modules() if isinstance(m, flow.Conditioner))
    return [
        layer.weight
        for network in networks
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and name != "last" and layer.weight.requires_grad
    ]


def matrices_for(train: Train, module: nn.Module) -> list[Tensor]:
    """Return the weights that the config's optimizer takes as matrices: `matrices_of` for Muon, none for the others."""
    return matrices_of(module) if train.optimizer == "muon" else []


def optimizer_of(parameters: Iterable[nn.Parameter], train: Train, blocks: Sequence[Block] = ()) -> Any:
    """Return the config's optimizer, at a learning rate that each step sets.

    Args:
        parameters: those of the module, or the flat one.
        blocks: the matrices that the flat one begins with, for Muon.
    """
    options: dict[str, Any] = {"lr": 0.0, "betas": train.betas, "weight_decay": train.weight_decay}
    if train.optimizer == "muon":
        return Muon(parameters, blocks, **options)
    return _Adamax(parameters, **options) if train.optimizer == "adamax" else _AdamW(parameters, fused=True, **options)
