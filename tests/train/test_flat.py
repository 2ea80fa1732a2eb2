import copy
import math

import pytest
import torch
from torch import nn

from eiwtrain import flow
from eiwtrain.train.flat import FlatModule, flatten_


def module():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(2, 5, 3), nn.BatchNorm1d(4), nn.Linear(4, 1, bias=False))
    net[1].bias.requires_grad_(False)
    return net


def loss(net, x):
    """Return a loss of all parameters but the convolution's."""
    return net[3](net[2](net[0](x))).square().sum()


def test_parameters_become_views_and_keep_their_values():
    net, before = module(), module().state_dict()
    flat = FlatModule(net)
    assert flat.weights.numel() == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert [name for name, _ in flat.named_parameters()] == ["weights"]
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    with torch.no_grad():
        flat.weights.mul_(2.0)
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name] * (2.0 if p.requires_grad else 1.0)), name
    assert all(torch.equal(t, net.get_parameter(name)) for name, t in flat.named(flat.weights).items())


def test_gradients_are_gathered_over_micro_batches_and_cleared():
    net, plain = module(), module()
    flat = FlatModule(net)
    for x in torch.randn(3, 8, 3).unbind():
        loss(net, x).backward()
        flat.gather()
        assert all(p.grad is None for p in net.parameters())
        loss(plain, x).backward()
    for name, g in flat.named(flat.weights.grad).items():
        expected = plain.get_parameter(name).grad
        assert torch.equal(g, torch.zeros_like(g) if expected is None else expected), name  # the convolution has none
    norm = nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
    assert float(flat.norm()) == pytest.approx(float(norm), rel=1e-6)
    flat.clip_(float(norm), 0.0)
    flat.clip_(float(norm), float(norm) * 2)
    assert float(flat.norm()) == pytest.approx(float(norm), rel=1e-6)
    flat.clip_(float(norm), 0.5)
    assert float(flat.norm()) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_one_number_that_is_not_finite_shows_in_the_norm(what):
    flat = FlatModule(nn.Linear(300, 300))
    flat.weights.grad = torch.zeros_like(flat.weights)
    flat.weights.grad[70_000] = what
    assert not math.isfinite(float(flat.norm()))


def test_the_norm_of_many_numbers_is_exact():
    flat = FlatModule(nn.Linear(4000, 4000, bias=False))
    flat.weights.grad = torch.randn(flat.weights.shape)  # whose squares, added up in float32 in one go, are 0.1 % off
    assert float(flat.norm()) == pytest.approx(float(flat.weights.grad.double().norm()), rel=1e-5)


def test_parameters_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match=r"float32 in training, not torch\.float64"):
        flatten_([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.float64))])


def test_an_average_moves_towards_the_weights_and_is_saved_as_any_model(tmp_path):
    shape = flow.FlowConfig(image_shape=(3, 8, 8), levels=1, steps=1, conditioner=flow.ConditionerConfig(hidden=4))
    trained = flow.EIWFlow(shape)
    averaged = copy.deepcopy(trained)
    flat = FlatModule(trained)
    move = flat.average_in(dict(averaged.named_parameters()))
    with torch.no_grad():
        flat.weights.add_(1.0)
    move(0.25)
    for name, p in averaged.named_parameters():
        torch.testing.assert_close(p, trained.get_parameter(name) - 0.75)
    flow.save(averaged, tmp_path)
    state = flow.load(tmp_path).state_dict()
    assert all(torch.equal(t, state[name]) for name, t in averaged.state_dict().items())
    size = sum(t.nbytes for t in state.values())
    assert (tmp_path / "model.safetensors").stat().st_size < size + 20_000  # a view is saved without what is around it
    assert all(torch.equal(t, state[name]) for name, t in copy.deepcopy(averaged).state_dict().items())
