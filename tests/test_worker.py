import math
from pathlib import Path

import pytest
import torch
from helpers import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from eiwtrain import flow
from eiwtrain.config import Config, Train
from eiwtrain.state import flow_config
from eiwtrain.worker import MicroBatch, batching, learning_rate

CONFIG = Config.model_validate(tiny_config(Path("/x")))


@given(global_batch=st.integers(1, 300), micro_batch=st.integers(1, 300), world_size=st.integers(1, 20))
def test_batching_fits_the_global_batch_with_less_than_one_row_a_micro_batch_to_spare(
    global_batch, micro_batch, world_size
):
    micro_batch = min(micro_batch, global_batch)
    rows, accumulation = batching(Train(global_batch=global_batch, micro_batch=micro_batch), world_size)
    assert rows <= micro_batch
    places = rows * accumulation * world_size
    assert global_batch <= places < global_batch + accumulation * world_size


def test_learning_rate_warms_up_and_comes_down():
    train = Train(lr=2.0, warmup_steps=4, max_steps=14)
    assert [learning_rate(s, train) for s in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate(4, train) == 2.0
    assert learning_rate(9, train) == pytest.approx(1.0)
    assert learning_rate(14, train) == pytest.approx(0.0)
    rates = [learning_rate(s, train) for s in range(4, 15)]
    assert rates == sorted(rates, reverse=True)


def test_a_constant_schedule_is_constant_and_no_warm_up_is_none():
    train = Train(lr=2.0, warmup_steps=0, schedule="constant")
    assert {learning_rate(s, train) for s in (0, 1, 999, 5000)} == {2.0}


def test_the_model_config_reaches_the_flow():
    changed = tiny_config(
        Path("/x"), model={"shuffle": "hard", "backprop": "stored", "trunk_dtype": "float64", "n_bits": 5}
    )
    built = flow_config(Config.model_validate(changed), 3)
    assert built.image_shape == (3, 8, 8)
    assert (built.levels, built.steps, built.conditioner.hidden) == (2, 2, 8)
    assert (built.shuffle, built.backprop, built.trunk_dtype, built.n_bits) == ("hard", "stored", "float64", 5)
    assert built.conditioner_dtype == "bfloat16"


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = Config.model_validate(tiny_config(Path("/x"), train={"precision": "fp32"}))
    model = flow.EIWFlow(flow_config(config, 3))
    model.initialize(torch.rand(16, 3, 8, 8) - 0.5)
    return model.double()


def test_losses_of_all_micro_batches_sum_to_the_mean_whatever_the_padding(model):
    x = torch.rand(8, 3, 8, 8, dtype=torch.float64) - 0.5
    whole = MicroBatch(torch.ones(8, dtype=torch.float64), CONFIG, x)
    expected = whole.loss(model).detach()
    assert float(expected) == pytest.approx(
        float((model.bits_per_dim(x).mean() + CONFIG.train.shuffle_penalty * model(x).penalty.mean()).detach())
    )
    padded = [(x[:3], [1, 1, 1]), (x[3:6], [1, 1, 1]), (torch.cat([x[6:], x[:1]]), [1, 1, 0])]
    parts = [MicroBatch(torch.tensor(weight, dtype=torch.float64), CONFIG, images) for images, weight in padded]
    assert float(sum(p.loss(model).detach() for p in parts)) == pytest.approx(float(expected), rel=1e-12)
    assert sum(p.bits for p in parts) == pytest.approx(whole.bits, rel=1e-12)


def test_a_padded_row_gives_no_gradient(model):
    x = (torch.rand(3, 3, 8, 8, dtype=torch.float64) - 0.5).requires_grad_()
    MicroBatch(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), CONFIG, x).loss(model).backward()
    assert x.grad is not None
    assert x.grad[:2].abs().amax(dim=(1, 2, 3)).min() > 0
    assert float(x.grad[2].abs().max()) == 0.0


def test_a_uniform_model_of_8_bit_images_costs_8_bits_per_dim():
    log_prob = torch.zeros(1)  # density 1 on a unit cube
    assert float(flow.bits_per_dim(log_prob, 192, 8)) == 8.0
    assert math.isclose(float(flow.bits_per_dim(torch.tensor([192 * math.log(2)]), 192, 8)), 7.0)
