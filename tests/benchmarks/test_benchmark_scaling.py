"""The model of scaling keeps its laws, and deals, counts and paces as the product does; its tables render."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from benchmarks import scaling, scaling_measure
from benchmarks import scaling_model as model
from eiwtrain import data
from eiwtrain.config import Train, batching
from eiwtrain.data.order import SampleOrder
from eiwtrain.driver import costs
from eiwtrain.train import engine, pace
from eiwtrain.train.engine import Engine

NETWORK = model.Network(node=8, inside=240e9, between=40e9, call=8e-6, inside_hop=3e-6, between_hop=14e-6)
CLUSTER = model.Cluster(
    NETWORK,
    flops_per_second=80e12,
    launch_seconds=7e-6,
    connection=85e6,
    decoded=7_600,
    copy=10e9,
    start_seconds=26.0,
)
JOB = model.Job(
    flops=150e9,
    forward_flops=50e9,
    operations=16_000,
    gradient_bytes=267_000_000,
    buckets=2,
    tensors=1_600,
    checkpoint_bytes=1_070_000_000,
    zero_stage=1,
    image_bytes=9_900,
    images=3_000_000,
    global_batch=256,
    micro_batch=32,
    max_steps=300_000,
    eval_every=2_000,
    eval_images=300,
    update_operations=30,
)
law = settings(deadline=None, max_examples=50)
WORKERS = st.integers(1, 300)
BATCHES = st.integers(1, 300)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_one_worker_sends_nothing(zero_stage: int) -> None:
    assert model.communication_seconds(replace(JOB, zero_stage=zero_stage), NETWORK, 1) == 0.0
    assert model.communication_seconds(replace(JOB, zero_stage=zero_stage), NETWORK, 2) > 0.0


@law
@given(st.integers(2, 2_000), st.floats(0, 1e12), st.floats(0, 1e12))
def test_an_all_reduce_takes_longer_with_more_bytes_and_at_most_each_link_twice(
    workers: int, sent: float, more: float
) -> None:
    seconds = model.transfer_seconds(sent, 2, 1, workers, NETWORK)
    latency = model.transfer_seconds(0.0, 2, 1, workers, NETWORK)
    assert seconds <= model.transfer_seconds(sent + more, 2, 1, workers, NETWORK)
    bound = 2 * sent / NETWORK.inside + (2 * sent / NETWORK.between if workers > NETWORK.node else 0.0)
    assert latency <= seconds <= (bound + latency) * (1 + 1e-9)


@law
@given(st.integers(2, 2_000), st.floats(1, 1e12))
def test_without_machines_an_all_reduce_is_a_ring(workers: int, sent: float) -> None:
    flat = model.Network(node=1, inside=math.inf, between=1e9, call=0.0)
    ring = 2 * (workers - 1) / workers * sent / 1e9
    assert model.transfer_seconds(sent, 2, 1, workers, flat) == pytest.approx(ring)


@law
@given(BATCHES, BATCHES, WORKERS)
def test_batches_are_dealt_as_the_worker_deals_them(global_batch: int, micro_batch: int, workers: int) -> None:
    assume(micro_batch <= global_batch and workers <= global_batch)
    train = Train(global_batch=global_batch, micro_batch=micro_batch)
    assert model.batching(global_batch, micro_batch, workers) == batching(train, workers)


@law
@given(BATCHES, BATCHES, WORKERS, st.integers(1, 9))
@example(10, 4, 3, 2)
def test_the_padded_share_is_that_of_the_products_own_batches(
    global_batch: int, micro_batch: int, workers: int, lanes: int
) -> None:
    assume(micro_batch <= global_batch and workers <= global_batch)
    rows, accumulation = batching(Train(global_batch=global_batch, micro_batch=micro_batch), workers)
    order = SampleOrder([500, 77], "f", 0, lanes, 16)
    shares = [len(order.rank_positions(3, global_batch, rank, workers)) for rank in range(workers)]
    assert max(shares) <= rows * accumulation  # none is left over: what is not a sample is padding
    padded = sum(rows * accumulation - share for share in shares)
    share = model.padded_share(global_batch, micro_batch, workers)
    assert share == pytest.approx(padded / (workers * rows * accumulation))


def test_the_weights_of_a_step_leave_out_the_padded_share(tmp_path: Path) -> None:
    from helpers import write_shards

    write_shards(tmp_path / "data", n=40)
    reader = data.ShardReader(str(tmp_path / "data"), data.load_manifest(str(tmp_path / "data")), "train")
    rows, _ = model.batching(10, 2, 3)
    weights = [
        torch.cat([b.weight for b in next(iter(_batches(reader, 10, rows, rank, 3)))]).tolist() for rank in range(3)
    ]
    dealt = np.concatenate(weights)
    assert 1.0 - dealt.mean() == pytest.approx(model.padded_share(10, 2, 3))
    assert model.padded_share(10, 2, 3) == pytest.approx(2 / 12)


def _batches(reader: data.ShardReader, global_batch: int, rows: int, rank: int, world_size: int) -> Any:
    sizes = {"global_batch": global_batch, "micro_batch": rows, "rank": rank, "world_size": world_size}
    return data.train_batches(reader, seed=0, start_step=0, **sizes)


@law
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4))
def test_machines_share_lanes_as_the_sample_order_deals_them(nodes: int, workers_each: int, more: int) -> None:
    lanes, workers = 8, nodes * workers_each
    global_batch = lanes * workers * more  # the case that is claimed to be exact
    order = SampleOrder([4_000], "f", 0, lanes, 16)
    touched = 0
    for node in range(nodes):
        ranks = range(node * workers_each, (node + 1) * workers_each)
        positions = np.concatenate([order.rank_positions(0, global_batch, rank, workers) for rank in ranks])
        touched += len(set(order.lanes_of(positions).tolist()))
    assert model.duplicates(lanes, nodes) == pytest.approx(touched / lanes)


@law
@given(st.integers(1, 2_000), st.integers(1, 40))
def test_a_cache_saves_fetches_and_a_machine_fetches_nothing_twice_into_one_that_holds_all(
    workers: int, epochs: int
) -> None:
    total = JOB.images * JOB.image_bytes
    nodes = NETWORK.nodes(workers)
    without = model.fetched_bytes(replace(JOB, cache_bytes=0.0), workers, epochs, NETWORK)
    some = model.fetched_bytes(replace(JOB, cache_bytes=total / 3), workers, epochs, NETWORK)
    everything = model.fetched_bytes(replace(JOB, cache_bytes=math.inf), workers, epochs, NETWORK)
    assert without == pytest.approx(epochs * total * model.duplicates(JOB.lanes, nodes))
    assert everything <= some * (1 + 1e-9)
    assert some <= without * (1 + 1e-9)
    assert everything <= nodes * total * (1 + 1e-9)
    first = model.fetched_bytes(replace(JOB, cache_bytes=math.inf), workers, 1, NETWORK)
    assert first == pytest.approx(without / epochs)  # nothing is there yet


def test_more_workers_than_images_are_refused_as_the_config_refuses_them() -> None:
    with pytest.raises(ValueError, match="257 workers cannot share"):
        model.step(JOB, CLUSTER, 257)
    assert model.step(JOB, CLUSTER, 256).rows == 1


@law
@given(st.integers(1, 256), st.integers(1, 256))
def test_a_step_is_never_faster_than_its_arithmetic_nor_than_its_launches(workers: int, micro_batch: int) -> None:
    one = model.step(replace(JOB, micro_batch=micro_batch), CLUSTER, workers)
    assert one.seconds >= one.accumulation * JOB.operations * CLUSTER.launch_seconds
    assert one.seconds >= JOB.global_batch / workers * JOB.flops / CLUSTER.flops_per_second
    assert one.images_per_second == pytest.approx(JOB.global_batch / one.seconds)


@law
@given(st.integers(1, 256), st.integers(1, 256), st.sampled_from([g.name for g in costs.GPUS]))
def test_a_step_computes_as_long_as_the_plan_of_the_config_says(workers: int, micro_batch: int, name: str) -> None:
    gpu = next(gpu for gpu in costs.GPUS if gpu.name == name)
    by_mode = dict.fromkeys(costs.COUNTED_MODES, 1)
    plan = costs.Costs(
        parameters=1,
        flops_per_image=dict.fromkeys(costs.COUNTED_MODES, JOB.flops),
        operations=dict.fromkeys(costs.COUNTED_MODES, JOB.operations),
        moved_bytes=by_mode,
        activation_bytes=by_mode,
        fixed_bytes=by_mode,
        workspace_bytes=1,
        checkpoint_bytes=1,
        train=Train(global_batch=JOB.global_batch, micro_batch=micro_batch),
        backprop="stored",
        memory_budget=None,
        update_operations=JOB.update_operations,
    )
    there = replace(CLUSTER, flops_per_second=gpu.flops_per_second * costs.MFU, launch_seconds=costs.LAUNCH)
    job = replace(JOB, micro_batch=micro_batch)
    assert plan.step_seconds(gpu, workers) == pytest.approx(model.step(job, there, workers).compute)


@law
@given(st.floats(10, 1e4), st.floats(0, 100), st.floats(0, 1e3), st.floats(1, 1e7), st.floats(1, 10))
def test_goodput_is_a_share_and_falls_with_the_rate_of_failures(
    interval: float, stall: float, down: float, mtbf: float, longer: float
) -> None:
    share = model.goodput(interval, stall, down, mtbf)
    assert 0.0 <= share <= model.goodput(interval, stall, down, mtbf * longer) * (1 + 1e-9)
    assert share <= interval / (interval + stall) * (1 + 1e-9)  # what is left where nothing fails


@law
@given(st.floats(10, 1e3), st.floats(0, 10), st.floats(0, 100), st.floats(10, 1e4))
def test_goodput_is_that_of_simulated_failures(interval: float, stall: float, down: float, mtbf: float) -> None:
    share = model.goodput(interval, stall, down, mtbf)
    assume(share > 0.05)
    # of one interval: tries until one lasts, each lost one with the restarts that follow it
    p = math.exp(-(interval + stall) / mtbf)
    lost = mtbf - (interval + stall) * p / (1 - p)  # mean time to a failure, if it comes before the end
    restart = mtbf * math.expm1(down / mtbf)  # mean, until one lasts
    wall = interval + stall + (1 / p - 1) * (lost + restart)
    assert share == pytest.approx(interval / wall, rel=1e-6)


@law
@given(st.floats(0.05, 5), st.floats(2_000, 200_000), st.floats(0, 100))
def test_the_interval_of_young_and_daly_loses_least(stall: float, mtbf: float, down: float) -> None:
    interval = pace.young_daly(stall, mtbf, write=0.0)
    assume(pace.SHORTEST < interval < pace.LONGEST)
    best = max(model.goodput(interval * 1.05**k, stall, down, mtbf) for k in range(-60, 61))
    assert model.goodput(interval, stall, down, mtbf) >= 0.999 * best
    assert model.goodput(interval * 3, stall, down, mtbf) < model.goodput(interval, stall, down, mtbf)
    assert model.goodput(interval / 3, stall, down, mtbf) < model.goodput(interval, stall, down, mtbf)


@law
@given(st.sampled_from([8, 64, 1024]), st.floats(600, 1e7), st.floats(1.1, 10))
def test_what_preemptions_leave_are_shares_and_less_at_a_higher_rate(workers: int, mtbf: float, longer: float) -> None:
    job = replace(JOB, global_batch=128 * workers, micro_batch=128)
    often, seldom = model.losses(job, CLUSTER, workers, mtbf), model.losses(job, CLUSTER, workers, mtbf * longer)
    assert 0.0 <= often.goodput <= often.with_notice <= 1.0
    assert often.goodput <= seldom.goodput + 1e-6
    assert often.gives_up <= seldom.gives_up * (1 + 1e-9)
    assert often.mtbf == pytest.approx(mtbf / (workers // 8))


def test_a_run_gives_up_after_as_many_gaps_as_simulated() -> None:
    generator = np.random.default_rng(0)
    window, mtbf, failures = 60.0, 100.0, 3
    found = []
    for _ in range(4_000):
        gaps, row, total = generator.exponential(mtbf, 2_000), 1, 0.0
        total = generator.exponential(mtbf)  # the first failure, whenever it comes
        for gap in gaps:
            total += gap
            row = row + 1 if gap < window else 1
            if row > failures:
                break
        found.append(total)
    assert model.gives_up_seconds(window, mtbf, failures) == pytest.approx(np.mean(found), rel=0.05)
    assert model.gives_up_seconds(0.0, mtbf, failures) == math.inf


def test_the_fit_finds_latency_and_bandwidth_again() -> None:
    network = model.Network(node=1, inside=math.inf, between=1.2e9, call=4e-4)
    sizes = scaling_measure.BYTES
    found = scaling_measure.fit(sizes, [model.transfer_seconds(size, 2, 1, 2, network) for size in sizes])
    assert (found.call, found.between) == (pytest.approx(4e-4), pytest.approx(1.2e9))


def _say_traffic(zero_stage: int, accumulation: int, buckets: int, output: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 1))
    numbers = sum(p.numel() for p in module.parameters())
    engine.MOST_IN_BUCKET = numbers - (buckets - 1) * 100  # all, or what leaves the smaller layer to a second one
    train = Train(global_batch=2 * accumulation, micro_batch=1, zero_stage=zero_stage)
    subject = Engine(module, train, 1, accumulation, 2)
    losses = [lambda m: m(torch.ones(1, 32)).sum()] * accumulation
    subject.step(losses, 1e-3)
    with scaling_measure.Counting() as counting:
        subject.step(losses, 1e-3)
    if torch.distributed.get_rank() == 0:
        found = scaling_measure.traffic(counting.collectives, 4 * numbers)
        Path(output).write_text(json.dumps(found))


@pytest.mark.cluster
@pytest.mark.parametrize(("zero_stage", "accumulation", "buckets"), [(0, 2, 1), (1, 2, 2), (2, 2, 2)])
def test_the_engine_sends_the_gradients_round_as_often_as_the_model_says(
    zero_stage: int, accumulation: int, buckets: int, tmp_path: Path
) -> None:
    run_ranks(_say_traffic, 2, zero_stage, accumulation, buckets, str(tmp_path / "traffic.json"), fresh=True)
    counted = json.loads((tmp_path / "traffic.json").read_text())
    assert counted["passes"] == pytest.approx(model.passes(zero_stage, accumulation), rel=0.02)
    expected = model.calls(zero_stage, accumulation, 4, buckets) - 1  # the loop's own agreement is not the engine's
    assert counted["calls"] == expected


def test_the_plan_renders_with_every_number_of_gpus() -> None:
    planned = scaling.plan(JOB, CLUSTER, 128)
    text = scaling.planned_table(planned)
    rows = [line for line in text.splitlines() if line.startswith("| 1,024 |")]
    assert len(rows) == 2 + 1 + 6  # refused, grown; a checkpoint; two machines at three rates
    assert sum("refused" in row for row in rows) == 1
    assert "| 8 | 256 | 32 |" in text
    assert "131,072" in text
    assert json.loads(json.dumps(planned))["grown"][0]["efficiency"] == 1.0
    tables = [[line.count("|") for line in part.splitlines() if "|" in line] for part in text.split("\n\n")]
    assert all(len(set(counts)) == 1 for counts in tables if counts)


def test_the_measured_table_has_predictions_beside_measurements() -> None:
    counted = {"gradient_bytes": 10**7, "tensors": 50, "passes": 3.0, "calls": 4}
    network = model.Network(node=1, inside=math.inf, between=1e9, call=1e-3)
    rows = []
    for accumulation, alone in ((1, 0.5), (2, 0.9)):
        timed = {"alone": [alone, 9.0], "beside": [1.1 * alone, 9.0], "pair": [1.2 * alone, 9.0]}
        setting = scaling_measure.Setting("large", 1, accumulation)
        rows.append(scaling_measure.row_of(setting, timed, counted, network))
    assert rows[0]["predicted"] == pytest.approx(0.55 + 1.5 * 0.01 + 4e-3)
    measured = {"network": {"call": 1e-3, "bandwidth": 1e9}, "all_reduce": {8: 1e-3}, "rows": rows}
    text = scaling.measured_table(measured)
    assert "| large | 1 | 1 | 3, 4 | 3.00, 4 | 0.500 | 0.550 | 0.019 | 0.569 | 0.600 | 1.05 |" in text
    assert "| weak: share of one worker's speed | large | 0.88 | 0.83 |" in text
    assert "| strong: times one worker's speed | large | 1.58 | 1.50 |" in text


def test_a_config_that_cannot_be_used_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        scaling.main(["--no-measure", "--config", "configs/none.yaml"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --config configs/none.yaml: ")


@pytest.mark.cluster
def test_one_and_two_workers_are_measured_and_written(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "run: {name: tiny}\ndata: {path: d, resolution: 16}\nmodel: {levels: 2, steps: 2, conditioner: {hidden: 8}}\n"
    )
    options = [
        "--quick",
        "--rounds",
        "1",
        "--steps",
        "1",
        "--config",
        str(config),
        "--json",
        str(tmp_path / "said.json"),
    ]
    assert scaling.main(options) == 0
    said = json.loads((tmp_path / "said.json").read_text())
    rows = said["measured"]["rows"]
    assert [(r["zero_stage"], r["accumulation"]) for r in rows] == [(1, 1), (1, 2)]
    for r in rows:
        assert r["passes"]["counted"] == pytest.approx(r["passes"]["model"], rel=0.01)
        assert r["calls"]["counted"] == r["calls"]["model"]
        assert min(r["alone"], r["beside"], r["measured"], r["predicted"]) > 0
    assert said["planned"][0]["config"] == str(config)
