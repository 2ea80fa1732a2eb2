"""Backpropagation through a chain of bijections: with stored, recomputed or reconstructed activations.

Not for the mathematics of the backward pass of a bijection: that is `Bijection.reverse`.

The modes give the same gradients. "stored" is ordinary autograd. "checkpointed" keeps the input of every bijection
and computes the rest again. "invertible" keeps the output of the whole chain and nothing else, at any depth, as
RevNet does (arXiv 1707.04585, section 3.2). The backward pass of a coupling runs its conditioner once, so that costs
one conditioner forward more than "stored". "selective" inverts, too, but keeps the outputs of those layers of
conditioners that are dear to compute, so that going back need not run them (`network_layers`). "auto" is "stored" for a
number of the last bijections, "selective" for some before them, and "invertible" for the rest: any point between. It
stores the last ones because the backward pass frees their activations first, before it needs memory to invert.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .bijection import Bijection, Transformed, without_autocast
from .config import BACKPROP_MODES
from .fused import Fused, Run, total


class Plan(NamedTuple):
    """How many of the last bijections are "stored", and how many before them are "selective"; the rest is inverted."""

    stored: int
    selective: int

    def part(self, count: int, after: int) -> Plan:
        """Return the plan of `count` bijections that come before `after` of these."""
        stored, kept = (min(max(0, n - after), count) for n in (self.stored, self.stored + self.selective))
        return Plan(stored, kept - stored)


INVERTED = Plan(0, 0)


def run_chain(
    bijections: Sequence[Bijection], x: Tensor, mode: str, anchor_every: int = 0, kept: Plan = INVERTED
) -> Transformed:
    """Do as `run`, and add up the terms."""
    return run(bijections, x, mode, anchor_every, kept).transformed()


def run(bijections: Sequence[Bijection], x: Tensor, mode: str, anchor_every: int = 0, kept: Plan = INVERTED) -> Run:
    """Apply bijections one after the other, never autocast; `mode` says what is kept for the backward pass.

    Args:
        x: (B, C, H, W).
        mode: one of `BACKPROP_MODES`. Without gradients all are a plain forward.
        anchor_every: with "invertible" and "auto", keep the true output of every n-th bijection, so that the rounding
            errors of the reconstruction grow over n bijections at most; 0 keeps only the last.
        kept: with "auto", what to do with which bijections.

    Raises:
        ValueError: for an unknown mode.
        RuntimeError: in the backward pass, if it is the second through the same graph, or if a parameter was
            changed in place since the forward pass; where it inverts, also if gradients are to be differentiated.
    """
    if mode not in BACKPROP_MODES:
        raise ValueError(f"mode: {mode!r} is not one of {', '.join(BACKPROP_MODES)}")
    count = len(bijections)
    plan = {"invertible": INVERTED, "selective": Plan(0, count), "auto": kept}.get(mode, Plan(count, 0))
    selective = max(0, count - plan.stored) if torch.is_grad_enabled() else 0
    inverted = max(0, selective - plan.selective)
    with without_autocast(x):
        out = Run(x)
        size = anchor_every or max(inverted, 1)
        segments = [(first, min(first + size, inverted)) for first in range(0, inverted, size)]
        for first, end in [*segments, (inverted, selective)]:
            if first < end:
                fused = Fused(bijections[first:end])
                y, log_det, penalty = _ReversibleChain.apply(fused, first == inverted, out.y, *fused.parameters)
                out = out.then(Run(y, (log_det,), () if penalty is None else (penalty,)))
        if selective < count:
            fused = Fused(bijections[selective:])
            prepared = fused.prepare(out.y)
            out = out.then(Run(out.y, prepared.log_dets))
            if mode == "checkpointed" and torch.is_grad_enabled():
                for number, bijection in enumerate(bijections):
                    # Only a bijection that keeps an integer, a seed, is random: otherwise there is no state to restore.
                    step = checkpoint(
                        lambda x, number=number: fused.forward(x, prepared, number)[0].transformed(),
                        out.y,
                        use_reentrant=False,
                        preserve_rng_state=bijection.kept_count > 0,
                    )
                    out = out.then(Run(step.y, (step.log_det,), (step.penalty,)))
            else:
                out = out.then(fused.forward(out.y, prepared)[0])
        return out


class _ReversibleChain(torch.autograd.Function):
    """A chain whose backward reconstructs activations from the output.

    Parameters are explicit inputs and their gradients are returned, not accumulated by a backward inside this one:
    the hooks of DistributedDataParallel and of ZeRO rely on that.
    """

    @staticmethod
    def forward(
        ctx: Any, fused: Fused, selective: bool, x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        prepared = fused.prepare(x)
        run, kept = fused.forward(x, prepared, selective=selective)
        ctx.fused = fused
        ctx.parameters = parameters
        ctx.versions = [p._version for p in parameters]
        ctx.counts = [len(of_part) for of_part in kept]
        ctx.save_for_backward(run.y, *(t for of_part in kept for t in of_part))
        return run.y, total(prepared.log_dets + run.log_dets, x), total(run.penalties, x) if run.penalties else None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor, grad_log_det: Tensor, grad_penalty: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        y, *rest = ctx.saved_tensors
        ends = list(accumulate(ctx.counts))
        kept = [tuple(rest[end - n : end]) for n, end in zip(ctx.counts, ends, strict=True)]
        fused: Fused = ctx.fused
        # Parameters are not saved (ZeRO 3 swaps their storage), so autograd does not check them for us.
        if ctx.versions != [p._version for p in ctx.parameters]:
            raise RuntimeError(
                "a parameter was modified in place between the forward and the backward pass of an invertible run: "
                "its activations cannot be reconstructed"
            )
        if grad_penalty is None:
            grad_penalty = torch.zeros_like(grad_log_det)
        with without_autocast(y):
            _, grad_x, grads = fused.reverse(y, kept, (grad_y, grad_log_det, grad_penalty))
        return None, None, grad_x if ctx.needs_input_grad[2] else None, *grads
