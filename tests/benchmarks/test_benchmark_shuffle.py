"""Every candidate of the shuffle's benchmark is a bijection with the log-determinant that it says, the identity at the
start, and no larger than what it is compared with: else it could win falsely."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.shuffle import summarize
from benchmarks.shuffle_candidates import CANDIDATES, VARIANTS, BenchmarkFlow, Recipe, parameters
from eiwtrain import flow

TINY = flow.FlowConfig((1, 16, 16), levels=3, steps=1, conditioner=flow.ConditionerConfig(hidden=4))
# What the table leaves at its default, so that every branch is taken together with others.
_COMMON = {"shift": True, "both": True, "earlier": True, "whole": "first", "static": "rotation"}
EXTREMES = {
    "full": Recipe("exp", rank=0, descriptors="grid", block=2, **_COMMON),
    "low": Recipe("cayley", rank=3, descriptors="edges", **_COMMON),
}


def tiny_flow(variant: str, random: bool = True) -> tuple[BenchmarkFlow, Tensor]:
    """A flow of three levels, so with latents that leave before a shuffle, and a batch for it."""
    torch.manual_seed(0)
    model = BenchmarkFlow(TINY, variant).double()
    chance = torch.Generator().manual_seed(1)
    x = torch.rand(3, *TINY.image_shape, generator=chance, dtype=torch.float64) - 0.5
    model.initialize(x)
    if random:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=chance, dtype=p.dtype))
    return model, x


@pytest.fixture(autouse=True)
def _extremes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, recipe in EXTREMES.items():
        monkeypatch.setitem(CANDIDATES, name, recipe)


@pytest.mark.parametrize("variant", [*VARIANTS, *EXTREMES])
def test_a_candidate_is_a_bijection_with_its_log_determinant(variant: str) -> None:
    model, x = tiny_flow(variant)
    latents, log_det = model.encode(x)
    model.encode(torch.zeros_like(x))  # what was remembered of x must not be what gives it back
    assert (model.decode(latents) - x).abs().max() < 1e-10

    # Row i of the Jacobian comes from copy i: no sample knows of another.
    copies = x[:1].repeat(TINY.dims, 1, 1, 1).requires_grad_()
    flat = torch.cat([z.flatten(1) for z in model.encode(copies)[0]], dim=1)
    (jacobian,) = torch.autograd.grad(flat.diagonal().sum(), copies)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian.flatten(1))[1], log_det[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", ["soft", *(name for name, r in CANDIDATES.items() if r.static != "rotation")])
def test_a_candidate_starts_as_the_identity_and_leaves_the_rest_of_the_net_alone(variant: str) -> None:
    model, x = tiny_flow(variant, random=False)
    plain, _ = tiny_flow("none", random=False)
    for ours, theirs in zip(model.encode(x)[0], plain.encode(x)[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_candidates_are_no_larger_than_what_they_are_compared_with() -> None:
    config = replace(TINY, image_shape=(3, 32, 32))
    most = parameters(BenchmarkFlow(config, "plain"))
    for variant, recipe in CANDIDATES.items():
        if recipe.hidden is None and variant not in EXTREMES:
            size = parameters(BenchmarkFlow(config, variant))
            assert most - 250 < size <= most, variant


def test_the_summary_pairs_runs_by_seed() -> None:
    bits = {"plain": {0: 4.0, 1: 3.0}, "static": {1: 2.8, 0: 3.9, 7: 9.0}}
    rows = [
        {"variant": variant, "seed": seed, "bits_per_dim": value, "parameters": 5}
        for variant, of_seed in bits.items()
        for seed, value in of_seed.items()
    ]
    first, second = summarize(rows, {"plain": 1.0})
    assert (first["variant"], first["better"], second["variant"]) == ("static", 2, "plain")
    assert first["to_plain"] == pytest.approx((-0.15, 0.05))
