"""The whole flow: an exact density with an exact inverse, whatever the precision around it."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from flow_helpers import TINY, images, log_abs_det_jacobian, make_flow
from torch import Tensor, nn

from eiwtrain.flow import ConditionerConfig, ConvConditioner, DequantizerConfig, EIWFlow, FlowConfig, SoftHalf, squeeze
from eiwtrain.flow.config import SHUFFLES


def all_latents(flow: EIWFlow, x: Tensor) -> Tensor:
    return torch.cat([z.flatten(1) for z in flow.encode(x)[0]], dim=1)


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 12), (2, 12, 4)])
def test_decode_undoes_encode(shuffle: str, shape: tuple[int, int, int]) -> None:
    flow = make_flow(image_shape=shape, shuffle=shuffle)
    x = images(3, flow.config)
    latents, _ = flow.encode(x)
    assert [tuple(z.shape[1:]) for z in latents] == flow.latent_shapes
    assert sum(z[0].numel() for z in latents) == flow.dims
    torch.testing.assert_close(flow.decode(latents), x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_log_prob_is_normal_density_plus_log_det_of_the_full_jacobian(shuffle: str) -> None:
    flow = make_flow(image_shape=(2, 4, 4), shuffle=shuffle)
    x = images(2, flow.config)
    normal = torch.distributions.Normal(torch.zeros((), dtype=x.dtype), 1.0)
    for one in x.split(1):
        log_det = log_abs_det_jacobian(lambda v: all_latents(flow, v), one)
        expected = normal.log_prob(all_latents(flow, one)).sum() + log_det
        torch.testing.assert_close(flow.log_prob(one)[0], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(flow.encode(one)[1][0], log_det, rtol=1e-9, atol=1e-9)


def test_bits_per_dim_of_an_image_do_not_depend_on_the_rest_of_the_batch() -> None:
    flow = make_flow()
    x = images(5)
    together = flow.bits_per_dim(x)
    alone = torch.cat([flow.bits_per_dim(one) for one in x.split(1)])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_bits", [8, 5])
def test_bits_per_dim_are_bits_minus_log_prob(n_bits: int) -> None:
    flow = make_flow(n_bits=n_bits)
    x = images(2)
    torch.testing.assert_close(flow.bits_per_dim(x), n_bits - flow.log_prob(x) / (3 * 8 * 8 * math.log(2)))


def test_what_leaves_is_modelled_given_what_stays() -> None:
    prior = make_flow()._levels()[0].prior
    noise = torch.randn(1, 6, 4, 4, dtype=torch.float64)
    leaves = [prior.inverse(torch.cat((stays, noise), dim=1))[:, 6:] for stays in (noise, noise + 1)]
    assert not torch.allclose(leaves[0], leaves[1])


def test_samples_are_a_function_of_the_generator() -> None:
    flow = make_flow()

    def draw(seed: int, temperature: float = 1.0) -> Tensor:
        return flow.sample(3, temperature, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.allclose(draw(1), draw(2))
    assert draw(1).shape == (3, 3, 8, 8)
    assert not draw(1).requires_grad
    cold = draw(1, temperature=0.0)
    torch.testing.assert_close(cold[0], cold[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flow.encode(draw(1, 0.5))[0][1], flow.encode(draw(1))[0][1] / 2)


def test_initialisation_gives_every_step_standardised_input() -> None:
    torch.manual_seed(0)
    flow = EIWFlow(TINY)
    x = 0.01 * images(16, dtype=torch.float32)
    before = flow.bits_per_dim(x).mean()
    flow.initialize(x)
    after = flow.bits_per_dim(x).mean()
    assert after < before - 1
    for level in flow._levels():
        first = next(level.bijections())
        y = first.parts[0](squeeze(x)).y  # type: ignore[index, operator]
        var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
        assert mean.abs().max() < 1e-4
        assert (var - 1).abs().max() < 1e-2
        x, _ = level.split(level(x)[0])


def test_entropy_is_that_of_gaussians_and_carries_no_gradient() -> None:
    torch.manual_seed(0)
    flow = EIWFlow(TINY)  # at the start: rotations of channels
    with torch.no_grad():
        for module in flow.modules():
            if hasattr(module, "rows"):  # 1x1 convolutions made the identity
                module.rows.copy_(torch.arange(len(module.rows)))
                module.factors.zero_()
                module.sign.fill_(1.0)
    out = flow(torch.randn(512, 3, 8, 8) * torch.tensor([4.0, 2.0, 1.0])[:, None, None])
    assert out.entropy.shape == (2, 2)
    assert not out.entropy.requires_grad
    assert out.entropy[1, 1].isnan()
    # Of the twelve channels of the first level four have a deviation of 4, then four of 2, then four of 1.
    gaussian = 0.5 * math.log(2 * math.pi * math.e)
    leaves, stays = gaussian + 2 * math.log(2) / 6, gaussian + (4 * math.log(4) + 2 * math.log(2)) / 6
    expected = torch.tensor([leaves, stays, stays])  # at the top all of what stayed leaves
    torch.testing.assert_close(out.entropy.flatten()[:3], expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_penalty_is_positive_only_where_there_are_weights(shuffle: str) -> None:
    penalty = make_flow(shuffle=shuffle)(images(2)).penalty
    assert penalty.shape == (2,)
    assert (penalty != 0).all() if shuffle in ("hard", "soft", "order") else (penalty == 0).all()


def test_penalties_of_all_shuffles_add_up() -> None:
    flow = make_flow(image_shape=(3, 8, 8), levels=3)
    x = images(2)
    with torch.no_grad():
        expected, parts, inner = torch.zeros(2, dtype=x.dtype), 0, x
        for level in flow._levels()[:-1]:
            y = squeeze(inner)
            for bijection in level.bijections():
                for part in bijection:  # type: ignore[attr-defined]
                    if isinstance(part, SoftHalf):
                        expected, parts = expected + part.condition(part.halves(y)[0])[0].square().mean(1), parts + 1
                    y = part(y).y
            inner = level.prior(y).y.chunk(2, dim=1)[0]
    assert parts == 4
    torch.testing.assert_close(flow(x).penalty, expected)


def gradients(flow: EIWFlow, x: Tensor, forward_under: bool, backward_under: bool) -> list[Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward_under):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=forward_under):
            out = flow(x)
            loss = (-out.log_prob).mean() + out.penalty.mean()
        # In one outermost context with the forward pass where it is under autocast: that keeps autocast's cache.
        grads = torch.autograd.grad(loss, [x, *flow.parameters()])
    return [out.log_prob, out.penalty, *grads]


@pytest.mark.parametrize("backprop", ["stored", "checkpointed", "invertible"])
@pytest.mark.parametrize("conditioner_dtype", ["float32", "bfloat16"])
def test_ambient_autocast_does_not_change_a_bit(backprop: str, conditioner_dtype: str) -> None:
    flow = make_flow(dtype=torch.float32, backprop=backprop, conditioner_dtype=conditioner_dtype)
    x = images(2, dtype=torch.float32)
    plain = gradients(flow, x, forward_under=False, backward_under=False)
    # Of the others autograd runs the backward pass, and that follows the state around it: PyTorch says not to.
    for backward_under in [False, True] if backprop == "invertible" else [False]:
        under = gradients(flow, x, forward_under=True, backward_under=backward_under)
        assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))
    latents, _ = flow.encode(x)
    back = flow.decode(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(flow.decode(latents), back)


@pytest.mark.parametrize(("conditioner_dtype", "inside"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
@pytest.mark.parametrize("ambient", [False, True])
def test_conditioners_run_in_their_own_dtype(conditioner_dtype: str, inside: torch.dtype, ambient: bool) -> None:
    flow = make_flow(dtype=torch.float32, conditioner_dtype=conditioner_dtype)
    seen: list[torch.dtype] = []
    for module in flow.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
        if isinstance(module, ConvConditioner):
            module.register_forward_hook(lambda _m, i, out: seen.append(inside) if i[0].dtype == out.dtype else None)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=ambient):
        log_prob = flow.log_prob(images(1, dtype=torch.float32))
    assert len(seen) == 4 * (2 * 2 + 1)
    assert set(seen) == {inside}
    assert log_prob.dtype == torch.float32


def test_float64_trunk_reconstructs_better_with_float32_parameters() -> None:
    narrow = make_flow(dtype=torch.float32)
    wide = make_flow(dtype=torch.float32, trunk_dtype="float64")
    x = images(2, dtype=torch.float32)
    assert wide.log_prob(x).dtype == torch.float64
    assert wide.sample(1).dtype == torch.float64
    assert next(wide.parameters()).dtype == torch.float32
    assert wide.drift(x) < 1e-9 < narrow.drift(x) < 1e-3
    torch.testing.assert_close(wide.log_prob(x).float(), narrow.log_prob(x), rtol=1e-3, atol=1e-2)


def test_drift_sees_a_wrong_inverse() -> None:
    flow = make_flow()
    x = images(2)
    assert 0 < flow.drift(x) < 1e-10
    level = flow._levels()[0]
    right = level.prior.inverse
    level.prior.inverse = lambda y: right(y) * 1.01  # type: ignore[method-assign]
    assert flow.drift(x) > 1e-3


def test_images_of_another_kind_are_refused() -> None:
    flow = make_flow()
    with pytest.raises(ValueError, match="dequantize"):
        flow(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 4\)"):
        flow(torch.zeros(1, 3, 8, 4))
    with pytest.raises(ValueError, match="latents of shapes"):
        flow.decode(flow.encode(images(1))[0][:1])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"image_shape": (3, 8)}, "image_shape"),
    ({"image_shape": [3, 8, 8]}, "image_shape"),
    ({"image_shape": (0, 8, 8)}, "image_shape"),
    ({"image_shape": (3, 8, 10)}, "levels: 2 levels"),
    ({"levels": 4}, "levels: .* divisible by 16"),
    ({"levels": 10**12}, "levels: .* divisible by 2.1000000000000"),
    ({"levels": 0}, "levels"),
    ({"steps": True}, "steps"),
    ({"steps": 1.5}, "steps"),
    ({"anchor_every": -1}, "anchor_every"),
    ({"n_bits": 9}, "n_bits"),
    ({"n_bits": 0}, "n_bits"),
    ({"shuffle": "soft "}, "shuffle: 'soft ' is not one of none, fixed, hard, soft"),
    ({"backprop": "reversible"}, "backprop"),
    ({"conditioner_dtype": "float16"}, "conditioner_dtype"),
    ({"trunk_dtype": "bfloat16"}, "trunk_dtype"),
    ({"conditioner": {"hidden": 8}}, "conditioner"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_a_config_that_makes_no_sense_names_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        FlowConfig(**{"image_shape": (3, 8, 8), "levels": 2, **changes})


@pytest.mark.parametrize("changes", [{"hidden": 0}, {"depth": -1}, {"activation": "tanh"}])
def test_a_conditioner_that_makes_no_sense_names_the_field(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(changes))}: "):
        ConditionerConfig(**changes)


def test_config_survives_json() -> None:
    config = FlowConfig(
        image_shape=(1, 16, 8),
        backbone="dense",
        levels=2,
        units=(2, 1),
        steps=(5, 4),
        noise_channels=3,
        conditioner=ConditionerConfig("residual", 7, 2, dropout=0.1),
        coupling="spline",
        bins=4,
        shuffle="hard",
        order_input="one",
        kl="true",
        shuffle_block=2,
        dequantization="variational",
        dequantizer=DequantizerConfig(1, 2, 3, 4),
        classes=3,
        backprop="auto",
        memory_budget=1000,
        conditioner_dtype="bfloat16",
        trunk_dtype="float64",
        anchor_every=2,
        n_bits=5,
    )
    default = FlowConfig((1, 16, 8))
    assert all(getattr(config, f.name) != getattr(default, f.name) for f in fields(config) if f.name != "image_shape")
    assert FlowConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_shape": [3, 8, 8], "widths": 3}, "unknown field 'widths'"),
        ({"image_shape": [3, 8, 8], "conditioner": {"width": 3}}, "unknown field 'width'"),
        ({"levels": 2}, "image_shape"),
        ([], "not a mapping"),
    ],
)
def test_from_dict_names_what_is_wrong(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowConfig.from_dict(values)
