"""Conditioners with dropout: what runs in forward runs again in backward."""

from __future__ import annotations

import pytest
import torch
from flow_helpers import gradients, images, make_flow, relative_error
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
