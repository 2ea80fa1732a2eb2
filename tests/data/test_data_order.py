"""The sample order: each sample once an epoch, the same samples in a step at any world size, resumable anywhere."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eiwtrain.data.order import SampleOrder, seeded_permutation

orders = st.builds(
    SampleOrder,
    shard_sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
    fingerprint=st.sampled_from(["a", "b"]),
    seed=st.integers(0, 2**63),
    lanes=st.integers(1, 70),
    block=st.integers(1, 50),
)


@settings(max_examples=150, deadline=None)
@given(order=orders, epoch=st.integers(0, 1000))
def test_every_epoch_holds_every_sample_exactly_once(order: SampleOrder, epoch: int) -> None:
    n = order.samples
    epochs, indices = order.at(np.arange(epoch * n, (epoch + 1) * n))
    assert (epochs == epoch).all()
    assert sorted(indices.tolist()) == list(range(n))


@settings(max_examples=150, deadline=None)
@given(order=orders, step=st.integers(0, 500), batch=st.integers(1, 90), world=st.integers(1, 12))
def test_the_samples_of_a_step_are_the_same_at_any_world_size(
    order: SampleOrder, step: int, batch: int, world: int
) -> None:
    shares = [order.rank_positions(step, batch, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(step * batch, (step + 1) * batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@settings(max_examples=60, deadline=None)
@given(
    order=orders,
    batch=st.integers(1, 60),
    stops=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    worlds=st.lists(st.integers(1, 7), min_size=1, max_size=5),
)
def test_interrupted_runs_of_any_world_size_see_what_one_run_sees(
    order: SampleOrder, batch: int, stops: list[int], worlds: list[int]
) -> None:
    seen = []
    step = 0
    for run, steps in enumerate(stops):
        fresh = pickle.loads(pickle.dumps(order))  # another process, with nothing cached
        world = worlds[run % len(worlds)]
        for _ in range(steps):
            shares = [fresh.rank_positions(step, batch, rank, world) for rank in range(world)]
            epochs, indices = fresh.at(np.concatenate(shares))
            seen += sorted(zip(epochs.tolist(), indices.tolist(), strict=True))
            step += 1
    whole = []
    for s in range(step):
        epochs, indices = order.at(np.arange(s * batch, (s + 1) * batch))
        whole += sorted(zip(epochs.tolist(), indices.tolist(), strict=True))
    assert seen == whole


@settings(max_examples=40, deadline=None)
@given(order=orders, positions=st.lists(st.integers(0, 10**6), max_size=30))
def test_positions_together_or_alone_give_the_same_samples(order: SampleOrder, positions: list[int]) -> None:
    epochs, indices = order.at(np.array(positions, np.int64))
    alone = [order.at([p]) for p in positions]
    assert epochs.tolist() == [int(e[0]) for e, _ in alone]
    assert indices.tolist() == [int(i[0]) for _, i in alone]


def test_order_changes_with_epoch_seed_and_fingerprint() -> None:
    n = np.arange(500)
    base = SampleOrder([250, 250], "a", 1, lanes=4, block=32)
    others = [
        base.at(n + 500)[1],
        SampleOrder([250, 250], "a", 2, lanes=4, block=32).at(n)[1],
        SampleOrder([250, 250], "b", 1, lanes=4, block=32).at(n)[1],
    ]
    for other in others:
        assert (base.at(n)[1] == other).mean() < 0.1


def test_a_lane_stays_within_the_shards_of_its_slice() -> None:
    order = SampleOrder([100] * 16, "a", 0, lanes=8, block=1000)
    positions = np.arange(1600)
    shards = order.at(positions)[1] // 100
    for lane in range(8):
        assert len(set(shards[order.lanes_of(positions) == lane])) == 2


def test_a_rank_keeps_its_lanes_if_the_batch_is_a_multiple_of_them() -> None:
    order = SampleOrder([997], "a", 0, lanes=16, block=10)
    for step in range(100):
        share = order.rank_positions(step, 32, 1, 4)
        if step * 32 // 997 == (step * 32 + 31) // 997:  # within one epoch: a new one starts at lane 0
            assert len(set(order.lanes_of(share).tolist())) <= 5


def test_samples_close_in_position_come_from_one_block_a_lane() -> None:
    order = SampleOrder([1000], "a", 3, lanes=2, block=50)
    first = order.at(np.arange(100))[1]  # 50 of each lane: exactly the first block of both
    assert sorted(first.tolist()) == [*range(50), *range(500, 550)]
    assert first.tolist()[::2] != list(range(50))


def test_permutation_is_the_same_forever() -> None:
    # If this changes, running jobs resume into another order.
    assert seeded_permutation(8, "fingerprint", 1, 2).tolist() == [2, 4, 0, 3, 1, 6, 5, 7]


def test_an_order_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        SampleOrder([0, 0], "a", 0)
    with pytest.raises(ValueError, match="negative"):
        SampleOrder([3], "a", 0).at([-1])
