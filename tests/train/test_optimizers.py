"""Muon, against torch's own, and AdamW for what is no matrix."""

import copy

import pytest
import torch
from torch import nn

from eiwtrain import flow
from eiwtrain.config import Train
from eiwtrain.train.flat import FlatModule
from eiwtrain.train.optimizers import matrices_of, optimizer_of, orthogonal

OPTIONS = {"betas": (0.8, 0.9), "weight_decay": 0.1}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1, bias=False), nn.Conv2d(6, 2, 3))


def muon(module, matrices):
    flat = FlatModule(module, matrices)
    optimizer = optimizer_of(flat.parameters(), Train(optimizer="muon", **OPTIONS), flat.blocks)
    optimizer.param_groups[0]["lr"] = 0.01
    return flat, optimizer


def step(flat, optimizer, loss):
    loss.backward()
    flat.weights.grad = None
    flat.gather()
    optimizer.step()


def test_matrices_move_as_by_torchs_muon_and_all_else_as_by_adamw():
    ours, theirs = net(), net()
    x = torch.randn(4, 3, 8, 8)
    flat, optimizer = muon(ours, [ours[n].weight for n in (0, 1, 2)])
    assert [tuple(block) for block in flat.blocks] == [(2, 6, 6), (1, 6, 27)]
    others = [p for name, p in theirs.named_parameters() if name not in ("0.weight", "1.weight", "2.weight")]
    adamw = torch.optim.AdamW(others, lr=0.01, fused=True, **OPTIONS)
    as_matrices = [nn.Parameter(theirs[n].weight.detach().flatten(1)) for n in (0, 1, 2)]  # views of the same numbers
    reference = torch.optim.Muon(as_matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        step(flat, optimizer, ours(x).square().sum())
        theirs.zero_grad()
        theirs(x).square().sum().backward()
        for n, matrix in enumerate(as_matrices):
            matrix.grad = theirs[n].weight.grad.flatten(1)
        reference.step()  # in bfloat16
        adamw.step()
    for n in (0, 1, 2):
        moved = theirs[n].weight - net()[n].weight
        assert moved.norm() > 0.02
        assert (ours[n].weight - theirs[n].weight).norm() < 0.1 * moved.norm()
    torch.testing.assert_close(ours[3].weight, theirs[3].weight, rtol=3e-2, atol=1e-3)  # so do gradients
    torch.testing.assert_close(ours[0].bias, theirs[0].bias, rtol=3e-2, atol=1e-3)


def test_without_matrices_it_is_adamw_to_the_bit():
    ours, theirs = net(), net()
    x = torch.randn(4, 3, 8, 8)
    flat, optimizer = muon(ours, [])
    other = FlatModule(theirs)
    adamw = torch.optim.AdamW([other.weights], lr=0.01, fused=True, **OPTIONS)
    for _ in range(3):
        step(flat, optimizer, ours(x).square().sum())
        step(other, adamw, theirs(x).square().sum())
    assert torch.equal(flat.weights, other.weights)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 64, 576), (1, 300, 20), (2, 1, 5)])
def test_singular_values_become_about_one_and_vectors_stay(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    within = u.mT @ orthogonal(matrices) @ vh.mT
    values = within.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(within, torch.diag_embed(values), rtol=0, atol=1e-6)
    assert values.max() < 1.25
    assert values.min() > 0.3


def test_matrices_together_are_what_each_is_alone():
    matrices = torch.randn(4, 6, 20, dtype=torch.float64)
    torch.testing.assert_close(orthogonal(matrices), torch.cat([orthogonal(m[None]) for m in matrices]))


def test_no_gradient_moves_no_matrix():
    module = net()
    flat, optimizer = muon(module, [module[0].weight])
    optimizer.param_groups[0]["weight_decay"] = 0.0
    before = flat.weights.detach().clone()
    flat.weights.grad = torch.zeros_like(flat.weights)
    optimizer.step()
    assert torch.equal(flat.weights, before)


def test_a_step_that_is_passed_over_changes_nothing():
    module = net()
    flat, optimizer = muon(module, [module[0].weight])
    step(flat, optimizer, module(torch.randn(1, 3, 8, 8)).sum())
    state = copy.deepcopy(optimizer.state[flat.weights])
    before = flat.weights.detach().clone()
    optimizer.passes = True
    step(flat, optimizer, module(torch.randn(1, 3, 8, 8)).sum())
    assert torch.equal(flat.weights, before)
    assert all(torch.equal(value, optimizer.state[flat.weights][name]) for name, value in state.items())


@pytest.mark.parametrize("kind", ["conv", "dense", "residual", "transformer"])
def test_muon_trains_the_networks_of_a_flow_but_not_their_last_layers(kind):
    conditioner = flow.ConditionerConfig(kind=kind, hidden=4, heads=2, patch=1)
    config = flow.FlowConfig(
        image_shape=(3, 8, 8), levels=2, steps=1, backbone="dense", units=2, conditioner=conditioner
    )
    model = flow.EIWFlow(config)
    chosen = {id(p) for p in matrices_of(model)}
    names = {name for name, p in model.named_parameters() if id(p) in chosen}
    assert len(names) == len(matrices_of(model)) >= 8
    assert all(p.ndim in (2, 4) for p in matrices_of(model))
    for name, p in model.named_parameters():
        layer = p.ndim in (2, 4) and "conditioner" in name and "position" not in name
        assert (name in names) == (layer and not name.endswith("conditioner.last.weight")), name
