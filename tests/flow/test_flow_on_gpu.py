"""The flow on a GPU: the numbers of the CPU, the same gradients in every mode, no wait of the host for the GPU.

Skipped where there is no GPU. EIWTRAIN_TEST_DEVICE=cpu runs them on the CPU, where only the comparisons of modes tell
anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from flow_helpers import DENSE, TINY, make_flow, relative_error, whole_loss
from torch import Tensor

from eiwtrain.flow import ConditionerConfig, EIWFlow, FlowConfig
from eiwtrain.flow.config import BACKPROP_MODES, SHUFFLES

DEVICE = os.environ.get("EIWTRAIN_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
pytestmark = pytest.mark.skipif(not DEVICE, reason="no GPU")

FLOWS: dict[str, FlowConfig] = {
    **{f"dense, {kind}": replace(DENSE, shuffle=kind) for kind in SHUFFLES},
    **{f"glow, {kind}": replace(TINY, shuffle=kind) for kind in SHUFFLES},
    "spline": replace(TINY, coupling="spline"),
    "transformer": replace(TINY, conditioner=ConditionerConfig("transformer", hidden=8, heads=2, patch=2), levels=1),
    "dropout": replace(TINY, conditioner=replace(TINY.conditioner, dropout=0.2)),
}


def batch(config: FlowConfig, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (4, *config.image_shape), generator=generator, dtype=torch.uint8)
    noise = torch.rand(4, *config.noise_shape, generator=generator, dtype=torch.float64)
    return pixels.to(DEVICE), noise.to(DEVICE, dtype)


def step(flow: EIWFlow, *given: Tensor) -> Tensor:
    """Return the gradients of all parameters, on the device."""
    flow.zero_grad()
    torch.manual_seed(5)  # of dropout
    whole_loss(flow(*given)).backward()
    return torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None])


@contextmanager
def without_waiting() -> Iterator[None]:
    """Have torch raise where the host would wait for a GPU."""
    if DEVICE == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", FLOWS)
def test_a_gpu_gives_the_numbers_of_a_cpu_and_inverts(name: str) -> None:
    flow = make_flow(FLOWS[name]).eval()
    pixels, noise = batch(flow.config)
    with torch.no_grad():
        expected = flow.log_prob(pixels.cpu(), noise.cpu())
        flow.to(DEVICE)
        torch.testing.assert_close(flow.log_prob(pixels, noise).cpu(), expected, rtol=1e-9, atol=1e-9)
        x = torch.rand(4, *flow.config.image_shape, dtype=torch.float64, device=DEVICE) - 0.5
        torch.testing.assert_close(flow.decode(flow.encode(x)[0]), x, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", FLOWS)
def test_every_mode_gives_the_gradients_of_stored(name: str) -> None:
    found = {}
    for mode in BACKPROP_MODES:
        flow = make_flow(FLOWS[name], backprop=mode).to(DEVICE)
        found[mode] = step(flow, *batch(flow.config))
    assert all(relative_error(found[mode], found["stored"]) < 1e-7 for mode in BACKPROP_MODES)


@pytest.mark.parametrize("mode", BACKPROP_MODES)
@pytest.mark.parametrize("config", [DENSE, TINY], ids=["dense", "glow"])
def test_a_step_in_bfloat16_repeats_and_never_waits_for_the_gpu(config: FlowConfig, mode: str) -> None:
    changes: dict[str, Any] = {"backprop": mode, "conditioner_dtype": "bfloat16"}
    flow = make_flow(config, torch.float32, **changes).to(DEVICE)
    given = batch(config, torch.float32)
    first = step(flow, *given)  # also measures, under auto
    with without_waiting():
        again = step(flow, *given)
    assert bool(first.isfinite().all())
    assert relative_error(again, first) < 1e-2  # some sums are in another order each time
