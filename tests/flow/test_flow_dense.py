"""EIW-Flow's backbone: an exact density of the image and the noise that joins, the promised memory and work."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from flow_helpers import DENSE, conditioner_calls, log_abs_det_jacobian, make_flow, relative_error, whole_loss
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eiwtrain.flow import ConditionerConfig, EIWFlow, FlowConfig, Order
from eiwtrain.flow.config import BACKPROP_MODES, SHUFFLES
from eiwtrain.flow.memory import bytes_saved


def batch(size: int = 3, config: FlowConfig = DENSE, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return pixels and noise."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (size, *config.image_shape), generator=generator, dtype=torch.uint8)
    return pixels, torch.rand(size, *config.noise_shape, generator=generator, dtype=torch.float64).to(dtype)


def gradients(flow: EIWFlow, pixels: Tensor, noise: Tensor) -> Tensor:
    """Return the gradients of all parameters as one float64 vector."""
    flow.zero_grad()
    whole_loss(flow(pixels, noise)).backward()
    return torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().double() for p in flow.parameters()]
    )


def test_it_is_an_exact_density_of_image_and_noise_with_an_exact_inverse() -> None:
    small = {"image_shape": (1, 4, 4), "dequantization": "uniform", "noise_channels": 1}
    flow = make_flow(DENSE, **small)
    noise = batch(2, flow.config)[1]
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64) - 0.5
    latents, log_det = flow.encode(x, noise=noise)
    torch.testing.assert_close(flow.decode(latents), x, rtol=1e-10, atol=1e-10)

    def all_latents(v: Tensor, i: int) -> Tensor:
        image, joins = v[:16].view(1, 1, 4, 4), v[16:]
        whole = torch.cat((noise[i, :16], joins)).unsqueeze(0)
        return torch.cat([z.flatten() for z in flow.encode(image, noise=whole)[0]])

    for i in range(2):
        both = torch.cat((x[i].flatten(), noise[i, 16:]))
        expected = log_abs_det_jacobian(lambda v, i=i: all_latents(v, i), both)
        torch.testing.assert_close(log_det[i], expected, rtol=1e-8, atol=1e-8)


def test_what_joins_depends_on_the_units_before() -> None:
    flow = make_flow(DENSE)
    pixels, noise = batch()
    seen: list[Tensor] = []
    flow.levels[0].joins[1].conditioner.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))  # type: ignore[union-attr, index]
    flow(pixels, noise)
    assert [t.shape[1] for t in seen] == [12 + 12]  # the input of the level, and the output of its first unit
    assert not torch.allclose(seen[0][:, :12], seen[0][:, 12:])


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("mode", BACKPROP_MODES[1:])
def test_every_way_back_gives_the_same_gradients(shuffle: str, mode: str) -> None:
    pixels, noise = batch()
    stored = gradients(make_flow(DENSE, shuffle=shuffle), pixels, noise)
    for changes in ({"anchor_every": 1}, {"memory_budget": 10_000}):
        other = gradients(make_flow(DENSE, shuffle=shuffle, backprop=mode, **changes), pixels, noise)
        assert stored.norm() > 1
        assert relative_error(other, stored) <= 1e-9


def test_bfloat16_conditioners_cost_invertible_gradients_no_more_than_stored_ones() -> None:
    pixels, noise = batch(4, dtype=torch.float32)
    exact = gradients(make_flow(DENSE, dtype=torch.float32), pixels, noise)
    error = {
        mode: relative_error(
            gradients(
                make_flow(DENSE, dtype=torch.float32, backprop=mode, conditioner_dtype="bfloat16"), pixels, noise
            ),
            exact,
        )
        for mode in ("stored", "invertible")
    }
    assert 1e-4 < error["stored"] < 0.2
    assert error["invertible"] <= 1.5 * error["stored"]


@pytest.mark.parametrize(("mode", "times"), [("stored", 1), ("checkpointed", 2), ("invertible", 2)])
def test_each_network_runs_once_or_twice(mode: str, times: int) -> None:
    flow = make_flow(DENSE, backprop=mode)
    with conditioner_calls(flow) as calls:
        gradients(flow, *batch())
    # couplings, cross-unit couplings, the dequantizer's couplings and its features
    assert len(calls) == (3 * 1 + 2 * 2) + (2 + 1) + (2 + 1)
    assert set(calls.values()) == {times}


class NoModules(nullcontext[None]):
    """A replacement for the counter's tracker of modules, which fails on modules that run inside a Function."""

    parents = ("Global",)


def flops(flow: EIWFlow, pixels: Tensor, noise: Tensor) -> int:
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()  # type: ignore[assignment]
    with counter:
        whole_loss(flow(pixels, noise)).backward()
    return counter.get_total_flops()


def test_inverting_costs_a_third_more_arithmetic_and_no_more() -> None:
    config = replace(DENSE, conditioner=ConditionerConfig("dense", hidden=24, depth=2, growth=16))
    image = batch(1, dtype=torch.float32)
    counted = {
        mode: flops(make_flow(config, torch.float32, backprop=mode), *image) for mode in ("stored", "invertible")
    }
    assert 1.3 < counted["invertible"] / counted["stored"] <= 1.34


def test_backward_keeps_one_trunk_activation_a_unit_and_the_image() -> None:
    pixels, noise = batch(2, dtype=torch.float32)
    kept, places = {}, 2 * 4 * 4
    for steps in (1, 3):
        flow = make_flow(DENSE, dtype=torch.float32, backprop="invertible", steps=steps, dequantization="uniform")
        x = flow.dequantize(pixels, noise)[0]
        own = [*flow.parameters(), *flow.buffers()]
        kept[steps] = bytes_saved(lambda flow=flow, x=x: flow(x, noise).log_prob, own)[0]  # type: ignore[misc]
    assert kept[1] == kept[3]  # however many steps a unit has
    outputs = places * (12 + 12 + 14) + places // 4 * (4 * 16)  # of the first level's units, the last one squeezed
    outputs += places // 4 * (32 + 34)  # of the second's
    small = 8 * 4 * (64 + 64) + 1024  # the order, log-determinants and other numbers
    assert kept[1] <= 4 * outputs + small


def test_noise_is_needed_for_a_bound_and_not_for_latents() -> None:
    flow = make_flow(DENSE)
    pixels, noise = batch()
    x, _ = flow.dequantize(pixels, noise)
    with pytest.raises(ValueError, match="pass `noise`"):
        flow.log_prob(x)
    with pytest.raises(ValueError, match="noise of shape"):
        flow.log_prob(pixels, noise[:, :-1])
    latents, _ = flow.encode(x)
    again, _ = flow.encode(x, noise=torch.full_like(noise, 0.5))
    assert all(torch.equal(a, b) for a, b in zip(latents, again, strict=True))
    assert flow.drift(x) < 1e-12


def test_the_bound_pays_for_the_noise_that_joins() -> None:
    flow = make_flow(DENSE)
    pixels, _ = batch(1)
    draws = torch.rand(64, *flow.config.noise_shape, dtype=torch.float64)
    with torch.no_grad():
        bounds = flow.log_prob(pixels.expand(64, -1, -1, -1), draws)
        tighter = flow.iwbo(pixels, [draw.unsqueeze(0) for draw in draws])
    assert bounds.std() > 0.1
    assert bounds.mean() < tighter.item() < bounds.max()


@pytest.mark.parametrize("channels", [248, 616])
@pytest.mark.parametrize("kl", ["as-published", "true"])
def test_the_order_learns_at_the_published_sizes(channels: int, kl: str) -> None:
    """As published its weights are 0 in float32 for most channels, and the gradient NaN."""
    torch.manual_seed(0)
    order = Order(channels, kl=kl)
    out = order(torch.randn(2, channels, 2, 2))
    out.penalty.sum().backward()
    assert out.penalty.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in order.parameters())
    assert (order.logits(torch.float32).softmax(0) == 0).sum() > channels / 2
    assert len(set(out.y[0, :, 0, 0].tolist())) == channels  # a permutation still


def test_the_order_is_that_of_the_weights_and_counts_its_changes() -> None:
    order = Order(32, "one").double()
    x = torch.randn(2, 32, 3, 3, dtype=torch.float64)
    weights = order.logits(torch.float64).softmax(0)
    expected = weights.argsort(descending=True)
    order(x)
    assert torch.equal(order(x).y, x[:, expected])
    assert order.changes.item() == 0
    with torch.no_grad():
        order.weigh_last.weight.neg_()
    assert torch.equal(order.eval()(x).y, x[:, expected])  # the order that the other weights were trained with
    assert order.changes.item() == 0
    order.train()(x)
    assert torch.equal(order(x).y, x[:, expected.flip(0)])
    assert order.changes.item() == 1
    assert torch.equal(order.latest, expected.flip(0))
    assert 0 < order.entropy().item() < torch.tensor(32.0).log().item()


def test_the_orders_regulariser_is_what_it_says() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 32, 2, 2, dtype=torch.float64)
    published, true = (Order(32, "one", kl).double() for kl in ("as-published", "true"))
    true.load_state_dict(published.state_dict())
    y = published(x).y
    w = published.logits(torch.float64).softmax(0)
    se = published.excite_last(published.excite_first(y.mean((2, 3))).relu()).softmax(1)
    torch.testing.assert_close(published(x).penalty, (w * (w.log() - se)).sum(1))
    torch.testing.assert_close(true(x).penalty, (w * (w.log() - se.log())).sum(1))
    assert (true(x).penalty > 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": (1, 2, 3)}, "units: 3 numbers for 2 levels"),
        ({"steps": (1,)}, "steps: 1 numbers for 2 levels"),
        ({"steps": (1, 0)}, "steps: 0 is not an integer from 1"),
        ({"backbone": "glow"}, "units: backbone glow has one unit a level"),
        ({"backbone": "denseflow"}, "backbone"),
        ({"noise_channels": 0}, "noise_channels"),
        ({"kl": "reverse"}, "kl"),
    ],
)
def test_a_config_that_makes_no_sense_names_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DENSE, **changes)


def test_each_network_is_called_once_in_a_forward_pass_in_bfloat16() -> None:
    flow = make_flow(DENSE, torch.float32, conditioner_dtype="bfloat16")
    with conditioner_calls(flow) as calls, torch.no_grad():
        pixels, noise = batch()
        flow(pixels, noise.float())
    assert set(calls.values()) == {1}
