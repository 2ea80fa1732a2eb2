"""Prefetching: shards are fetched before they are read, each once, within the bound of the cache."""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eiwtrain.data import ShardReader, eval_batches, load_manifest, train_batches
from eiwtrain.data import cache as cache_module
from eiwtrain.data.order import SampleOrder
from eiwtrain.data.prefetch import Lookahead

STREAM: dict[str, Any] = {"seed": 0, "start_step": 0, "global_batch": 4, "micro_batch": 4, "lanes": 2, "block": 8}


@pytest.fixture
def remote() -> Iterator[str]:
    """An empty folder of fsspec's memory file system, which is remote to everything but this process."""
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The number of fetches of each file."""
    counts: Counter[str] = Counter()
    get_file, lock = cache_module.storage.get_file, threading.Lock()

    def counting(url: str, local: Path) -> None:
        with lock:
            counts[url.rsplit("/", 1)[-1]] += 1
        get_file(url, local)

    monkeypatch.setattr(cache_module.storage, "get_file", counting)
    return counts


def _reader(url: str, split: str, cache: Path, **options: Any) -> ShardReader:
    return ShardReader(url, load_manifest(url), split, cache, **options)


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    lanes=st.integers(1, 5),
    block=st.integers(1, 9),
    position=st.integers(0, 300),
)
def test_shards_near_a_position_are_those_of_its_block(sizes: list[int], lanes: int, block: int, position: int) -> None:
    order = SampleOrder(sizes, "f", 0, lanes, block)
    samples = sum(sizes)
    epoch, local = divmod(position, samples)
    lane, turn = local % lanes, local // lanes
    of_block = [
        epoch * samples + t * lanes + lane
        for t in range(turn // block * block, (turn // block + 1) * block)
        if t * lanes + lane < samples
    ]
    _, indices = order.at(of_block)
    ends = np.cumsum(sizes)
    assert sorted(order.shards_near([position])) == sorted(set(np.searchsorted(ends, indices, side="right").tolist()))


def test_every_shard_of_the_steps_ahead_is_requested(
    remote: str, tmp_path: Path, new_data_set: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_data_set(remote, {"train": [20, 0, 13, 17]})
    reader = _reader(remote, "train", tmp_path)
    order = SampleOrder(reader.shard_sizes, reader.manifest.fingerprint, 0, 4, 4)
    for rank in range(3):
        ahead = Lookahead(reader, order, 8, rank, 3)
        asked: list[set[int]] = []
        monkeypatch.setattr(ahead._prefetcher, "want", lambda shards, asked=asked: asked.append(set(shards)))
        for step in (0, 1, 2, 4, 5, 9, 20, 21):  # each of several workers sees only some of the steps
            ahead.at(step)
            for later in range(step, step + 4 * 4 // 8 + 1):
                _, indices = order.at(order.rank_positions(later, 8, rank, 3))
                assert set(reader.place(indices)[0].tolist()) <= asked[-1]


def test_shards_of_the_next_block_arrive_before_they_are_read(
    remote: str, tmp_path: Path, new_data_set: Any, fetched: Counter[str]
) -> None:
    new_data_set(remote, {"train": [8] * 6})
    reader = _reader(remote, "train", tmp_path)
    order = SampleOrder(reader.shard_sizes, reader.manifest.fingerprint, 0, 2, 8)
    ahead = Lookahead(reader, order, 4, 0, 1)
    coming = set(ahead.shards(4)) - set(ahead.shards(0))
    assert coming
    stream = train_batches(reader, **STREAM)
    next(stream)
    _until(lambda: all(reader.has(number) for number in coming))
    assert not any(number in reader._open for number in coming)  # they are on this machine, and nothing has read them
    for _ in itertools.islice(stream, 11):  # the epoch
        pass
    assert len([name for name in fetched if name.endswith(".tar")]) == 6
    assert set(fetched.values()) == {1}


def test_an_evaluation_fetches_ahead_too(remote: str, tmp_path: Path, new_data_set: Any, fetched: Counter[str]) -> None:
    new_data_set(remote, {"test": [5] * 6})
    reader = _reader(remote, "test", tmp_path)
    batches = eval_batches(reader, images=22, seed=0, micro_batch=4)
    next(batches)
    _until(lambda: all(reader.has(number) for number in (1, 2, 3)))
    assert not reader.has(4)
    assert sum(1 for _ in batches) == 5
    _until(lambda: reader.has(4))
    assert not reader.has(5)  # no image of it is read
    assert set(fetched.values()) == {1}


def test_prefetching_stays_within_the_cache_and_warns_of_a_small_one(
    remote: str, tmp_path: Path, new_data_set: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = new_data_set(remote, {"train": [8] * 6})
    size = manifest.splits["train"].shards[0].bytes
    order = SampleOrder([8] * 6, manifest.fingerprint, 0, 2, 8)

    def asked(limit: float, ranks: int = 1) -> tuple[set[int], list[str]]:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        reader = _reader(remote, "train", tmp_path, cache_bytes=int(limit * size))
        ahead, warnings = Lookahead(reader, order, 4, 0, 1), list[str]()
        wanted: list[int] = []
        monkeypatch.setattr(ahead._prefetcher, "want", wanted.extend)
        ahead.at(0)
        next(train_batches(reader, **STREAM, warn=warnings.append))
        return set(wanted), warnings

    now = set(Lookahead(_reader(remote, "train", tmp_path), order, 4, 0, 1).shards(0))
    everything, warnings = asked(100)
    assert everything > now
    assert warnings == []
    assert asked(len(now) + 0.5) == (now, [])
    assert asked(2 * len(now) + 0.5, ranks=2) == (now, [])  # another rank of this node reads as much
    wanted, warnings = asked(len(now) - 0.5)
    assert wanted < now
    assert len(warnings) == 1
    assert "data.cache_bytes" in warnings[0]


def test_a_failed_prefetch_is_left_to_the_reader(remote: str, tmp_path: Path, new_data_set: Any) -> None:
    new_data_set(remote, {"train": [8] * 6})
    reader = _reader(remote, "train", tmp_path)
    fsspec.filesystem("memory").rm(f"{remote}/train-000003.tar")
    with pytest.raises(ValueError, match=r"train-000003\.tar is missing from memory://"):
        for _ in itertools.islice(train_batches(reader, **STREAM), 12):
            pass
