"""The check that the backward pass computes conditioners as the forward pass does."""

from types import SimpleNamespace

import pytest
import torch
from small_run import small_flow

from eiwtrain import flow
from eiwtrain.train import recompute


@pytest.fixture
def model():
    return small_flow().eval().requires_grad_(False)


def batch(model):
    return torch.zeros(4, *model.config.image_shape, dtype=torch.uint8), torch.rand(4, *model.config.noise_shape)


def test_each_kind_of_conditioner_is_run_and_equal_on_a_cpu(model, monkeypatch):
    ran = []
    monkeypatch.setattr(recompute, "_four_times", lambda module, x: ran.append((module, x)) or [x] * 4)
    assert list(recompute.differences(model, batch(model))) == []
    assert len({x.shape for _, x in ran}) == len(ran) > 1
    assert all(bool(p.any()) for module, _ in ran for p in module.parameters())
    monkeypatch.undo()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert list(recompute.differences(model, batch(model))) == []
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def in_backward():
    return torch._C._current_graph_task_id() != -1


@pytest.mark.parametrize("when", [torch.is_grad_enabled, in_backward], ids=["with gradients", "in backward"])
def test_a_conditioner_that_computes_otherwise_is_named(when, model, monkeypatch):
    network = flow.ConvConditioner.network

    def other(self, x):
        return network(self, x) * (1.5 if when() else 1.0)

    monkeypatch.setattr(flow.ConvConditioner, "network", other)
    found = dict(recompute.differences(model, batch(model)))
    assert found
    assert all(difference > 0 for difference in found.values())

    assert recompute.warning(model, lambda: pytest.fail("not on a CPU")) is None
    monkeypatch.setattr(recompute, "differences", lambda *_: found.items())
    on_gpu = SimpleNamespace(
        parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda:0"))]), config=model.config
    )
    assert "model.backprop=stored" in recompute.warning(on_gpu, tuple)
    assert all(name in recompute.warning(on_gpu, tuple) for name in found)
    monkeypatch.setattr(recompute, "differences", lambda *_: ())
    assert recompute.warning(on_gpu, tuple) is None
