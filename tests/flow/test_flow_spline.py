"""The spline coupling: what the table of all bijections does not ask of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from flow_helpers import log_abs_det_jacobian
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eiwtrain.flow import AffineCoupling
from eiwtrain.flow.layers import NetworkCoupling
from eiwtrain.flow.spline import SplineCoupling

SCALES = (0.1, 1.0, 10.0, 1e3)
some = settings(max_examples=25, deadline=None, derandomize=True)
bins_ = st.integers(2, 12)
seeds = st.integers(0, 1000)
scales = st.sampled_from(SCALES)


def spline(bins: int = 8, tail: float = 4.0) -> SplineCoupling:
    return SplineCoupling(nn.Identity(), bins, tail)


def raw_parameters(coupling: SplineCoupling, seed: int, scale: float, affine: bool = False) -> Tensor:
    """(1, outputs, 1, 1) of what a conditioner might give; without `affine` the spline is all there is."""
    generator = torch.Generator().manual_seed(seed)
    raw = scale * torch.randn(1, coupling.outputs_per_channel, 1, 1, generator=generator, dtype=torch.float64)
    raw[:, :2] *= affine
    return raw


def mapped(coupling: NetworkCoupling, raw: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and log dy/dx of each x, (N,), as a batch of one channel and one place."""
    params = coupling.parameters_from(raw.expand(len(x), -1, -1, -1))
    out = coupling.transform(x.view(-1, 1, 1, 1), params)
    return out.y.flatten(), out.log_det


def unmapped(coupling: NetworkCoupling, raw: Tensor, y: Tensor) -> Tensor:
    params = coupling.parameters_from(raw.expand(len(y), -1, -1, -1))
    return coupling.untransform(y.view(-1, 1, 1, 1), params).flatten()


def points(coupling: SplineCoupling, raw: Tensor) -> Tensor:
    """A grid across the interval and beyond, every knot, and the numbers next to each knot, ascending."""
    knots = coupling.parameters_from(raw)[2].flatten()
    grid = torch.linspace(-1.5 * coupling.tail, 1.5 * coupling.tail, 301, dtype=torch.float64)
    sides = [torch.nextafter(knots, torch.full_like(knots, to)) for to in (-math.inf, math.inf)]
    return torch.cat((grid, knots, *sides)).unique()


@given(bins=bins_, seed=seeds, scale=scales)
@some
def test_rises_and_is_undone(bins: int, seed: int, scale: float) -> None:
    coupling = spline(bins)
    raw = raw_parameters(coupling, seed, scale)
    x = points(coupling, raw)
    y, _ = mapped(coupling, raw, x)
    apart = x.diff() > 1e-9  # neighbours in floating point may share an image
    assert (y.diff() >= -1e-14).all()
    assert (y.diff()[apart] > 0).all()
    torch.testing.assert_close(unmapped(coupling, raw, y), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(mapped(coupling, raw, unmapped(coupling, raw, x))[0], x, rtol=0, atol=1e-10)


@given(bins=bins_, seed=seeds, scale=scales, affine=st.booleans())
@some
def test_log_det_is_the_slope_that_autograd_sees(bins: int, seed: int, scale: float, affine: bool) -> None:
    coupling = spline(bins)
    raw = raw_parameters(coupling, seed, scale, affine)
    x = points(coupling, raw).requires_grad_()
    y, log_det = mapped(coupling, raw, x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_det, slope.log(), rtol=0, atol=1e-8)


def test_log_det_is_that_of_the_full_jacobian_across_bins_and_tails() -> None:
    coupling = spline(bins=5)
    generator = torch.Generator().manual_seed(0)
    raw = 3 * torch.randn(1, 4 * coupling.outputs_per_channel, 3, 3, generator=generator, dtype=torch.float64)
    x = torch.linspace(-9, 9, 36, dtype=torch.float64).view(1, 4, 3, 3)
    params = coupling.parameters_from(raw)
    expected = log_abs_det_jacobian(lambda v: coupling.transform(v, params).y, x)
    torch.testing.assert_close(coupling.transform(x, params).log_det[0], expected, rtol=0, atol=1e-8)


@given(bins=bins_, seed=seeds, scale=scales, tail=st.sampled_from((0.5, 4.0, 10.0)))
@some
def test_outside_the_interval_it_is_the_identity_which_it_meets_smoothly(
    bins: int, seed: int, scale: float, tail: float
) -> None:
    coupling = spline(bins, tail)
    raw = raw_parameters(coupling, seed, scale)
    outside = torch.tensor([tail, 1.01 * tail, 100.0, 1e30, math.inf], dtype=torch.float64)
    outside = torch.cat((-outside.flip(0), outside))
    y, log_det = mapped(coupling, raw, outside)
    assert torch.equal(y, outside)
    assert torch.equal(log_det, torch.zeros_like(y))
    assert torch.equal(unmapped(coupling, raw, outside), outside)
    just_inside = torch.tensor([-tail, tail], dtype=torch.float64) * (1 - 1e-12)
    y, log_det = mapped(coupling, raw, just_inside)
    torch.testing.assert_close(y, just_inside, rtol=1e-9, atol=0)
    torch.testing.assert_close(log_det, torch.zeros_like(y), rtol=0, atol=1e-6)


@given(seed=seeds, scale=scales)
@some
def test_no_slope_is_beyond_its_bound(seed: int, scale: float) -> None:
    # exp(-7.44) and exp(3.73), from a grid over what a bin of five may be: its own slope and those at its ends.
    coupling = spline(bins=5)
    raw = raw_parameters(coupling, seed, scale)
    _, log_det = mapped(coupling, raw, points(coupling, raw))
    assert log_det.min() >= -7.5
    assert log_det.max() <= 3.8


@given(bins=bins_, seed=seeds, scale=scales)
@some
def test_slope_is_continuous_at_the_knots(bins: int, seed: int, scale: float) -> None:
    coupling = spline(bins)
    raw = raw_parameters(coupling, seed, scale)
    _, _, xs, ys, slopes = (p.flatten() for p in coupling.parameters_from(raw))
    for side in (-1e-12, 1e-12):
        y, log_det = mapped(coupling, raw, xs + side)
        torch.testing.assert_close(y, ys, rtol=0, atol=1e-10)
        torch.testing.assert_close(log_det, slopes.log(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bins", [2, 7, 8, 32])
def test_zeros_are_the_identity(bins: int, dtype: torch.dtype) -> None:
    coupling = spline(bins)
    raw = torch.zeros(1, coupling.outputs_per_channel, 1, 1, dtype=dtype)
    x = points(coupling, raw.double()).to(dtype)
    y, log_det = mapped(coupling, raw, x)
    torch.testing.assert_close(y, x, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert log_det.abs().max() == 0
    torch.testing.assert_close(unmapped(coupling, raw, x), x, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("scale", "largest", "typical"), [(0.3, 5e-6, 5e-7), (1.0, 2e-4, 5e-6), (1e3, 2e-3, 5e-4)])
def test_float32_gives_back_what_came_in(scale: float, largest: float, typical: float) -> None:
    coupling = spline()
    generator = torch.Generator().manual_seed(0)
    raw = scale * torch.randn(5000, coupling.outputs_per_channel, 1, 1, generator=generator)
    raw[:, :2] = 0
    b = 8 * torch.rand(5000, 1, 1, 1, generator=generator) - 4
    params = coupling.parameters_from(raw)
    error = coupling.untransform(coupling.transform(b, params).y, params) - b
    assert error.abs().max() < largest
    assert error.square().mean().sqrt() < typical


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, 1e30])
def test_gradients_are_finite_wherever_it_is_evaluated(scale: float, dtype: torch.dtype) -> None:
    coupling = spline()
    ends = torch.tensor([0.0, 1e-30, 4.0, 4.0001, 1e6, 1e18], dtype=dtype)
    knots = coupling.parameters_from(torch.zeros(1, 25, 1, 1, dtype=dtype))[2].flatten()
    x = torch.cat((-ends, ends, knots)).requires_grad_()
    raw = scale * torch.randn(1, 25, 1, 1, dtype=dtype)
    raw[:, :2] = 0
    for function in (lambda r, x: sum(m.sum() for m in mapped(coupling, r, x)), lambda r, x: unmapped(coupling, r, x)):
        given_raw = raw.clone().requires_grad_()
        for grad in torch.autograd.grad(function(given_raw, x).sum(), (given_raw, x)):
            assert torch.isfinite(grad).all()


def test_gradients_are_those_of_differences() -> None:
    coupling = spline(bins=3)
    raw = raw_parameters(coupling, 3, 1.0, affine=True).requires_grad_()
    x = torch.tensor([-5.0, -2.3, 0.4, 1.9, 3.3, 4.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, x: mapped(coupling, r, x), (raw, x))
    assert torch.autograd.gradcheck(lambda r, x: unmapped(coupling, r, x), (raw, x))


def nats_after_fitting(coupling: NetworkCoupling, data: Tensor) -> float:
    """The mean negative log-likelihood under a standard normal latent, of one map fitted to all the data."""
    raw = torch.zeros(1, coupling.outputs_per_channel, 1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.1)
    loss = torch.zeros(())
    for _ in range(150):
        optimizer.zero_grad()
        z, log_det = mapped(coupling, raw, data)
        loss = (0.5 * z.square() + 0.5 * math.log(2 * math.pi) - log_det).mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_it_fits_two_modes_which_an_affine_map_cannot() -> None:
    generator = torch.Generator().manual_seed(0)
    modes = torch.where(torch.rand(1000, generator=generator) < 0.5, -1.5, 1.5)
    data = modes + 0.3 * torch.randn(1000, generator=generator)
    # Of two far normals: that of one, and a bit for which it is. An affine map gives a normal of the whole variance.
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.3**2) + math.log(2)
    best_affine = 0.5 * math.log(2 * math.pi * math.e * data.var(correction=0).item())
    assert nats_after_fitting(AffineCoupling(nn.Identity()), data) == pytest.approx(best_affine, abs=0.01)
    assert best_affine > entropy + 0.9 / 2
    assert nats_after_fitting(spline(), data) < entropy + 0.1


@pytest.mark.parametrize(
    ("make", "match"), [(lambda: spline(bins=1), "bins: 1"), (lambda: spline(tail=0.0), "tail: 0.0")]
)
def test_a_spline_of_nothing_is_refused(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
