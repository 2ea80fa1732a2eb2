"""Every bijection, at random parameters, against what a bijection is: one table, the same tests for all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from flow_helpers import at_random_parameters, log_abs_det_jacobian
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import eiwtrain.flow as flow
from eiwtrain.flow import shuffle
from eiwtrain.flow.bijection import Bijection, Coupling, halves_of
from eiwtrain.flow.layers import NetworkCoupling
from eiwtrain.flow.shuffle import householder_rotation

HIDDEN = flow.ConditionerConfig(hidden=6)


def affine(channels: int, mirrored: bool = False) -> flow.AffineCoupling:
    first, second = halves_of(channels)
    a, b = (second, first) if mirrored else (first, second)
    return flow.AffineCoupling(flow.ConvConditioner(a, 2 * b, HIDDEN), mirrored=mirrored)


def spline(channels: int, mirrored: bool = False) -> flow.SplineCoupling:
    first, second = halves_of(channels)
    a, b = (second, first) if mirrored else (first, second)
    conditioner = flow.ConvConditioner(a, flow.SplineCoupling.outputs_for(5) * b, HIDDEN)
    return flow.SplineCoupling(conditioner, bins=5, mirrored=mirrored)


def conditioned(channels: int) -> flow.ConditionedCoupling:
    second = channels // 2
    return flow.ConditionedCoupling(flow.ConvConditioner(channels - second, 2 * second, HIDDEN), channels // 4, second)


def noise_flow(channels: int) -> flow.NoiseFlow:
    return flow.NoiseFlow(1, flow.DequantizerConfig(couplings=2, hidden=3, depth=1, growth=2))


TABLE: dict[str, Callable[[int], Bijection]] = {
    "ActNorm": flow.ActNorm,
    "InvertibleConv1x1": flow.InvertibleConv1x1,
    "AffineCoupling": affine,
    "AffineCoupling, mirrored": lambda c: affine(c, mirrored=True),
    "SplineCoupling": spline,
    "SplineCoupling, mirrored": lambda c: spline(c, mirrored=True),
    "FixedShuffle": flow.FixedShuffle,
    "HardHalf": flow.HardHalf,
    "HardHalf, mirrored": lambda c: flow.HardHalf(c, mirrored=True),
    "SoftHalf": flow.SoftHalf,
    "SoftHalf, blocks": lambda c: flow.SoftHalf(c, block=2),
    "SoftHalf, mirrored": lambda c: flow.SoftHalf(c, mirrored=True),
    "ConditionedCoupling": conditioned,
    "Order": flow.Order,
    "Order, true divergence": lambda c: flow.Order(c, "one", "true"),
    "Exchange": lambda c: flow.Exchange(),
    "Squeeze": lambda c: flow.Squeeze(),
    "OnFirst": lambda c: flow.OnFirst(flow.InvertibleConv1x1(c - 1), c - 1),
    "NoiseFlow": noise_flow,
    "Chain": lambda c: flow.Chain([flow.ActNorm(c), flow.Chain([flow.InvertibleConv1x1(c), flow.HardHalf(c)])]),
}
COUPLINGS = [name for name in TABLE if "Half" in name or "Coupling" in name]

every_bijection = pytest.mark.parametrize("name", TABLE)
shapes = st.tuples(st.integers(1, 3), st.integers(2, 7), st.integers(1, 4), st.integers(1, 4))
# Few examples, as each is run for every row of the table; the same ones each time.
few = settings(max_examples=12, deadline=None, derandomize=True)


def make(name: str, channels: int, dtype: torch.dtype = torch.float64) -> Bijection:
    torch.manual_seed(channels)
    return at_random_parameters(TABLE[name](channels).to(dtype), scale=0.3)


def batch(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def shaped(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a batch of this shape, or of the nearest that the bijection takes."""
    b, c, h, w = shape
    own = {"NoiseFlow": (b, 8, h, w), "Squeeze": (b, c, 2 * h, 2 * w)}
    return batch(*own.get(name, shape), dtype=dtype)


def subclasses(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


def test_table_holds_every_concrete_bijection() -> None:
    ours = {cls.__name__ for cls in subclasses(Bijection) if cls.__module__.startswith("eiwtrain.")}
    assert ours - {Coupling.__name__, NetworkCoupling.__name__} == {name.split(",")[0] for name in TABLE}


@every_bijection
@given(shape=shapes)
@few
def test_inverse_undoes_forward(name: str, shape: tuple[int, ...]) -> None:
    bijection, x = make(name, shape[1]), shaped(name, *shape)
    out = bijection(x)
    assert out.y[0].numel() == x[0].numel()
    assert out.log_det.shape == out.penalty.shape == (shape[0],)
    torch.testing.assert_close(bijection.inverse(out.y), x, rtol=1e-10, atol=1e-10)


@every_bijection
def test_table_holds_no_identity(name: str) -> None:
    x = shaped(name, 2, 6, 3, 3)
    y = make(name, 6)(x).y
    assert y.shape != x.shape or not torch.allclose(y, x)


@every_bijection
@given(shape=shapes)
@settings(few, max_examples=6)
def test_log_det_is_that_of_the_full_jacobian(name: str, shape: tuple[int, ...]) -> None:
    bijection, x = make(name, shape[1]), shaped(name, *shape)
    log_det = bijection(x).log_det
    for i in range(shape[0]):
        expected = log_abs_det_jacobian(lambda v: bijection(v).y, x[i : i + 1])
        torch.testing.assert_close(log_det[i], expected, rtol=1e-8, atol=1e-8)


@every_bijection
def test_strides_of_the_input_do_not_matter(name: str) -> None:
    bijection = make(name, 5)
    x = shaped(name, 2, 5, 3, 3).transpose(2, 3)
    assert not x.is_contiguous()
    for ours, theirs in zip(bijection(x), bijection(x.contiguous()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    y = bijection(x).y.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(bijection.inverse(y), bijection.inverse(y.contiguous()), rtol=1e-12, atol=1e-12)


@every_bijection
def test_a_sample_does_not_depend_on_the_rest_of_its_batch(name: str) -> None:
    bijection, x = make(name, 5), shaped(name, 4, 5, 3, 2)
    together = bijection(x)
    for i in range(4):
        for one, all_ in zip(bijection(x[i : i + 1]), together, strict=True):
            torch.testing.assert_close(one[0], all_[i], rtol=1e-12, atol=1e-12)


@every_bijection
def test_ambient_autocast_does_not_change_a_bit(name: str) -> None:
    bijection, x = make(name, 6, torch.float32), shaped(name, 3, 6, 4, 4, dtype=torch.float32)
    plain = bijection(x)
    back = bijection.inverse(plain.y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, under_back = bijection(x), bijection.inverse(plain.y)
    for a, b in zip((*plain, back), (*under, under_back), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)


@every_bijection
def test_trunk_may_be_wider_than_parameters(name: str) -> None:
    bijection, x = make(name, 6, torch.float32), shaped(name, 3, 6, 4, 4)
    out = bijection(x)
    assert {t.dtype for t in out} == {torch.float64}
    torch.testing.assert_close(bijection.inverse(out.y), x, rtol=1e-10, atol=1e-10)


@every_bijection
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("channels", [4, 5])
def test_reverse_gives_the_input_and_the_gradients_of_autograd(name: str, frozen: bool, channels: int) -> None:
    bijection, x = make(name, channels), shaped(name, 3, channels, 3, 2)
    parameters = list(bijection.parameters())
    if frozen:
        for p in parameters[::2]:
            p.requires_grad_(False)
    x.requires_grad_()
    out = bijection(x)
    upstream = (batch(*out.y.shape), batch(3), 2 * batch(3))
    trained = [p for p in parameters if p.requires_grad]
    pairs = [(o, g) for o, g in zip(out, upstream, strict=True) if o.requires_grad]
    expected = torch.autograd.grad([o for o, _ in pairs], [x, *trained], [g for _, g in pairs])

    with torch.no_grad():
        out, kept = bijection.forward_keeping(x)
    assert len(kept) == bijection.kept_count
    assert not any(k.is_floating_point() for k in kept)
    back, grad_x, grads = bijection.reverse(out.y, kept, *upstream)
    torch.testing.assert_close(back, x.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad_x, expected[0], rtol=1e-9, atol=1e-9)
    assert [g is not None for g in grads] == [p.requires_grad for p in parameters]
    for ours, theirs in zip([g for g in grads if g is not None], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", COUPLINGS)
def test_couplings_start_as_the_identity(name: str) -> None:
    x = batch(2, 6, 3, 3)
    out = TABLE[name](6).double()(x)
    torch.testing.assert_close(out.y, x, rtol=1e-12, atol=1e-12)
    assert out.log_det.abs().max() == 0
    assert out.penalty.abs().max() == 0


@pytest.mark.parametrize("name", COUPLINGS)
def test_couplings_pass_one_half_unchanged_to_the_bit(name: str) -> None:
    bijection, x = make(name, 5), batch(2, 5, 3, 3)
    y = bijection(x).y
    assert isinstance(bijection, Coupling)
    assert torch.equal(bijection.halves(y)[0], bijection.halves(x)[0])
    assert not torch.allclose(bijection.halves(y)[1], bijection.halves(x)[1])


@pytest.mark.parametrize("name", COUPLINGS)
def test_no_coupling_scales_beyond_its_bound(name: str) -> None:
    bijection = at_random_parameters(TABLE[name](6).double(), scale=100.0)
    x = batch(2, 6, 3, 3)
    bound = 2.0 if "Coupling" in name else 1.0
    # At parameters like these nearly all is beyond the reach of a spline, whose own bound has a test of its own.
    spline_too = 7.5 if "Spline" in name else 0.0
    log_det = bijection(x).log_det.abs()
    assert (log_det <= (bound + spline_too) * 3 * 9 + 1e-9).all()
    assert log_det.max() > 0.2 * bound * 9


def test_a_single_channel_has_no_halves() -> None:
    with pytest.raises(ValueError, match="at least 2 channels"):
        flow.AffineCoupling(flow.ConvConditioner(1, 2, HIDDEN))(batch(1, 1, 2, 2))


def test_actnorm_initialises_to_zero_mean_and_unit_variance() -> None:
    norm = flow.ActNorm(3)
    x = 5 + 3 * batch(8, 3, 6, 6, dtype=torch.float32)
    y = norm.initialize(x)
    var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(var, torch.ones(3), rtol=1e-4, atol=0)
    assert torch.equal(norm(x).y, y)


def test_actnorm_survives_a_constant_channel() -> None:
    y = flow.ActNorm(2).initialize(torch.ones(4, 2, 3, 3))
    assert torch.isfinite(y).all()


def test_conv1x1_starts_as_a_rotation() -> None:
    conv = flow.InvertibleConv1x1(7).double()
    x = batch(2, 7, 3, 3)
    out = conv(x)
    torch.testing.assert_close(out.y.norm(), x.norm(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.log_det, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-5)
    assert not torch.allclose(out.y, x)


def test_squeeze_gathers_each_two_by_two_block() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    y = flow.squeeze(x)
    assert y[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    assert torch.equal(flow.unsqueeze(y), x)
    with pytest.raises(ValueError, match="3x4"):
        flow.squeeze(torch.zeros(1, 1, 3, 4))
    with pytest.raises(ValueError, match="multiple of 4"):
        flow.unsqueeze(torch.zeros(1, 6, 2, 2))


@given(vectors=st.integers(0, 4), channels=st.integers(1, 6))
@few
def test_product_of_reflections_is_orthogonal(vectors: int, channels: int) -> None:
    v = batch(2, vectors, channels)
    q = householder_rotation(v)
    torch.testing.assert_close(q @ q.mT, torch.eye(channels, dtype=q.dtype).expand_as(q), rtol=0, atol=1e-12)
    det = torch.full((2,), (-1.0) ** vectors, dtype=q.dtype)
    torch.testing.assert_close(torch.linalg.det(q), det, rtol=1e-10, atol=0)


def test_last_reflection_is_applied_first() -> None:
    v, x = batch(1, 2, 3), batch(3)

    def reflect(u: Tensor, x: Tensor) -> Tensor:
        return x - 2 * u * (u @ x) / (u @ u)

    torch.testing.assert_close(householder_rotation(v)[0] @ x, reflect(v[0, 0], reflect(v[0, 1], x)))


@pytest.mark.parametrize("half", [flow.SoftHalf, flow.HardHalf])
def test_log_det_and_penalty_are_those_of_the_weights(half: type[Coupling]) -> None:
    bijection, x = at_random_parameters(half(6).double()), batch(3, 6, 4, 2)
    a, b = bijection.halves(x)
    out, log_weights = bijection(x), bijection.condition(a)[0]
    torch.testing.assert_close(out.log_det, 8 * log_weights.sum(1))
    torch.testing.assert_close(out.penalty, log_weights.square().mean(1))
    assert out.penalty.min() > 0
    if half is flow.SoftHalf:  # a rotation and then the weights: undoing the weights must leave every norm as it was
        turned = bijection.halves(out.y)[1] / log_weights.exp()[:, :, None, None]
        torch.testing.assert_close(turned.norm(dim=1), b.norm(dim=1))
    else:  # the weights and then a sort by them
        scaled, rows = b * log_weights.exp()[:, :, None, None], log_weights.argsort(dim=1)
        assert all(torch.equal(bijection.halves(out.y)[1][i], scaled[i, rows[i]]) for i in range(3))


def test_soft_shuffle_turns_each_sample_its_own_way() -> None:
    bijection, x = at_random_parameters(flow.SoftHalf(6).double()), batch(2, 6, 4, 2)
    turns = bijection.condition(bijection.halves(x)[0])[1]
    assert (turns[0] - turns[1]).abs().max() > 1e-3


def test_both_halves_of_a_shuffle_change() -> None:
    x = batch(2, 6, 4, 4)
    for kind in ("fixed", "hard", "soft"):
        torch.manual_seed(0)
        shuffle = flow.make_shuffle(kind, 6)
        assert shuffle is not None
        y = at_random_parameters(shuffle.double(), scale=1.0)(x).y
        assert not torch.allclose(y[:, :3], x[:, :3])
        assert not torch.allclose(y[:, 3:], x[:, 3:])
    assert flow.make_shuffle("none", 6) is None


@pytest.mark.parametrize("sides", [(8, 12), (6, 4)])
def test_a_soft_shuffle_turns_each_block_by_itself(sides: tuple[int, int]) -> None:
    half, x = at_random_parameters(flow.SoftHalf(6, block=4).double(), scale=0.3), batch(2, 6, *sides)
    y = half(x).y
    h, w = (4 if side % 4 == 0 else 2 for side in sides)
    alone = half(x[:, :, :h, :w]).y
    torch.testing.assert_close(y[:, :, :h, :w], alone, rtol=1e-12, atol=1e-12)
    turns = half.get_submodule("solver")(shuffle.to_blocks(half.halves(x)[0], 4))
    assert turns.var(dim=0).min() > 0


@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)))
@few
def test_uncut_undoes_cut(shape: tuple[int, ...]) -> None:
    x = batch(*shape)
    assert torch.equal(shuffle.from_blocks(shuffle.to_blocks(x, 4), x.shape), x)
