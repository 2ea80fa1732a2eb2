"""Noise whose density is learned: that it is the density which it says, and a bound which it gives."""

from __future__ import annotations

import math

import pytest
import torch
from flow_helpers import at_random_parameters, conditioner_calls, log_abs_det_jacobian
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eiwtrain.flow import DequantizerConfig, dequantize, quantize
from eiwtrain.flow.conditioners import Conditioner
from eiwtrain.flow.config import BACKPROP_MODES
from eiwtrain.flow.dequantization import VariationalDequantizer, iwbo
from eiwtrain.flow.gaussian import log_normal, normal

ALMOST_ONE = {torch.float32: 1 - 2**-24, torch.float64: 1 - 2**-53}
SHAPE = (2, 4, 6)


def make(
    shape: tuple[int, int, int] = SHAPE,
    scale: float = 0.1,
    dtype: torch.dtype = torch.float64,
    n_bits: int = 8,
    couplings: int = 3,
    bfloat16: bool = False,
    backprop: str = "stored",
) -> VariationalDequantizer:
    """Make one at random parameters."""
    torch.manual_seed(0)
    config = DequantizerConfig(couplings, hidden=4, depth=1, growth=3)
    dequantizer = VariationalDequantizer(shape, n_bits, config, backprop, bfloat16)
    return at_random_parameters(dequantizer, scale).to(dtype)


def batch(
    size: int = 3, shape: tuple[int, int, int] = SHAPE, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Images, and noise as a loader gives it: multiples of 2^-24."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (size, *shape), dtype=torch.uint8, generator=generator)
    return images, torch.rand(size, *shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_starts_as_a_rotated_gaussian_through_a_sigmoid(dtype: torch.dtype) -> None:
    dequantizer, (images, noise) = make(scale=0, dtype=dtype), batch(dtype=dtype)
    x, log_q = dequantizer(images, noise)
    assert x.dtype == log_q.dtype == dtype
    z = torch.logit(256 * (x - dequantize(images, torch.zeros_like(noise))).double())
    torch.testing.assert_close(
        z.flatten(1).norm(dim=1), normal(noise).double().flatten(1).norm(dim=1), rtol=1e-3, atol=0
    )
    slopes = (torch.sigmoid(z) * torch.sigmoid(-z)).log().flatten(1).sum(1)
    torch.testing.assert_close(log_q.double(), log_normal(z) - slopes, rtol=1e-3, atol=0)


def test_the_features_of_the_image_matter() -> None:
    dequantizer, (images, noise) = make(), batch()
    assert (dequantizer(images, noise)[1] != dequantizer(255 - images, noise)[1]).all()


@pytest.mark.parametrize("backprop", BACKPROP_MODES)
def test_every_way_back_gives_the_same_gradients_and_runs_each_network_at_most_twice(backprop: str) -> None:
    images, noise = batch()
    grads = []
    for mode in ("stored", backprop):
        dequantizer = make(backprop=mode)
        with conditioner_calls(dequantizer) as calls:
            x, log_q = dequantizer(images, noise)
            loss = (x.square().flatten(1).sum(1) * torch.arange(1, 4) + log_q).sum()
            grads.append(torch.autograd.grad(loss, list(dequantizer.parameters())))
        assert set(calls.values()) == {1 if mode == "stored" else 2}
        assert len(calls) == 3 + 1  # couplings, and the features
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_log_q_is_the_density_of_the_full_change_of_variables() -> None:
    shape = (1, 4, 2)
    dequantizer, (images, noise) = make(shape), batch(shape=shape)
    _, log_q = dequantizer(images, noise)
    assert log_q.abs().min() > 0.1
    for i in range(3):
        slopes = log_abs_det_jacobian(lambda u, i=i: 256 * dequantizer(images[i : i + 1], u)[0], noise[i : i + 1])
        torch.testing.assert_close(log_q[i], -slopes, rtol=0, atol=1e-8)


@given(
    n_bits=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([0.0, 0.1, 1.0]),
    extreme=st.sampled_from([0.0, 2.0**-24, 1 - 2.0**-24, None]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_every_pixel_comes_back_whatever_the_noise(
    n_bits: int, dtype: torch.dtype, scale: float, extreme: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (2, 2, 4, 4), dtype=torch.uint8, generator=generator)
    images[0, 0, 0, :2] = torch.tensor([0, 255])
    noise = torch.rand(images.shape, generator=generator, dtype=dtype)
    noise[torch.rand(images.shape, generator=generator) < 0.5] = ALMOST_ONE[dtype] if extreme is None else extreme
    x, log_q = make((2, 4, 4), scale, dtype, n_bits)(images, noise)
    assert x.min() >= -0.5
    assert x.max() < 0.5
    assert torch.isfinite(log_q).all()
    assert torch.equal(quantize(x, n_bits), images >> (8 - n_bits) << (8 - n_bits))


def test_noise_everywhere_depends_on_the_image_and_on_other_noise() -> None:
    (images, noise), dequantizer = batch(), make(couplings=2)
    in_cell = 256 * (dequantizer(images, noise)[0] - dequantize(images, torch.zeros_like(noise)))
    on_black = 256 * (dequantizer(torch.zeros_like(images), noise)[0] + 0.5)
    assert ((in_cell - noise).abs() > 1e-9).all()
    assert ((on_black - in_cell).abs() > 1e-9).all()
    elsewhere = noise.clone()
    elsewhere[:, :, 0, 0] = 0.5
    moved = dequantizer(images, elsewhere)[0] != dequantizer(images, noise)[0]
    assert moved[:, :, :2, :2].sum() > 2 * moved[:, :, 0, 0].sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_reach_every_parameter_and_stay_finite(dtype: torch.dtype) -> None:
    dequantizer, (images, noise) = make(dtype=dtype), batch(dtype=dtype)
    noise[0, 0, 0, :2] = torch.tensor([0.0, ALMOST_ONE[dtype]])
    x, log_q = dequantizer(images, noise)
    (log_q.sum() + x.square().sum()).backward()
    for name, p in dequantizer.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0, name


def test_both_outputs_pass_gradients() -> None:
    dequantizer, (images, noise) = make(), batch()
    for number in (0, 1):
        out = dequantizer(images, noise)[number]
        grads = torch.autograd.grad(out.sum(), list(dequantizer.parameters()))
        assert all(grad.abs().max() > 0 for grad in grads)


def test_an_image_does_not_depend_on_the_rest_of_its_batch() -> None:
    dequantizer, (images, noise) = make(), batch()
    together = dequantizer(images, noise)
    for i in range(3):
        for one, all_ in zip(dequantizer(images[i : i + 1], noise[i : i + 1]), together, strict=True):
            torch.testing.assert_close(one[0], all_[i], rtol=1e-12, atol=1e-12)


def test_precision_is_that_of_the_noise_whatever_surrounds_it() -> None:
    (images, noise), dequantizer = batch(dtype=torch.float32), make(dtype=torch.float32)
    plain = dequantizer(images, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = dequantizer(images, noise)
    wide = dequantizer(images, noise.double())
    in_bfloat16 = make(dtype=torch.float32, bfloat16=True)
    assert all(net.in_bfloat16 for net in in_bfloat16.modules() if isinstance(net, Conditioner))
    rough = in_bfloat16(images, noise)
    for a, b, c, d in zip(plain, under, wide, rough, strict=True):
        assert torch.equal(a, b)
        assert c.dtype == torch.float64
        torch.testing.assert_close(a, c.float(), rtol=1e-4, atol=1e-4)
        assert d.dtype == torch.float32
        assert not torch.equal(d, a)
        torch.testing.assert_close(d, a, rtol=0.1, atol=0.1)


def test_learned_noise_gives_a_better_bound_than_uniform_noise_and_no_better_than_the_truth() -> None:
    # Each cell has a probability of 1, so log P(v) = 0; in it the density lies lower for dark pixels than for others.
    shape, scale = (1, 4, 4), 0.5

    def log_p(images: Tensor, x: Tensor) -> Tensor:
        z = torch.special.ndtri((2 * (x - dequantize(images, torch.zeros_like(x), 1))).clamp(1e-12, 1 - 1e-12))
        mean = torch.where(images < 128, -1.0, 1.0)
        return (0.5 * z.square() - 0.5 * ((z - mean) / scale).square() - math.log(scale)).flatten(1).sum(1)

    torch.manual_seed(0)
    dequantizer = VariationalDequantizer(shape, 1, DequantizerConfig(2, 16, 1, 8))
    optimizer = torch.optim.Adam(dequantizer.parameters(), lr=1e-2)

    def draw(size: int) -> tuple[Tensor, Tensor]:
        images = torch.randint(0, 256, (size, *shape), dtype=torch.uint8)
        return images, torch.rand(images.shape, dtype=torch.float64)

    def elbo(images: Tensor, noise: Tensor) -> Tensor:
        x, log_q = dequantizer(images, noise)
        return log_p(images, x) - log_q

    images, noise = draw(256)
    uniform = log_p(images, dequantize(images, noise, 1)).mean().item()
    for _ in range(150):
        optimizer.zero_grad()
        (-elbo(*draw(32)).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        bounds = torch.stack([elbo(images, torch.rand_like(noise)) for _ in range(8)])
    assert uniform < -35
    assert -25 < bounds.mean() < 0
    assert bounds.mean() < iwbo(bounds).mean() < 0.5


@given(log_weights=st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=8))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_more_draws_bound_at_least_as_well(log_weights: list[float]) -> None:
    # Not only in expectation: of any k draws, against the mean over all k - 1 of them, which is how that is proved.
    w = torch.tensor(log_weights, dtype=torch.float64).unsqueeze(1)
    fewer = torch.stack([iwbo(torch.cat((w[:i], w[i + 1 :]))) for i in range(len(w))]).mean()
    assert iwbo(w).item() >= fewer.item() - 1e-9
    assert iwbo(w).item() >= w.mean().item() - 1e-9
    assert iwbo(w).item() <= w.max().item() + 1e-9


def test_one_draw_is_the_elbo_and_many_are_a_mean_of_weights() -> None:
    w = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(iwbo(w[:1]), w[0])
    torch.testing.assert_close(iwbo(w), w.exp().mean(0).log())
    torch.testing.assert_close(iwbo(w - 1e4), iwbo(w) - 1e4)


def test_what_makes_no_sense_is_refused() -> None:
    config = DequantizerConfig()
    with pytest.raises(ValueError, match="3x4"):
        VariationalDequantizer((1, 3, 4), 8, config)
    dequantizer, (images, noise) = make(), batch()
    with pytest.raises(ValueError, match="uint8"):
        dequantizer(images.float(), noise)
    with pytest.raises(ValueError, match="shape"):
        dequantizer(images, noise[:1])
