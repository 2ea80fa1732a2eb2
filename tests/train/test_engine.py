import copy
import math
import sys
import time

import pytest
import torch
import torch.distributed as dist
from ranks import TIMEOUT, run_ranks
from torch import nn

from eiwtrain.config import Train
from eiwtrain.train import engine as engine_module
from eiwtrain.train.engine import Engine
from eiwtrain.train.stragglers import Stopwatch

pytestmark = pytest.mark.cluster

STEPS, ACCUMULATION, MICRO_BATCH, LR = 6, 2, 2, 1e-2
CLIP = 11.0  # above the gradient norm of some steps and below that of others: AdamW does not see a constant factor


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def inputs(world_size):
    return torch.randn(STEPS, world_size, ACCUMULATION, MICRO_BATCH, 7, generator=torch.Generator().manual_seed(1))


OPTIMIZERS = {"adamw": torch.optim.AdamW, "adamax": torch.optim.Adamax}


def plain_training(x, optimizer, **options):
    """The same steps by torch alone, in one process; parameters and gradient norms."""
    reference = model()
    optimizer = OPTIMIZERS[optimizer](reference.parameters(), lr=LR, **options)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        reference(x[step].flatten(0, 2)).square().sum().backward()
        norms.append(float(nn.utils.clip_grad_norm_(reference.parameters(), CLIP)))
        optimizer.step()
    return list(reference.parameters()), norms


def losses(x, step):
    own = x[step, dist.get_rank()]
    return [lambda module, x=micro_batch: module(x).square().sum() for micro_batch in own]


def weights(engine):
    return {name: t.clone() for group in engine.weights() for name, t in group.items()}


def with_every_optimizer(work, stage):
    for optimizer in OPTIMIZERS:
        work(stage, optimizer)


def train_and_resume(stage, optimizer):
    x = inputs(2)
    options = {"betas": (0.8, 0.9), "weight_decay": 0.1}
    train = Train(zero_stage=stage, clip=CLIP, optimizer=optimizer, **options)
    engine = Engine(model(), train, MICRO_BATCH, ACCUMULATION, 2)
    assert sys.modules["deepspeed"].ops.__compatible_ops__ == {}  # nothing was compiled to find out
    assert sys.modules["deepspeed.comm.torch"].build_shm_op() is None
    for group in (engine._engine.data_parallel_group, engine._engine.seq_data_parallel_group):
        assert group._get_backend(torch.device("cpu")).options._timeout == TIMEOUT  # that of all its collectives
    if stage:  # no 2 GB for 58 parameters
        assert engine._engine.optimizer.reduce_bucket_size == 58
    norms = [engine.step(losses(x, s), LR)[0] for s in range(3)]
    half_way = weights(engine)
    moments = {k: v.clone() for k, v in engine.moments()}
    norms += [engine.step(losses(x, s), LR)[0] for s in range(3, STEPS)]

    expected, expected_norms = plain_training(x, optimizer, **options)
    for ours, theirs in zip(weights(engine).values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected_norms), rtol=1e-5, atol=1e-6)
    assert min(norms) < CLIP < max(norms)

    resumed = model()
    resumed.load_state_dict(half_way)
    elsewhere = Engine(copy.deepcopy(resumed), train.model_copy(update={"zero_stage": 3 - stage}), 2, ACCUMULATION, 2)
    elsewhere.load_moments(moments, 3, losses(x, 0)[0])
    assert all(torch.equal(v, moments[k]) for k, v in elsewhere.moments())
    again = Engine(resumed, train, MICRO_BATCH, ACCUMULATION, 2)
    again.load_moments(moments, 3, losses(x, 0)[0])
    assert all(torch.equal(v, moments[k]) for k, v in again.moments())
    for s in range(3, STEPS):
        again.step(losses(x, s), LR)
    ours, theirs = weights(engine), weights(again)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_as_one_process_and_resume_to_the_bit(stage):
    run_ranks(with_every_optimizer, 2, train_and_resume, stage)


def at_every_stage(work):
    for stage in range(4):
        with_every_optimizer(work, stage)


def nan(y):
    return y.square().sum() * math.nan


def infinite_with_finite_gradients(y):
    return y.square().sum() + math.inf


def finite_with_nan_gradients(y):
    return y.square().sum() + (y.sum() * 0.0).sqrt()


def state_of(engine):
    """Everything that a step changes: weights, moments, the optimizer's counts."""
    counts = {f"count {i}": s["step"].clone() for i, s in enumerate(engine._optimizer.state.values())}
    return weights(engine) | {k: v.clone() for k, v in engine.moments()} | counts


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def pass_over_what_is_not_finite(stage, optimizer):
    world_size = dist.get_world_size()
    x = inputs(world_size)
    train = Train(zero_stage=stage, clip=CLIP, optimizer=optimizer)
    undisturbed = Engine(model(), train, MICRO_BATCH, ACCUMULATION, world_size)
    engine = Engine(model(), train, MICRO_BATCH, ACCUMULATION, world_size)
    for step, bad in enumerate([nan, infinite_with_finite_gradients, finite_with_nan_gradients]):
        before = state_of(engine)
        with_bad = losses(x, step)
        if dist.get_rank() == world_size - 1:  # on one rank, in one micro-batch
            own = x[step, -1, step % ACCUMULATION]
            with_bad[step % ACCUMULATION] = lambda module, own=own, bad=bad: bad(module(own))
        norm, applied = engine.step(with_bad, LR)
        assert not applied
        assert not math.isfinite(norm)
        assert_equal(state_of(engine), before)

        assert engine.step(losses(x, step), LR) == undisturbed.step(losses(x, step), LR)
        assert_equal(state_of(engine), state_of(undisturbed))
    assert {int(s["step"]) for s in engine._optimizer.state.values()} == {3}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_is_not_finite_leaves_no_trace(world_size):
    run_ranks(at_every_stage, world_size, pass_over_what_is_not_finite)


def load_before_any_update_by_a_loss_that_is_not_finite(stage, optimizer):
    x = inputs(1)
    train = Train(zero_stage=stage, clip=CLIP, optimizer=optimizer)
    fresh = Engine(model(), train, MICRO_BATCH, ACCUMULATION, 1)
    engine = Engine(model(), train, MICRO_BATCH, ACCUMULATION, 1)
    moments = dict(engine.moments())
    assert {k: (v.shape, float(v.abs().sum())) for k, v in moments.items()} == {
        f"{name}.{key}": (p.shape, 0.0) for name, p in model().named_parameters() for key in engine._optimizer.moments
    }
    engine.load_moments(moments, 0, lambda module: nan(module(x[0, 0, 0])))
    assert_equal(weights(engine), weights(fresh))
    assert {int(s["step"]) for s in engine._optimizer.state.values()} == {0}
    for s in range(2):
        assert engine.step(losses(x, s), LR) == fresh.step(losses(x, s), LR)
    assert_equal(state_of(engine), state_of(fresh))


def test_what_is_loaded_does_not_depend_on_the_loss_that_makes_room_for_it():
    run_ranks(at_every_stage, 1, load_before_any_update_by_a_loss_that_is_not_finite)


def report_with_every_step(stage, optimizer):
    x, own = inputs(2), dist.get_rank() + 1.0
    engine = Engine(model(), Train(zero_stage=stage, optimizer=optimizer), MICRO_BATCH, ACCUMULATION, 2)
    called = []

    def report():
        called.append(own)
        return torch.tensor([own, 10.0], dtype=torch.float64)

    assert engine.step(losses(x, 0), LR, report)[1]
    assert (engine.reported, len(called)) == ([3.0, 20.0], 1)
    norm, applied = engine.step([lambda module: nan(module(x[0, 0, 0]))] * ACCUMULATION, LR, report)
    assert (applied, math.isfinite(norm), engine.reported) == (False, False, [3.0, 20.0])


def test_what_ranks_report_is_summed_whether_or_not_a_step_is_applied():
    run_ranks(at_every_stage, 2, report_with_every_step)


def refuse_another_number_of_micro_batches():
    engine = Engine(model(), Train(), MICRO_BATCH, ACCUMULATION, 1)
    with pytest.raises(ValueError, match="1 micro-batches for 2"):
        engine.step([lambda module: module(torch.zeros(2, 7)).sum()], LR)


def one_rank_is_slow(stage):
    engine = Engine(model(), Train(zero_stage=stage), MICRO_BATCH, ACCUMULATION, 2)
    stopwatch = Stopwatch(engine.device)
    engine.before_waiting = stopwatch.end
    own = losses(inputs(2), 0)

    def slow(module):
        time.sleep(0.4 * dist.get_rank())
        return own[0](module)

    dist.barrier()
    began = time.perf_counter()
    stopwatch.begin()
    engine.step([slow, own[1]], LR)
    took, computed = time.perf_counter() - began, stopwatch.seconds()
    if stage == 3:
        assert math.isnan(computed)
        return
    assert took >= 0.3  # both wait for the slow one
    assert (computed >= 0.4) == (dist.get_rank() == 1)
    assert computed < took


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_a_rank_computes_does_not_include_its_wait_for_a_slower_one(stage):
    run_ranks(one_rank_is_slow, 2, stage)


def test_a_wrong_number_of_micro_batches_is_refused():
    run_ranks(refuse_another_number_of_micro_batches, 1)


class Nested(nn.Linear):
    """Gives its output where DeepSpeed does not look."""

    def forward(self, x):
        return (super().forward(x),), x


def refuse_a_leaf_with_a_nested_output():
    engine_module.LEAVES = (Nested,)
    engine = Engine(Nested(7, 3), Train(zero_stage=3), MICRO_BATCH, 1, 1)
    with pytest.raises(TypeError, match="Nested: a leaf of ZeRO 3"):
        engine.step([lambda module: module(torch.zeros(2, 7))[0][0].sum()], LR)


def test_a_leaf_of_zero_3_that_would_not_be_trained_is_refused():
    run_ranks(refuse_a_leaf_with_a_nested_output, 1)
