"""Gradients of deep flows, at initialisation and at trained weights: invertible against stored. One has 100 Glow steps,
the other is EIW-Flow with its 74 couplings.

Random weights are not enough: what training makes of the scales decides how far rounding errors grow on the way back.
The conditioners are smooth, as by default, so that a threshold means something for every batch. With rectifiers it
would not: they have a test of their own.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.nn.functional as F
from flow_helpers import DENSE, relative_error
from torch import Tensor

from eiwtrain.flow import ConditionerConfig, EIWFlow, FlowConfig, Level, NetworkCoupling, dequantize

SMOOTH = ConditionerConfig(hidden=16, activation="silu")
GLOW = FlowConfig((3, 8, 8), levels=1, steps=100, conditioner=SMOOTH, backprop="stored")
EIW = replace(DENSE, levels=3, units=(6, 4, 1), steps=(5, 6, 20))
UPDATES, BATCH, LEAST_GAIN = {"glow": 60, "dense": 24}, {"glow": 16, "dense": 8}, {"glow": 0.5, "dense": 0.05}
WARMUP, LEARNING_RATE, PENALTY = 10, 2e-3, 1e-3
MIXING = {"glow": 1.0, "dense": 0.05}  # share of the rate: Adam would turn matrices of 100 channels too far
AT = ("initial", "trained")
Weights = dict[str, Tensor]
Batch = tuple[Tensor, ...]


def smooth_images(n: int, seed: int, config: FlowConfig = GLOW) -> Batch:
    """Blurred colour fields with a little noise, as reals, or as pixels and noise if noise joins on the way. Neighbours
    and colours go together, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, *config.image_shape)
    grey, colour = (torch.randn(n, c, 3, 3, generator=generator) for c in (1, 3))
    fields = F.interpolate(60 * grey + 20 * colour, shape[2:], mode="bicubic", align_corners=True)
    pixels = (128 + fields + 2 * torch.randn(shape, generator=generator)).clamp(0, 255).to(torch.uint8)
    noise = torch.rand(n, *config.noise_shape, generator=generator)
    return (dequantize(pixels, noise),) if config.backbone == "glow" else (pixels, noise)


class Training(NamedTuple):
    """A flow, its weights after the data-dependent initialisation and after training, and images that it did not
    see."""

    config: FlowConfig
    weights: dict[str, Weights]
    held_out: Batch

    def flow(self, at: str, dtype: torch.dtype = torch.float32, **changes: Any) -> EIWFlow:
        flow = EIWFlow(replace(self.config, **changes))
        flow.load_state_dict(self.weights[at])
        return flow.to(dtype)

    def bits_per_dim(self, at: str) -> float:
        with torch.no_grad():
            return self.flow(at).bits_per_dim(*self.held_out).mean().item()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def glow() -> Training:
    return train(GLOW)


@pytest.fixture(scope="module")
def eiw() -> Training:
    return train(EIW)


@pytest.fixture(params=["glow", "eiw"])
def training(request: pytest.FixtureRequest) -> Training:
    return cast(Training, request.getfixturevalue(request.param))


def train(config: FlowConfig) -> Training:
    torch.manual_seed(0)
    flow, images = EIWFlow(config), smooth_images(1024, 1, config)
    flow.initialize(*(t[:256] for t in images))
    weights = {"initial": {name: t.clone() for name, t in flow.state_dict().items()}}
    mixing = [p for name, p in flow.named_parameters() if name.endswith("factors")]
    others = [p for name, p in flow.named_parameters() if not name.endswith("factors")]
    groups = [{"params": mixing, "share": MIXING[config.backbone]}, {"params": others, "share": 1.0}]
    optimizer = torch.optim.Adam(groups, fused=True)
    for update in range(UPDATES[config.backbone]):
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * LEARNING_RATE * min(1.0, (update + 1) / WARMUP)
        chosen = torch.randint(len(images[0]), (BATCH[config.backbone],))
        optimizer.zero_grad()
        out = flow(*(t[chosen] for t in images))
        (PENALTY * out.penalty - out.log_prob / flow.dims).mean().backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
    weights["trained"] = flow.state_dict()
    return Training(config, weights, smooth_images(8, 2, config))


def gradients(
    training: Training, at: str, dtype: torch.dtype = torch.float32, x: Batch | None = None, **changes: Any
) -> Tensor:
    """Return the gradients of the images, if they are reals, and of all parameters as one float64 vector."""
    flow = training.flow(at, dtype, **changes)
    batch = [t.to(dtype).clone().requires_grad_() if t.is_floating_point() else t for t in x or training.held_out]
    out = flow(*batch)
    # Uneven weights, so that gradients of one sample in place of another's would show.
    weight = torch.arange(1, len(batch[0]) + 1) / flow.dims
    ((PENALTY * out.penalty - out.log_prob) * weight).mean().backward()
    wanted = [t for t in (*batch, *flow.parameters()) if t.requires_grad]
    return torch.cat([torch.zeros(t.numel()) if t.grad is None else t.grad.flatten().double() for t in wanted])


def test_it_was_trained(training: Training) -> None:
    gain = training.bits_per_dim("initial") - training.bits_per_dim("trained")
    assert gain > LEAST_GAIN[training.config.backbone]
    initial, trained = (training.weights[at] for at in AT)
    networks = [name for name in initial if ".conditioner." in name]
    moved = torch.cat([(trained[name] - initial[name]).flatten() for name in networks]).norm()
    assert moved > 0.1 * torch.cat([initial[name].flatten() for name in networks]).norm()
    # No coupling is still the identity.
    assert all(w.abs().max() > 0.01 for name, w in trained.items() if name.endswith("conditioner.last.weight"))


@pytest.mark.parametrize("at", AT)
def test_in_float64_invertible_gradients_are_those_of_autograd(training: Training, at: str) -> None:
    stored, inverted = (gradients(training, at, torch.float64, backprop=mode) for mode in ("stored", "invertible"))
    assert relative_error(inverted, stored) <= 1e-9


@pytest.mark.parametrize("at", AT)
def test_in_float32_invertible_gradients_are_those_of_autograd_up_to_rounding(glow: Training, at: str) -> None:
    stored, inverted = (gradients(glow, at, backprop=mode) for mode in ("stored", "invertible"))
    assert 0 < relative_error(inverted, stored) <= 1e-4


def test_in_float32_a_rectifier_spoils_few_batches(glow: Training) -> None:
    # What the default activation spares us: where rounding turns the sign of a rectifier's input its gradient jumps, by
    # more than 1e-4 in a batch this small. The gradient with stored activations is as far from the exact one, for the
    # same reason.
    rectified = replace(SMOOTH, activation="relu")
    errors = []
    for seed in range(3):
        x = smooth_images(8, seed=10 + seed)
        stored, inverted = (
            gradients(glow, "trained", x=x, backprop=mode, conditioner=rectified) for mode in ("stored", "invertible")
        )
        errors.append(relative_error(inverted, stored))
    assert 0 < statistics.median(errors) <= 1e-4


@pytest.mark.parametrize("at", AT)
def test_inverting_with_bfloat16_conditioners_costs_no_more_than_bfloat16_itself(training: Training, at: str) -> None:
    exact = gradients(training, at, torch.float64)
    stored, inverted = (
        gradients(training, at, backprop=mode, conditioner_dtype="bfloat16") for mode in ("stored", "invertible")
    )
    own = relative_error(stored, exact)
    assert 1e-4 < own < 0.1
    assert relative_error(inverted, exact) <= 1.5 * own
    assert 0 < (inverted - stored).norm() / exact.norm() <= own


@pytest.mark.parametrize(("remedy", "share"), [({"anchor_every": 2}, 0.7), ({"trunk_dtype": "float64"}, 1e-3)])
def test_the_remedies_for_drift_work_at_trained_weights(glow: Training, remedy: dict[str, Any], share: float) -> None:
    def error(**changes: Any) -> float:
        stored, inverted = (
            gradients(glow, "trained", backprop=mode, **low, **changes) for mode in ("stored", "invertible")
        )
        return relative_error(inverted, stored)

    low: dict[str, Any] = {"conditioner_dtype": "bfloat16"}
    assert error(**remedy) < share * error()


def test_what_a_unit_keeps_bounds_the_drift(eiw: Training) -> None:
    flow = eiw.flow("trained", backprop="invertible", conditioner_dtype="bfloat16")
    units = [unit for level in flow.levels for unit in cast(Level, level).units]
    networks = [[m.conditioner for m in unit.modules() if isinstance(m, NetworkCoupling)] for unit in units]
    seen: dict[Any, list[Tensor]] = {network: [] for unit in networks for network in unit}
    for network in seen:
        network.register_forward_pre_hook(lambda module, inputs: seen[module].append(inputs[0].detach()))
    pixels, noise = eiw.held_out
    flow(pixels, noise).log_prob.sum().backward()
    with torch.no_grad():
        flow.decode(flow.encode(flow.dequantize(pixels, noise)[0], noise=noise)[0])
    assert all(len(inputs) == 4 for inputs in seen.values())  # forward, backward, encode, decode
    assert all(torch.equal(true, again) for true, _, again, _ in seen.values())
    # However far from the end a unit is, its backward pass begins at its true output.
    assert all(torch.equal(*seen[unit[-1]][:2]) for unit in networks)
    backward = max(relative_error(reversed_, true) for true, reversed_, _, _ in seen.values())
    decoded = max(relative_error(reversed_, true) for true, _, _, reversed_ in seen.values())
    assert 0 < backward < 0.5 * decoded
