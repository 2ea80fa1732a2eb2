"""Backpropagation without stored activations: the same gradients, the promised memory, the promised work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from flow_helpers import (
    at_random_parameters,
    conditioner_calls,
    gradients,
    images,
    make_flow,
    relative_error,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eiwtrain.flow import (
    AffineCoupling,
    Chain,
    ConditionerConfig,
    ConvConditioner,
    EIWFlow,
    FlowOutput,
    HardHalf,
    InvertibleConv1x1,
    run_chain,
)
from eiwtrain.flow.config import BACKPROP_MODES, SHUFFLES


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("anchor_every", [0, 2])
@pytest.mark.parametrize("mode", ["checkpointed", "invertible"])
def test_gradients_in_float64_are_those_of_autograd(shuffle: str, anchor_every: int, mode: str) -> None:
    x = images(3)
    stored = gradients(make_flow(shuffle=shuffle, steps=3), x)
    other = gradients(make_flow(shuffle=shuffle, steps=3, backprop=mode, anchor_every=anchor_every), x)
    assert stored.norm() > 1
    assert relative_error(other, stored) <= 1e-9


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("mode", ["checkpointed", "invertible"])
def test_gradients_in_float32_are_those_of_autograd_up_to_rounding(shuffle: str, mode: str) -> None:
    x = images(3, dtype=torch.float32)
    stored = gradients(make_flow(dtype=torch.float32, shuffle=shuffle), x)
    other = gradients(make_flow(dtype=torch.float32, shuffle=shuffle, backprop=mode), x)
    assert relative_error(other, stored) <= 1e-4


def test_bfloat16_conditioners_cost_invertible_gradients_no_more_than_stored_ones() -> None:
    x = images(4, dtype=torch.float32)
    exact = gradients(make_flow(dtype=torch.float32, steps=4), x)
    low = {
        mode: make_flow(dtype=torch.float32, steps=4, backprop=mode, conditioner_dtype="bfloat16")
        for mode in BACKPROP_MODES
    }
    error = {mode: relative_error(gradients(flow, x), exact) for mode, flow in low.items()}
    assert 1e-4 < error["stored"] < 0.1
    assert error["checkpointed"] == error["stored"]
    assert error["selective"] <= 1.05 * error["stored"]  # what is kept is exact
    assert error["invertible"] <= 1.5 * error["stored"]


@pytest.mark.parametrize("shuffle", ["hard", "soft"])
@pytest.mark.parametrize("unused", ["log_prob", "penalty"])
def test_a_loss_may_leave_outputs_unused(shuffle: str, unused: str) -> None:
    def loss(out: FlowOutput) -> Tensor:
        return out.penalty.sum() if unused == "log_prob" else out.log_prob.sum()

    x = images(2)
    stored = gradients(make_flow(shuffle=shuffle), x, loss)
    assert relative_error(gradients(make_flow(shuffle=shuffle, backprop="invertible"), x, loss), stored) <= 1e-9


def test_frozen_parameters_get_no_gradient_and_spoil_none() -> None:
    grads = {}
    for mode in BACKPROP_MODES:
        flow = make_flow(backprop=mode)
        for p in list(flow.parameters())[::3]:
            p.requires_grad_(False)
        grads[mode] = gradients(flow, images(2))
        assert [p.grad is not None for p in flow.parameters()] == [p.requires_grad for p in flow.parameters()]
    assert relative_error(grads["invertible"], grads["stored"]) <= 1e-9


def test_a_conditioner_shared_by_two_couplings_gets_both_gradients() -> None:
    shared = ConvConditioner(2, 4, ConditionerConfig(hidden=4)).double()
    chain = [AffineCoupling(shared), InvertibleConv1x1(4).double(), AffineCoupling(shared, mirrored=True)]
    at_random_parameters(Chain(chain))
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    grads = []
    for mode in BACKPROP_MODES:
        out = run_chain(chain, x, mode)
        loss = out.y.square().sum() - out.log_det.sum()
        grads.append(torch.autograd.grad(loss, list(shared.parameters())))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("mode", "times"), [("stored", 1), ("checkpointed", 2), ("invertible", 2)])
@pytest.mark.parametrize("anchor_every", [0, 1])
def test_each_conditioner_runs_so_often_in_a_forward_and_a_backward(mode: str, times: int, anchor_every: int) -> None:
    flow = make_flow(backprop=mode, steps=3, anchor_every=anchor_every)
    with conditioner_calls(flow) as calls:
        gradients(flow, images(2))
    assert len(calls) == 2 * 3 + 1  # and the split prior's
    assert set(calls.values()) == {times}


def bytes_saved(flow: EIWFlow, x: Tensor) -> int:
    """What autograd keeps from forward to backward: each storage once, without the parameters."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in flow.parameters()}
    alive = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(t)  # so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        flow(x)
    return sum(kept.values())


def bytes_held(flow: EIWFlow, x: Tensor) -> int:
    """Return the bytes still allocated while the output of a forward pass is alive, no matter what holds them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = flow(x)
    assert out.log_prob.requires_grad
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("measure", [bytes_saved, bytes_held])
def test_memory_does_not_grow_with_depth_when_invertible(
    shuffle: str, measure: Callable[[EIWFlow, Tensor], int]
) -> None:
    x = images(2, dtype=torch.float32)
    kept = {
        (mode, steps): measure(make_flow(dtype=torch.float32, backprop=mode, steps=steps, shuffle=shuffle), x)
        for mode in ("stored", "invertible")
        for steps in (2, 8)
    }
    assert 0 < kept["invertible", 2] == kept["invertible", 8]
    assert kept["stored", 8] > 2.5 * kept["stored", 2] > 5 * kept["invertible", 2]


@pytest.mark.parametrize("measure", [bytes_saved, bytes_held])
def test_64_steps_a_level_keep_as_much_as_8(measure: Callable[[EIWFlow, Tensor], int]) -> None:
    x = images(1, dtype=torch.float32)
    kept = [measure(make_flow(dtype=torch.float32, backprop="invertible", steps=n), x) for n in (8, 64)]
    assert kept[0] == kept[1]


class NoModules(nullcontext[None]):
    """A replacement for the counter's tracker of modules, which fails on modules that run inside a Function."""

    parents = ("Global",)


def convolution_flops(flow: EIWFlow, x: Tensor) -> int:
    """Return the FLOPs of a forward and a backward pass."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()  # type: ignore[assignment]
    flow(x)  # where "auto" finds out what fits
    with counter:
        flow(x).log_prob.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for operation, n in counts.items() if "convolution" in str(operation))


def test_inverting_costs_a_third_more_arithmetic_and_no_more() -> None:
    x = images(1, dtype=torch.float32)
    flops = {
        mode: convolution_flops(make_flow(dtype=torch.float32, steps=8, backprop=mode), x) for mode in BACKPROP_MODES
    }
    assert 1.33 < flops["invertible"] / flops["stored"] <= 1.34
    assert flops["checkpointed"] == flops["invertible"]
    assert flops["auto"] == flops["stored"]  # as there is memory for all


def test_each_anchor_saves_one_activation_more() -> None:
    x = images(2, dtype=torch.float32)

    def saved(anchor_every: int) -> int:
        flow = make_flow(dtype=torch.float32, backprop="invertible", steps=4, shuffle="none", anchor_every=anchor_every)
        assert bytes_held(flow, x) - bytes_saved(flow, x) < 200  # the rest is the output and the log-determinants
        return bytes_saved(flow, x)

    level_outputs = x.nbytes + x.nbytes // 2  # the second level sees half of the first
    assert saved(2) - saved(0) == level_outputs
    assert saved(1) - saved(0) == 3 * level_outputs


def test_anchors_bound_the_error_of_the_reconstruction() -> None:
    x = images(2, dtype=torch.float32)

    def deep(dtype: torch.dtype, backprop: str, anchor_every: int = 0) -> Tensor:
        return gradients(make_flow(dtype=dtype, backprop=backprop, levels=1, steps=12, anchor_every=anchor_every), x)

    exact = deep(torch.float64, "stored")
    error = {n: relative_error(deep(torch.float32, "invertible", n), exact) for n in (0, 1)}
    assert error[1] < 0.8 * error[0]


def test_the_order_of_a_hard_shuffle_is_kept_not_guessed() -> None:
    half = HardHalf(8).double()  # as it starts, all weights are equal: sorting again would give another order
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    a, b = half.halves(x)
    order = torch.tensor([[3, 1, 0, 2], [1, 2, 3, 0]])
    y = half.whole(a, half.transform(b, half.condition(a, (order,))).y)
    back, _, _ = half.reverse(y, (order,), torch.ones_like(y), torch.ones(2).double(), torch.ones(2).double())
    assert torch.equal(back, x)
    assert not torch.allclose(half.inverse(y), x)


def test_a_second_backward_is_refused() -> None:
    out = make_flow(backprop="invertible").log_prob(images(1)).sum()
    out.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward()


def test_gradients_of_gradients_are_refused_when_invertible() -> None:
    x = images(1).requires_grad_()
    flow = make_flow(backprop="invertible")
    (grad,) = torch.autograd.grad(flow.log_prob(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("mode", ["stored", "invertible"])
def test_a_parameter_changed_before_backward_is_refused(mode: str) -> None:
    flow = make_flow(backprop=mode)
    loss = flow.log_prob(images(1)).sum()
    with torch.no_grad():
        flow.get_parameter("levels.0.units.0.1.parts.2.conditioner.last.weight").add_(1.0)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


@pytest.mark.parametrize("mode", BACKPROP_MODES)
def test_without_gradients_there_is_only_a_forward(mode: str) -> None:
    flow = make_flow(backprop=mode)
    with conditioner_calls(flow) as calls, torch.no_grad():
        out = flow(images(1))
    assert set(calls.values()) == {1}
    assert not out.log_prob.requires_grad
    assert torch.equal(out.log_prob, flow(images(1)).log_prob)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="reversible"):
        run_chain([], torch.zeros(1, 2, 2, 2), "reversible")
