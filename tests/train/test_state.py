"""The flow with invertible backpropagation under DeepSpeed, on two ranks."""

import math
from pathlib import Path
from unittest import mock

import helpers
import pytest
import torch
import torch.distributed as dist
from helpers import tiny_config
from ranks import run_ranks
from torch import nn

from eiwtrain import checkpoints, flow
from eiwtrain.checkpoints.writer import CheckpointWriter
from eiwtrain.config import Config, batching
from eiwtrain.data.manifest import Manifest
from eiwtrain.train.engine import Engine
from eiwtrain.train.objective import MicroBatch
from eiwtrain.train.state import TrainState, flow_config

pytestmark = pytest.mark.cluster

STEPS, LR = 4, 1e-2
DENSE = helpers.DENSE | {"dequantization": "uniform", "order_input": "one"}  # the images of these tests are reals
DATA = Manifest("noise", 8, 3, {"name": "none", "version": 1, "params": {}}, {}, fingerprint="f" * 64)


def config(folder, stage=1, backprop="invertible", precision="fp32", model=None, **train):
    train = {"zero_stage": stage, "precision": precision, "micro_batch": 2, "clip": 0.0, "ema": 0.9, "seed": 3} | train
    model = {"conditioner": {"hidden": 8}} if model is None else model
    raw = tiny_config(Path(folder), model={"backprop": backprop} | model, train=train)
    return Config.model_validate(raw)


def images(step):
    """A global batch of 8, dequantized."""
    return torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(step)) - 0.5


def noise_of(config, x):
    """The noise of reals: none, unless some joins on the way."""
    shape = flow_config(config, 3).noise_shape
    return torch.rand(len(x), *shape, generator=torch.Generator().manual_seed(7)) if len(shape) == 1 else None


def first(config):
    """Pixels, noise and no labels."""
    pixels = (images(99) * 256 + 128).to(torch.uint8)
    return pixels, torch.full((8, *flow_config(config, 3).noise_shape), 0.5), None


def make_state(config, skip_to=None):
    rows, accumulation = batching(config.train, dist.get_world_size())
    device, batching_ = torch.device("cpu"), (rows, accumulation)
    return TrainState(config, DATA, device, batching_, first=lambda: first(config), note=print, skip_to=skip_to)


def losses(config, x, noise=None):
    """This rank's micro-batches of the global batch x."""
    rows, _ = batching(config.train, dist.get_world_size())
    if noise is None:
        return [MicroBatch(torch.ones(rows), config, p, noise_of(config, p)).loss for p in own_parts(x, rows)]
    parts = zip(own_parts(x, rows), own_parts(noise, rows), strict=True)
    return [MicroBatch(torch.ones(rows), config, *part).loss for part in parts]


def own_parts(x, rows):
    return x.chunk(dist.get_world_size())[dist.get_rank()].split(rows)


def whole_batch(config):
    """What the flow takes: reals, or pixels and noise where noise joins on the way."""
    if config.model.backbone == "glow":
        return (images(0),)
    noise_shape = flow_config(config, 3).noise_shape
    return (images(0) * 256 + 128).to(torch.uint8), torch.rand(8, *noise_shape, generator=torch.manual_seed(4))


def trained_looking_flow(config, backprop):
    """A flow at random parameters, none of them zero as at the start."""
    torch.manual_seed(0)
    model = config.model.model_copy(update={"backprop": backprop})
    module = flow.EIWFlow(flow_config(config.model_copy(update={"model": model}), 3))
    module.initialize(*whole_batch(config))
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.03 * torch.randn_like(p))
    return module


def gradients_of_every_backbone_are_plain_autograds(folder, stage, backprop):
    for model in (None, helpers.DENSE):
        gradients_are_plain_autograds(config(folder, stage, model=model), backprop)


def gradients_are_plain_autograds(c, backprop):
    stage, batch = c.train.zero_stage, whole_batch(c)
    rows, accumulation = batching(c.train, dist.get_world_size())
    assert accumulation == 2
    engine = Engine(trained_looking_flow(c, backprop), c.train, rows, accumulation, dist.get_world_size())
    assert all((p.numel() == 0) == (stage == 3) for p in engine.module.parameters())  # truly sharded
    norm, _ = engine.step(losses(c, *batch), lr=0.0)
    # the first moment after one step is (1 - beta) times the gradient that DeepSpeed reduced
    beta, _ = c.train.betas
    got = {k.removesuffix(".exp_avg"): v / (1 - beta) for k, v in engine.moments() if k.endswith(".exp_avg")}

    module = trained_looking_flow(c, "stored")
    MicroBatch(torch.ones(8), c, *batch).loss(module).backward()
    expected = {name: p.grad for name, p in module.named_parameters()}
    assert got.keys() == expected.keys()
    scale = nn.utils.get_total_norm(list(expected.values()))
    error = nn.utils.get_total_norm([got[name] - g for name, g in expected.items()])
    assert error / scale < 1e-4
    assert norm == pytest.approx(float(scale), rel=1e-4)
    for name, g in expected.items():
        assert (got[name] - g).norm() <= 1e-3 * g.norm() + 1e-6 * scale, name


@pytest.mark.parametrize(
    ("stage", "backprop"), [(0, "invertible"), (1, "invertible"), (2, "invertible"), (3, "invertible"), (3, "stored")]
)
def test_gradients_over_two_ranks_are_plain_autograds(tmp_path, stage, backprop):
    run_ranks(gradients_of_every_backbone_are_plain_autograds, 2, tmp_path, stage, backprop)


def save_half_way(folder, stage=1, model=None, optimizer="adamw"):
    c = config(folder, stage, model=model, optimizer=optimizer)
    state = make_state(c)
    machines = ["a", "b"][: dist.get_world_size()]
    saver = CheckpointWriter(c.root, 5, 0, lambda: None, near_of(folder, dist.get_rank()), machines)
    for step in range(2):
        state.advance(losses(c, images(step)), LR)
    saver.begin(state.step, state.samples_seen, state.tensors(), state.to_json())
    for step in range(2, STEPS):  # while the checkpoint is being written
        state.advance(losses(c, images(step)), LR)
    saver.begin(state.step, state.samples_seen, state.tensors(), state.to_json())
    result = saver.wait()
    assert result.checkpoint
    assert result.near is None  # each rank holds the other's part to the byte


def near_of(folder, rank):
    """The folder for copies of the machine of a rank."""
    return f"{folder}/machine-{rank}"


def resume_from_copies(folder, stage, lost, model):
    own, rank = config(folder, stage, model=model), dist.get_rank()
    copies = own.checkpoint.model_copy(update={"near": near_of(folder, "new" if rank == lost else rank)})
    saved = checkpoints.newest(own.root)
    expected = checkpoints.load(saved)
    with mock.patch.object(checkpoints, "read_part", side_effect=AssertionError("read from storage")):
        state = make_state(own.model_copy(update={"checkpoint": copies}))
    assert state.step == STEPS
    assert all(torch.equal(value, expected[name]) for name, value in state.tensors())


@pytest.mark.parametrize(("stage", "lost", "model"), [(0, None, None), (1, 1, None), (3, 0, DENSE)])
def test_a_restart_reads_nothing_from_storage_even_without_a_machine(tmp_path, stage, lost, model):
    run_ranks(save_half_way, 2, tmp_path, stage, model)
    run_ranks(resume_from_copies, 2, tmp_path, stage, lost, model)


def resume_and_compare(folder, stage, exact, model, optimizer):
    c = config(folder, stage, model=model, optimizer=optimizer)
    whole, half = checkpoints.committed(c.root)
    expected = checkpoints.load(whole)
    dist.barrier()  # all have seen it
    if dist.get_rank() == 0:
        Path(whole.url, "manifest.json").unlink()
    dist.barrier()
    with mock.patch.object(checkpoints, "read_part", wraps=checkpoints.read_part) as read:
        state = make_state(c)
    reads: list = [None] * dist.get_world_size()
    dist.all_gather_object(reads, [call.args[1].name for call in read.call_args_list])
    assert sorted(name for of_rank in reads for name in of_rank) == sorted(part.name for part in half.parts)
    assert (state.step, state.updates, state.samples_seen) == (2, 2, 16)
    restored = checkpoints.load(half)
    for name, value in state.tensors():
        assert torch.equal(value, restored.pop(name)), name
    assert not restored
    for step in range(2, STEPS):
        state.advance(losses(c, images(step)), LR)
    assert len(state.orders()) == (0 if model is None else 1)
    for spread, changes in state.orders():  # of the trained weights, whole at any stage
        assert 0 < spread < math.log(4 * (12 + 2))  # of the channels that are put in order
        assert changes > 0
    for name, value in state.tensors():
        if exact:
            assert torch.equal(value, expected[name]), name
        else:  # sums in another order, and Adam's steps are of the size of LR wherever a gradient is nearly zero
            torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=LR / 2)


def find_only_damage(folder):
    c = config(folder)
    for _ in range(2):  # a second try finds the same: nothing was deleted, and no new run begins
        with pytest.raises(checkpoints.DamagedCheckpoint, match="no checkpoint is intact"):
            make_state(c)


def test_when_every_checkpoint_is_damaged_the_run_does_not_silently_begin_anew(tmp_path):
    run_ranks(save_half_way, 2, tmp_path)
    found = checkpoints.committed(config(tmp_path).root)
    for saved in found:
        part = Path(saved.url, saved.parts[0].name)
        part.write_bytes(part.read_bytes()[:-1])
    run_ranks(find_only_damage, 2, tmp_path)
    assert checkpoints.committed(config(tmp_path).root) == found


@pytest.mark.parametrize(
    ("saved_at", "resumed_at", "exact", "model", "optimizer"),  # ZeRO stage and world size
    [
        ((0, 2), (0, 2), True, None, "muon"),
        ((1, 2), (1, 2), True, None, "adamw"),
        ((3, 2), (3, 2), True, DENSE, "adamw"),
        ((1, 2), (0, 1), False, None, "adamw"),
        ((3, 2), (1, 1), False, None, "adamw"),
        ((1, 1), (3, 2), False, None, "adamw"),
    ],
)
def test_a_resumed_state_goes_on_as_the_one_that_was_saved(tmp_path, saved_at, resumed_at, exact, model, optimizer):
    stage, world_size = saved_at
    run_ranks(save_half_way, world_size, tmp_path, stage, model, optimizer)
    stage, world_size = resumed_at
    run_ranks(resume_and_compare, world_size, tmp_path, stage, exact, model, optimizer)


def skip_and_go_back(folder):
    c = config(folder)
    rank = dist.get_rank()

    def bad(module):
        """Finite on every rank but the last."""
        return module(images(0)).log_prob.sum() * (math.nan if rank == dist.get_world_size() - 1 else 1.0)

    state = make_state(c)
    saver = CheckpointWriter(c.root, keep_last=5, keep_every=0, guard=lambda: None)
    _, applied = state.advance(losses(c, images(0)), LR)
    assert applied
    saver.begin(state.step, state.samples_seen, state.tensors(), state.to_json())
    good = {name: value.clone() for name, value in state.tensors()}
    for skipped in (1, 2):
        norm, applied = state.advance([bad, bad], LR)
        assert not applied
        assert not math.isfinite(norm)
        assert (state.step, state.updates, state.skipped, state.skipped_in_row) == (1 + skipped, 1, skipped, skipped)
    assert all(torch.equal(value, good[name]) for name, value in state.tensors())
    saver.begin(state.step, state.samples_seen, state.tensors(), state.to_json())
    assert saver.wait().checkpoint.step == 3

    went_on = make_state(c)
    assert (went_on.step, went_on.updates, went_on.skipped, went_on.skipped_in_row) == (3, 1, 2, 2)
    back = make_state(c, skip_to=5)  # from the checkpoint before the steps that were skipped
    assert (back.step, back.updates, back.skipped, back.skipped_in_row, back.rollbacks) == (5, 1, 4, 0, 1)
    assert (back.score, back.samples_seen) == (None, 40)
    assert all(torch.equal(value, good[name]) for name, value in back.tensors())
    for state in (went_on, back):
        assert state.advance(losses(c, images(7)), LR)[1]
    after = dict(back.tensors())
    assert all(torch.equal(value, after[name]) for name, value in went_on.tensors())


def test_a_step_that_is_not_finite_changes_nothing_and_weights_can_go_back(tmp_path):
    run_ranks(skip_and_go_back, 2, tmp_path)
