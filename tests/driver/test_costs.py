"""Counted costs, against the same count on tensors with data, and against DeepSpeed's own memory."""

import copy
import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import tiny_config
from ranks import run_ranks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eiwtrain import flow
from eiwtrain.config import Config, Train, batching
from eiwtrain.config.file import load_config
from eiwtrain.data.manifest import Manifest
from eiwtrain.driver import costs, counting
from eiwtrain.flow.memory import bytes_saved
from eiwtrain.train import agreed
from eiwtrain.train.engine import Engine
from eiwtrain.train.objective import MicroBatch
from eiwtrain.train.state import TrainState, flow_config, outline

SMALL = flow.FlowConfig(
    image_shape=(3, 8, 8), levels=2, steps=4, conditioner=flow.ConditionerConfig(hidden=8), conditioner_dtype="bfloat16"
)
KINDS = {
    "plain": SMALL,
    "float32 without shuffle": replace(SMALL, conditioner_dtype="float32", shuffle="none"),
    "spline, classes, sort": replace(SMALL, coupling="spline", classes=3, shuffle="hard"),
    "variational, transformer": replace(
        SMALL,
        dequantization="variational",
        conditioner=flow.ConditionerConfig(kind="transformer", hidden=8, patch=1),
    ),
    "anchors": replace(SMALL, anchor_every=2),
}


def config(**sections) -> Config:
    raw = tiny_config(Path("/x"))
    for section, fields in sections.items():
        raw[section] = raw[section] | fields
    return Config.model_validate(raw)


def one_step(shape: flow.FlowConfig, images: int) -> tuple[flow.EIWFlow, torch.Tensor, torch.Tensor]:
    model = flow.EIWFlow(shape)
    return model, torch.zeros(images, *shape.image_shape, dtype=torch.uint8), torch.rand(images, *shape.image_shape)


@pytest.mark.parametrize(
    ("kind", "mode"), [("plain", mode) for mode in costs.COUNTED_MODES] + [(kind, "invertible") for kind in KINDS][1:]
)
def test_the_count_equals_that_of_a_real_step(kind, mode):
    shape = replace(KINDS[kind], backprop=mode)
    assert counting.of_all_steps(shape, 2) == counting.count(shape, 2, fake=False)


def test_what_is_kept_is_what_the_flow_s_own_count_finds():
    found = costs.of(config(train={"micro_batch": 3}))
    for images in (2, 5):
        for mode in costs.COUNTED_MODES:
            shape = replace(flow_config(config(model={"backprop": mode}), 3))
            model, pixels, noise = one_step(shape, images)
            own = [*model.parameters(), *model.buffers()]
            kept, _ = bytes_saved(lambda m=model, p=pixels, n=noise: m(p, n).log_prob.sum(), own)
            assert found.kept_bytes(mode, images) == kept, (mode, images)


def test_flops_are_those_of_torch_s_counter():
    found = costs.of(config(train={"micro_batch": 4}))
    model, pixels, noise = one_step(flow_config(config(model={"backprop": "stored"}), 3), 4)
    counter = FlopCounterMode(display=False)
    with counter:
        model(pixels, noise).log_prob.sum().backward()
    assert found.flops_per_image["stored"] * 4 == counter.get_total_flops()
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_attention_counts_as_its_products_whatever_kernel_computes_it():
    q, k, v = (torch.rand(2, 1, 64, 16, requires_grad=True) for _ in range(3))
    counted = {}
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with counting.Started() as started, sdpa_kernel(kernel):
            F.scaled_dot_product_attention(q, k, v).sum().backward()
        counted[kernel] = started.flops
    products = 2 * 2 * 64 * 64 * 16  # FLOPs of one, for both samples
    assert counted[SDPBackend.MATH] == 6 * products
    assert counted[SDPBackend.FLASH_ATTENTION] == 7 * products  # going back, it computes the scores again


def test_recomputing_costs_a_third_more_and_saves_memory():
    found = costs.of(config(model={"conditioner": {"hidden": 32}, "steps": 16}))
    stored, inverted = (found.flops_per_image[mode] for mode in ("stored", "invertible"))
    assert 1.3 < inverted / stored < 1.36
    each = found.activation_bytes
    assert each["invertible"] < each["checkpointed"] < each["stored"] / 5
    assert found.fixed_bytes["invertible"] == 0 < found.fixed_bytes["stored"]
    deeper = costs.of(config(model={"conditioner": {"hidden": 32}, "steps": 32}))
    assert deeper.activation_bytes["invertible"] == found.activation_bytes["invertible"]
    assert deeper.workspace_bytes == found.workspace_bytes


GLOW_ON_LSUN = flow.FlowConfig(
    (3, 64, 64),
    levels=3,
    steps=48,
    conditioner=flow.ConditionerConfig(hidden=512),
    conditioner_dtype="bfloat16",
    shuffle="soft",
)


def test_what_is_moved_is_read_and_written_but_not_multiplied():
    x, weight = torch.ones(4, 8), torch.ones(8, 8)
    with counting.Started() as started:
        y = (x @ weight) + x[:1].expand(4, 8)
        y.view(-1).sum()
    assert started.moved == (4 * 8 + 8 + 4 * 8) * 4 + (4 * 8 + 1) * 4
    assert started.flops == 2 * 4 * 8 * 8


def test_a_deep_glow_starts_few_operations_and_selective_costs_little_of_either():
    found = {mode: counting.of_all_steps(replace(GLOW_ON_LSUN, backprop=mode), 2) for mode in costs.COUNTED_MODES}
    assert found["stored"].operations <= 6_150
    assert found["selective"].operations <= 7_950
    assert found["invertible"].operations <= 8_200
    assert found["selective"].flops < 1.035 * found["stored"].flops
    assert found["stored"].moved < found["selective"].moved == found["invertible"].moved < 1.6 * found["stored"].moved
    three = {
        mode: counting.of_all_steps(replace(GLOW_ON_LSUN, backprop=mode), 3, backward=False)
        for mode in costs.COUNTED_MODES
    }
    each = {mode: three[mode].kept - found[mode].kept for mode in found}
    assert each["selective"] < 0.25 * each["stored"]


def a_checkpoint_has_the_bytes_that_the_state_gives(folder):
    c = config(run={"storage": folder})
    data = Manifest("noise", 8, 3, {"name": "none", "version": 1, "params": {}}, {}, fingerprint="f" * 64)
    images = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8)
    first = (images, torch.rand(images.shape), None)
    state = TrainState(c, data, torch.device("cpu"), (4, 2), first=lambda: first, note=print)
    assert costs.of(c).checkpoint_bytes == sum(t.nbytes for _, t in state.tensors())


@pytest.mark.cluster
def test_a_checkpoint_has_the_bytes_that_the_state_gives(tmp_path):
    run_ranks(a_checkpoint_has_the_bytes_that_the_state_gives, 1, str(tmp_path))


def a_step_starts_the_operations_that_are_counted(folder):
    images = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8)
    inputs = (images, torch.rand(images.shape), None)
    data = Manifest("noise", 8, 3, {"name": "none", "version": 1, "params": {}}, {}, fingerprint="f" * 64)
    fields = {"micro_batch": 2, "global_batch": 8, "clip": 1e-6, "precision": "fp32"}  # always clipped
    for stage in range(4):
        for optimizer in ("adamw",) if stage else ("adamw", "adamax"):
            c = config(run={"storage": folder}, train=fields | {"zero_stage": stage, "optimizer": optimizer})
            _, accumulation = batching(c.train, 2)
            state = TrainState(c, data, torch.device("cpu"), (2, accumulation), first=lambda: inputs, note=print)
            batches = [MicroBatch(torch.ones(2), c, images[:2], inputs[1][:2]) for _ in range(accumulation)]
            losses = [batch.loss for batch in batches]
            state.advance(losses, 1e-3)  # the optimizer makes its moments
            with counting.Started() as started:
                state.advance(losses, 1e-3, lambda b=batches: agreed.pack(b, [0.0] * 6, dist.get_rank()))
            found = costs.of(c)
            planned = accumulation * found.operations[found.mode] + found.update_operations
            # beside the flow the loss has the penalty, whose gradients are then no zeros that have to be made
            assert started.operations == pytest.approx(planned, rel=0.1 if stage else 0.01), (stage, optimizer)


@pytest.mark.cluster
def test_a_step_starts_the_operations_that_are_counted(tmp_path):
    run_ranks(a_step_starts_the_operations_that_are_counted, 2, str(tmp_path))


@pytest.mark.parametrize("optimizer", ["adamw", "adamax"])
def test_what_a_step_starts_outside_the_flow_does_not_grow_with_the_parameters(optimizer):
    few, many = (config(model={"steps": steps}, train={"zero_stage": 0, "optimizer": optimizer}) for steps in (1, 32))
    counted = counting.count_around(few, outline(few, 3))
    assert counted == counting.count_around(many, outline(many, 3))
    assert sum(counted) < 60


def test_the_update_of_the_flow_for_lsun_starts_at_most_200_operations():
    lsun = load_config("configs/lsun.yaml")
    model = outline(lsun, 3)
    assert len(list(model.parameters())) > 1600
    assert sum(counting.count_around(lsun, model)) <= 200


@pytest.mark.parametrize(("budget", "mode"), [(0, "invertible"), (10**9, "stored"), (None, "stored")])
def test_auto_is_planned_as_what_its_budget_makes_of_it(budget, mode):
    assert costs.of(config(model={"backprop": "auto", "memory_budget": budget})).mode == mode


def test_step_time_is_by_flops_or_by_operations():
    found = costs.of(config(model={"backprop": "checkpointed"}, train={"global_batch": 12, "micro_batch": 4}))
    slow = costs.Gpu("slow", 1e8, 80e9)
    fast = replace(slow, flops_per_second=1e18)
    an_image, a_start = found.flops_per_image["checkpointed"] / (1e8 * costs.MFU), costs.LAUNCH
    for workers, rows, accumulation in ((1, 4, 3), (2, 3, 2), (3, 4, 1), (5, 3, 1), (6, 2, 1), (12, 1, 1)):
        update = found.update_operations * a_start
        assert found.step_seconds(slow, workers) == pytest.approx(accumulation * rows * an_image + update)
        started = accumulation * found.operations["checkpointed"] * a_start
        assert found.step_seconds(fast, workers) == pytest.approx(started + update)


def test_auto_is_settled_on_each_gpu_by_itself():
    found = costs.of(config(model={"backprop": "auto"}))
    assert found.mode_in(80e9) == "stored"
    assert found.mode_in(1e5) == "invertible"
    small = costs.Gpu("small", 1e12, found.worker_bytes("stored", 1) / (1 - costs.FREE))
    kept = replace(found, backprop="stored")
    assert kept.fits(replace(small, bytes=1.01 * small.bytes), 1)
    less = replace(small, bytes=0.99 * small.bytes)
    assert not kept.fits(less, 1)
    assert found.fits(less, 1)  # it can invert
    assert not found.fits(replace(small, bytes=found.worker_bytes("invertible", 1)), 1)


def live_bytes() -> int:
    """Return the bytes of all tensors that exist."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter):
            for t in (found, found.grad):
                if t is not None:
                    storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())


def held_by_deepspeed(some: costs.Costs) -> None:
    shape = replace(SMALL, conditioner=flow.ConditionerConfig(hidden=128), backprop="invertible")
    world = dist.get_world_size()
    for stage in (0, 1, 2, 3):
        before = live_bytes()
        model = flow.EIWFlow(shape)
        parameters = sum(p.numel() for p in model.parameters())
        averaged = copy.deepcopy(model).requires_grad_(False)
        engine = Engine(model, Train(zero_stage=stage), 2, 1, world)
        x = torch.rand(2, 3, 8, 8) - 0.5
        seen = []
        for _ in range(2):
            inner = engine._engine.optimizer if stage == 0 else engine._engine.optimizer.optimizer
            hook = inner.register_step_pre_hook(lambda *_, b=before, s=seen: s.append(live_bytes() - b))
            engine.step([lambda module, x=x: -module(x).log_prob.sum()], 1e-3)
            hook.remove()
        state = replace(some, parameters=parameters, train=Train(zero_stage=stage)).state(world)
        expected = sum(state.values())
        if stage in (1, 2):  # by then the buffer is gone, and of gradients the own share is left
            expected -= state["reduction buffer"] + state["gradients"] - 4 * parameters // world
        assert seen[-1] == pytest.approx(expected, rel=0.02), (stage, world)
        del model, averaged, engine, inner


@pytest.mark.cluster
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_state_of_a_worker_is_what_deepspeed_holds_in_an_update(world_size):
    run_ranks(held_by_deepspeed, world_size, costs.of(config()), fresh=True)
