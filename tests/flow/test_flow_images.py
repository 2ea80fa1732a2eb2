"""Pixels to reals and back, and bits per dimension."""

from __future__ import annotations

import math

import pytest
import torch

from eiwtrain.flow import EIWFlow, FlowConfig, bits_per_dim, dequantize, quantize

ALL_VALUES = torch.arange(256, dtype=torch.uint8)
ALMOST_ONE = {torch.float32: 1 - 2**-24, torch.float64: 1 - 2**-53}


@pytest.mark.parametrize("n_bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.0, 0.5, None])
def test_every_pixel_comes_back_whatever_the_noise(n_bits: int, dtype: torch.dtype, noise: float | None) -> None:
    u = torch.full((256,), ALMOST_ONE[dtype] if noise is None else noise, dtype=dtype)
    x = dequantize(ALL_VALUES, u, n_bits)
    assert x.dtype == dtype
    assert x.min() >= -0.5
    assert x.max() < 0.5
    assert torch.equal(quantize(x, n_bits), ALL_VALUES >> (8 - n_bits) << (8 - n_bits))


def test_random_noise_gives_pixels_back_and_is_added_in_full() -> None:
    images = torch.randint(0, 256, (200_000,), dtype=torch.uint8)
    u = torch.rand(200_000)
    x = dequantize(images, u)
    assert torch.equal(quantize(x), images)
    torch.testing.assert_close((x + 0.5) * 256, images + u, rtol=0, atol=2e-5)


def test_reals_out_of_range_are_clamped() -> None:
    x = torch.tensor([-math.inf, -3.0, 0.5, 7.0, math.inf, math.nan])
    assert quantize(x).tolist() == [0, 0, 255, 255, 255, 0]


def test_a_flow_makes_images_with_its_own_bits() -> None:
    flow = EIWFlow(FlowConfig((1, 4, 4), levels=1, steps=1, n_bits=3))
    images = flow.to_images(torch.rand(2, 1, 4, 4) - 0.5)
    assert images.dtype == torch.uint8
    assert set(images.flatten().tolist()) <= set(range(0, 256, 32))


@pytest.mark.parametrize("n_bits", [8, 5])
def test_the_uniform_density_costs_all_bits(n_bits: int) -> None:
    assert bits_per_dim(torch.zeros(2), dims=12, n_bits=n_bits).tolist() == [n_bits, n_bits]


def test_twice_the_density_in_every_dimension_saves_a_bit() -> None:
    assert bits_per_dim(torch.tensor(12 * math.log(2)), dims=12).item() == pytest.approx(7)


def test_dequantize_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(ValueError, match="uint8"):
        dequantize(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="shape"):
        dequantize(ALL_VALUES, torch.zeros(1))
