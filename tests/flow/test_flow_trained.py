"""Gradients of a flow 100 steps deep, at initialisation and at trained weights: invertible against stored.

Random weights are not enough: what training makes of the scales decides how far rounding errors grow on the way back.
The conditioners are smooth, as by default, so that a threshold means something for every batch. With rectifiers it
would not: they have a test of their own.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eiwtrain.flow import ConditionerConfig, EIWFlow, FlowConfig, dequantize

SMOOTH = ConditionerConfig(hidden=16, activation="silu")
DEEP = FlowConfig((3, 8, 8), levels=1, steps=100, conditioner=SMOOTH, backprop="stored")
UPDATES, WARMUP, BATCH, LEARNING_RATE = 100, 10, 16, 2e-3
AT = ("initial", "trained")
Weights = dict[str, Tensor]


def smooth_images(n: int, seed: int) -> Tensor:
    """Blurred colour fields with a little noise, dequantized: neighbours and colours go together, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, *DEEP.image_shape)
    grey, colour = (torch.randn(n, c, 3, 3, generator=generator) for c in (1, 3))
    fields = F.interpolate(60 * grey + 20 * colour, shape[2:], mode="bicubic", align_corners=True)
    pixels = (128 + fields + 2 * torch.randn(shape, generator=generator)).clamp(0, 255).to(torch.uint8)
    return dequantize(pixels, torch.rand(shape, generator=generator))


def flow_at(weights: Weights, dtype: torch.dtype = torch.float32, **changes: Any) -> EIWFlow:
    flow = EIWFlow(replace(DEEP, **changes))
    flow.load_state_dict(weights)
    return flow.to(dtype)


def bits_per_dim(weights: Weights, x: Tensor) -> float:
    with torch.no_grad():
        return flow_at(weights).bits_per_dim(x).mean().item()


class Training(NamedTuple):
    """The weights after the data-dependent initialisation and after training, and images that it did not see."""

    weights: dict[str, Weights]
    held_out: Tensor


@pytest.fixture(scope="module")
def training() -> Iterator[Training]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    flow, images = EIWFlow(DEEP), smooth_images(1024, seed=1)
    flow.initialize(images[:256])
    weights = {"initial": {name: t.clone() for name, t in flow.state_dict().items()}}
    optimizer = torch.optim.Adam(flow.parameters(), fused=True)
    for update in range(UPDATES):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (update + 1) / WARMUP)
        batch = images[torch.randint(len(images), (BATCH,))]
        optimizer.zero_grad()
        (-flow.log_prob(batch) / flow.dims).mean().backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
    weights["trained"] = flow.state_dict()
    yield Training(weights, smooth_images(8, seed=2))
    torch.set_num_threads(threads)


def gradients(weights: Weights, x: Tensor, dtype: torch.dtype = torch.float32, **changes: Any) -> Tensor:
    """Return the gradients of the images and all parameters as one float64 vector."""
    flow = flow_at(weights, dtype, **changes)
    x = x.to(dtype).clone().requires_grad_()
    # Uneven weights, so that gradients of one sample in place of another's would show.
    (-flow.log_prob(x) * torch.arange(1, len(x) + 1) / flow.dims).mean().backward()
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in (x, *flow.parameters())]
    return torch.cat([g.flatten().double() for g in grads])


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_it_was_trained(training: Training) -> None:
    before, after = (bits_per_dim(training.weights[at], training.held_out) for at in AT)
    assert after < before - 0.5
    initial, trained = (training.weights[at] for at in AT)
    parameters = [name for name, _ in EIWFlow(DEEP).named_parameters()]
    moved = torch.cat([(trained[name] - initial[name]).flatten() for name in parameters]).norm()
    assert moved > 0.1 * torch.cat([initial[name].flatten() for name in parameters]).norm()
    # No coupling is still the identity.
    assert all(w.abs().max() > 0.01 for name, w in trained.items() if name.endswith("conditioner.last.weight"))


@pytest.mark.parametrize("at", AT)
def test_in_float64_invertible_gradients_are_those_of_autograd(training: Training, at: str) -> None:
    stored, inverted = (
        gradients(training.weights[at], training.held_out, torch.float64, backprop=mode)
        for mode in ("stored", "invertible")
    )
    assert relative_error(inverted, stored) <= 1e-9


@pytest.mark.parametrize("at", AT)
def test_in_float32_invertible_gradients_are_those_of_autograd_up_to_rounding(training: Training, at: str) -> None:
    stored, inverted = (
        gradients(training.weights[at], training.held_out, backprop=mode) for mode in ("stored", "invertible")
    )
    assert 0 < relative_error(inverted, stored) <= 1e-4


def test_in_float32_a_rectifier_spoils_few_batches(training: Training) -> None:
    # What the default activation spares us: where rounding turns the sign of a rectifier's input its gradient jumps, by
    # more than 1e-4 in a batch this small. The gradient with stored activations is as far from the exact one, for the
    # same reason.
    rectified = replace(SMOOTH, activation="relu")
    errors = []
    for seed in range(3):
        x = smooth_images(8, seed=10 + seed)
        stored, inverted = (
            gradients(training.weights["trained"], x, backprop=mode, conditioner=rectified)
            for mode in ("stored", "invertible")
        )
        errors.append(relative_error(inverted, stored))
    assert 0 < statistics.median(errors) <= 1e-4


@pytest.mark.parametrize("at", AT)
def test_inverting_with_bfloat16_conditioners_costs_no_more_than_bfloat16_itself(training: Training, at: str) -> None:
    weights, x = training.weights[at], training.held_out
    exact = gradients(weights, x, torch.float64)
    stored, inverted = (
        gradients(weights, x, backprop=mode, conditioner_dtype="bfloat16") for mode in ("stored", "invertible")
    )
    own = relative_error(stored, exact)
    assert 1e-4 < own < 0.1
    assert relative_error(inverted, exact) <= 1.5 * own
    assert 0 < (inverted - stored).norm() / exact.norm() <= own


@pytest.mark.parametrize(("remedy", "share"), [({"anchor_every": 2}, 0.7), ({"trunk_dtype": "float64"}, 1e-3)])
def test_the_remedies_for_drift_work_at_trained_weights(
    training: Training, remedy: dict[str, Any], share: float
) -> None:
    def error(**changes: Any) -> float:
        stored, inverted = (
            gradients(training.weights["trained"], training.held_out, backprop=mode, **low, **changes)
            for mode in ("stored", "invertible")
        )
        return relative_error(inverted, stored)

    low: dict[str, Any] = {"conditioner_dtype": "bfloat16"}
    assert error(**remedy) < share * error()
