"""Bijections that run together: the same as one by one, in few operations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from flow_helpers import at_random_parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eiwtrain.flow import (
    ActNorm,
    AffineCoupling,
    Chain,
    ConditionerConfig,
    ConvConditioner,
    Exchange,
    FixedShuffle,
    HardHalf,
    InvertibleConv1x1,
    SoftHalf,
    SplineCoupling,
    Squeeze,
    run_chain,
)
from eiwtrain.flow.bijection import Bijection
from eiwtrain.flow.config import BACKPROP_MODES
from eiwtrain.flow.fused import Fused

SMALL = ConditionerConfig(hidden=4)


def affine(channels: int, mirrored: bool = False, bfloat16: bool = False) -> AffineCoupling:
    halves = (channels - channels // 2, channels // 2)
    first, second = halves[::-1] if mirrored else halves
    return AffineCoupling(ConvConditioner(first, 2 * second, SMALL, bfloat16), mirrored=mirrored)


KINDS = {
    "ActNorm": ActNorm,
    "InvertibleConv1x1": InvertibleConv1x1,
    "affine": affine,
    "mirrored": lambda c: affine(c, mirrored=True),
    "spline": lambda c: SplineCoupling(ConvConditioner(c - c // 2, 7 * (c // 2), SMALL), bins=2),
    "Exchange": lambda c: Exchange(),
    "Squeeze": lambda c: Squeeze(),
    "soft": SoftHalf,
    "hard": HardHalf,
    "fixed": FixedShuffle,
}


def chain_of(names: list[str], channels: int) -> list[Bijection]:
    torch.manual_seed(0)
    bijections = []
    for name in names:
        bijections.append(KINDS[name](channels))
        channels *= 4 if name == "Squeeze" else 1
    at_random_parameters(Chain(bijections).double())
    return bijections


def outputs_and_gradients(run: Any, bijections: list[Bijection], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = run(x)
    loss = out.y.square().sum() + out.log_det.square().sum() + out.penalty.square().sum()
    inputs = [x, *Chain(bijections).parameters()]
    return [*out, *torch.autograd.grad(loss, inputs)]


@given(
    names=st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=6).filter(lambda n: n.count("Squeeze") < 2),
    channels=st.integers(2, 5),
    mode=st.sampled_from(BACKPROP_MODES),
)
@settings(max_examples=40, deadline=None)
def test_bijections_together_are_what_they_are_one_by_one(names: list[str], channels: int, mode: str) -> None:
    bijections = chain_of(names, channels)
    x = torch.randn(2, channels, 4, 2, dtype=torch.float64)
    alone = outputs_and_gradients(Chain(bijections), bijections, x)
    together = outputs_and_gradients(lambda v: run_chain(bijections, v, mode), bijections, x)
    torch.testing.assert_close(together, alone, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(Fused(bijections).inverse(alone[0].detach()), x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mode", BACKPROP_MODES)
def test_weights_that_are_cast_together_are_those_that_autocast_casts(mode: str) -> None:
    torch.manual_seed(0)
    bijections: list[Bijection] = [affine(4, bfloat16=True), affine(4, bfloat16=True, mirrored=True)]
    at_random_parameters(Chain(bijections))
    x = torch.randn(2, 4, 4, 4)
    alone = outputs_and_gradients(Chain(bijections), bijections, x)
    together = outputs_and_gradients(lambda v: run_chain(bijections, v, mode), bijections, x)
    assert torch.equal(alone[0], together[0])
    if mode == "stored":
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert all(t.dtype == torch.float32 for t in together)


class Started(TorchDispatchMode):
    """Counts operations, but not views."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func._schema.name] += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "most"), [("stored", 37), ("invertible", 48)])
def test_so_many_operations_are_started_for_each_step_of_glow(mode: str, most: int) -> None:
    x = torch.randn(2, 4, 4, 4)

    def operations(steps: int) -> int:
        chain = [Chain([ActNorm(4), InvertibleConv1x1(4), affine(4, bfloat16=True)]) for _ in range(steps)]
        started = Started()
        with started:
            out = run_chain(chain, x, mode)
            (out.y.sum() + out.log_det.sum()).backward()
        return started.found.total()

    assert (operations(6) - operations(2)) / 4 <= most
