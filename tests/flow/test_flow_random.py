"""Conditioners with dropout, and compiled ones: what runs in forward runs again in backward."""

from __future__ import annotations

import shutil

import pytest
import torch
from flow_helpers import conditioner_calls, gradients, images, make_flow, relative_error, whole_loss
from torch import Tensor

from eiwtrain.flow import ConditionerConfig, EIWFlow, layers
from eiwtrain.flow.bijection import with_own_randomness
from eiwtrain.flow.config import BACKPROP_MODES, CONDITIONERS

DROPPING = {kind: ConditionerConfig(kind, 8, dropout=0.3, patch=1) for kind in CONDITIONERS}


def dropping(mode: str, kind: str = "conv", dtype: torch.dtype = torch.float64) -> EIWFlow:
    return make_flow(conditioner=DROPPING[kind], backprop=mode, dtype=dtype, memory_budget=60_000)


def seeded(flow: EIWFlow, x: Tensor, seed: int = 5) -> Tensor:
    torch.manual_seed(seed)
    return gradients(flow, x)


@pytest.mark.parametrize("kind", DROPPING)
@pytest.mark.parametrize("mode", BACKPROP_MODES[1:])
def test_dropout_draws_the_same_masks_on_the_way_back(kind: str, mode: str) -> None:
    x = images(3)
    stored = seeded(dropping("stored", kind), x)
    assert relative_error(seeded(dropping(mode, kind), x), stored) <= 1e-9
    assert relative_error(seeded(dropping("stored", kind), x, seed=6), stored) > 1e-2


def test_backward_leaves_the_random_state_as_forward_did() -> None:
    states = []
    for mode in BACKPROP_MODES:
        seeded(dropping(mode), images(2))
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)


def test_masks_differ_between_couplings_and_calls() -> None:
    flow = dropping("invertible")
    torch.manual_seed(0)
    first, second = (flow.log_prob(images(2)) for _ in range(2))
    assert not torch.allclose(first, second)
    seeds = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            layers, "with_own_randomness", lambda x, seed: (seeds.append(seed), with_own_randomness(x, seed))[1]
        )
        flow.log_prob(images(2))
    assert len(set(seeds)) == len(seeds) == 5  # couplings and a split prior


def test_dropout_draws_nothing_in_evaluation() -> None:
    flow = dropping("invertible").eval()
    before = torch.get_rng_state()
    gradients(flow, images(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_off_in_evaluation() -> None:
    flow = dropping("invertible").eval()
    assert torch.equal(flow.log_prob(images(2)), flow.log_prob(images(2)))
    assert flow.drift(images(2)) < 1e-10
    assert relative_error(gradients(flow, images(2)), gradients(dropping("stored").eval(), images(2))) <= 1e-9


def test_a_flow_with_dropout_is_not_inverted_in_training_mode() -> None:
    with pytest.raises(RuntimeError, match=r"eval\(\)"):
        dropping("stored").sample(1)


def test_compiled_conditioners_give_the_same_gradients() -> None:
    x = images(3, dtype=torch.float32)
    plain = gradients(make_flow(dtype=torch.float32), x)
    graphs = []
    for mode in ("stored", "invertible", "auto"):
        flow = make_flow(dtype=torch.float32, backprop=mode, memory_budget=9000 if mode == "auto" else None)
        flow.compile_conditioners(backend="aot_eager")
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        assert relative_error(gradients(flow, x), plain) <= 1e-4
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert not torch._dynamo.utils.counters["graph_break"]
    # None of its own for the way forth, which could round otherwise, nor to find out what fits.
    assert 0 < graphs[0] == graphs[1] == graphs[2]


def test_every_shape_of_conditioner_is_compiled() -> None:
    flow = make_flow(image_shape=(3, 64, 64), levels=6, steps=1, dtype=torch.float32, dequantization="variational")
    flow.compile_conditioners(backend="eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    flow(pixels, torch.full(pixels.shape, 0.5))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 8
    assert not torch._dynamo.utils.counters["recompile_limit"]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile's default backend needs a C++ compiler")
def test_compiled_bfloat16_conditioners_cost_invertible_gradients_no_more_than_stored_ones() -> None:
    x = images(4, dtype=torch.float32)
    small = {"dtype": torch.float32, "levels": 1, "steps": 6}
    exact = gradients(make_flow(**small), x)
    error = {}
    for mode in ("stored", "invertible"):
        flow = make_flow(**small, backprop=mode, conditioner_dtype="bfloat16")
        flow.compile_conditioners()
        torch._dynamo.reset()
        error[mode] = relative_error(gradients(flow, x), exact)
    assert 1e-4 < error["stored"] < 0.1
    assert error["invertible"] <= 1.5 * error["stored"]


def test_a_compiled_flow_is_saved_and_counted_as_any_other() -> None:
    flow = make_flow(dtype=torch.float32, backprop="invertible")
    names = list(flow.state_dict())
    flow.compile_conditioners(backend="eager")
    assert list(flow.state_dict()) == names
    with conditioner_calls(flow) as calls:
        whole_loss(flow(images(2, dtype=torch.float32))).backward()
    assert set(calls.values()) == {2}
