"""Batches: every sample counts exactly once, and is the same on replay, at any world size, with any workers."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eiwtrain import storage
from eiwtrain.data import (
    Batch,
    ShardReader,
    eval_batches,
    first_batch,
    flow_inputs,
    labels_for,
    load_manifest,
    new_faults,
    train_batches,
)
from eiwtrain.data.manifest import DataError, load_sidecar
from eiwtrain.flow import FlowConfig

Sample = tuple[int, int, bytes, bytes]


def _reader(data_set: Path, split: str, cache: Path) -> ShardReader:
    return ShardReader(str(data_set), load_manifest(str(data_set)), split, cache)


def _train(reader: ShardReader, steps: int, **options: Any) -> list[list[Batch]]:
    given = {"seed": 5, "start_step": 0, "global_batch": 12, "micro_batch": 4, "lanes": 4, "block": 8} | options
    return list(itertools.islice(train_batches(reader, **given), steps))


def _samples(batches: list[Batch]) -> Counter[tuple[int, bytes, bytes]]:
    """Return the rows of weight 1, as (index, image, noise)."""
    return Counter(
        (int(b.indices[i]), b.images[i].numpy().tobytes(), b.noise()[i].numpy().tobytes())
        for b in batches
        for i in range(len(b.weight))
        if b.weight[i] == 1
    )


def _equal(a: list[list[Batch]], b: list[list[Batch]]) -> bool:
    pairs = zip(itertools.chain(*a), itertools.chain(*b), strict=True)
    return all(torch.equal(x, y) for p, q in pairs for x, y in zip(p[:4], q[:4], strict=True))


def test_a_batch_has_the_documented_shapes_and_types(data_set: Path, tmp_path: Path, image_of: Any) -> None:
    batch = _train(_reader(data_set, "train", tmp_path), 1)[0][0]
    tensors = (*batch[:4], batch.weight, batch.noise())
    assert [(t.dtype, tuple(t.shape)) for t in tensors] == [
        (torch.uint8, (4, 3, 8, 8)),
        (torch.int64, (4,)),
        (torch.int64, (4,)),
        (torch.int64, (4,)),
        (torch.float32, (4,)),
        (torch.float32, (4, 3, 8, 8)),
    ]
    for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
        assert np.array_equal(image.numpy(), image_of("train", index).transpose(2, 0, 1))


@pytest.mark.parametrize(("global_batch", "micro_batch"), [(12, 4), (7, 3), (50, 16), (64, 64), (1, 2)])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 9])
def test_a_step_is_the_same_at_any_world_size_without_its_padding(
    data_set: Path, tmp_path: Path, global_batch: int, micro_batch: int, world: int
) -> None:
    reader = _reader(data_set, "train", tmp_path)
    options = {"global_batch": global_batch, "micro_batch": micro_batch, "augment": "eta"}
    alone = _train(reader, 3, **options)
    ranks = [_train(reader, 3, rank=r, world_size=world, **options) for r in range(world)]
    for step in range(3):
        parts = [ranks[r][step] for r in range(world)]
        assert {len(p) for p in parts} == {-(-global_batch // (world * micro_batch))}
        batches = list(itertools.chain(*parts))
        assert all(len(t) == micro_batch for b in batches for t in (*b[:4], b.noise()))
        assert sum(float(b.weight.sum()) for b in batches) == global_batch
        assert all(bool(((b.indices == -1) == (b.weight == 0)).all()) for b in batches)
        assert _samples(batches) == _samples(alone[step])


def test_a_resumed_stream_continues_the_same(data_set: Path, tmp_path: Path) -> None:
    reader = _reader(data_set, "train", tmp_path)
    whole = _train(reader, 14, augment="eta")
    for start in (1, 4, 9):  # steps 4 and 8 straddle two epochs: 50 samples, 12 a step
        assert _equal(whole[start:], _train(reader, 14 - start, start_step=start, augment="eta"))


def test_each_epoch_has_each_sample_once_with_new_noise(data_set: Path, tmp_path: Path) -> None:
    steps = _train(_reader(data_set, "train", tmp_path), 20, global_batch=10, micro_batch=10)
    indices = torch.cat([b.indices for s in steps for b in s]).reshape(4, 50)
    assert all(sorted(epoch.tolist()) == list(range(50)) for epoch in indices)
    noises = {(b.noise()[i].numpy().tobytes()) for s in steps for b in s for i in range(10)}
    assert len(noises) == 200


def test_workers_change_nothing(data_set: Path, tmp_path: Path) -> None:
    reader = _reader(data_set, "train", tmp_path)
    options = {"augment": "eta", "rank": 1, "world_size": 2}
    state = torch.get_rng_state()
    assert _equal(_train(reader, 9, **options), _train(reader, 9, workers=2, **options))
    assert torch.equal(state, torch.get_rng_state())  # starting them does not use the global generator


def test_noise_is_uniform_and_flips_are_half(data_set: Path, tmp_path: Path, image_of: Any) -> None:
    steps = _train(_reader(data_set, "train", tmp_path), 100, global_batch=10, micro_batch=10, augment="flip")
    noise = torch.cat([b.noise() for s in steps for b in s])
    assert float(noise.min()) >= 0
    assert float(noise.max()) < 1
    histogram = torch.histc(noise, 16, 0, 1) / noise.numel()
    assert float((histogram - 1 / 16).abs().max()) < 0.003  # 192,000 draws: five standard deviations
    flipped = []
    for batch in itertools.chain(*steps):
        for image, index in zip(batch.images.numpy(), batch.indices.tolist(), strict=True):
            true = image_of("train", index).transpose(2, 0, 1)
            flipped.append(np.array_equal(image, true[:, :, ::-1]))
            assert flipped[-1] or np.array_equal(image, true)
    assert 0.42 < np.mean(flipped) < 0.58  # 1,000 tosses: five standard deviations


def test_another_seed_gives_other_noise_and_order(data_set: Path, tmp_path: Path) -> None:
    reader = _reader(data_set, "train", tmp_path)
    a, b = (_train(reader, 1, seed=s, global_batch=50, micro_batch=50)[0][0] for s in (1, 2))
    assert not torch.equal(a.indices, b.indices)
    rows = a.indices.argsort(), b.indices.argsort()
    assert not torch.equal(a.noise()[rows[0]], b.noise()[rows[1]])


@pytest.mark.parametrize("world", [1, 2, 3, 7, 30])
@pytest.mark.parametrize(("images", "expected"), [(1000, 23), (10, 10), (1, 1)])
def test_evaluation_sees_each_image_once_in_as_many_batches_a_rank(
    data_set: Path, tmp_path: Path, world: int, images: int, expected: int
) -> None:
    reader = _reader(data_set, "test", tmp_path)
    ranks = [
        list(eval_batches(reader, images=images, seed=3, micro_batch=4, rank=r, world_size=world)) for r in range(world)
    ]
    assert len({len(r) for r in ranks}) == 1
    seen = _samples(list(itertools.chain(*ranks)))
    assert sorted(index for index, _, _ in seen.elements()) == list(range(expected))
    assert seen == _samples(list(eval_batches(reader, images=images, seed=3, micro_batch=4)))


def test_evaluation_noise_is_not_that_of_training(data_set: Path, tmp_path: Path) -> None:
    reader = _reader(data_set, "train", tmp_path)
    train = _samples(_train(reader, 1, global_batch=50, micro_batch=50)[0])
    evaluation = _samples(list(eval_batches(reader, images=50, seed=5, micro_batch=50)))
    assert {s[:2] for s in train} == {s[:2] for s in evaluation}
    assert not {s[2] for s in train} & {s[2] for s in evaluation}


def test_the_first_batch_is_of_the_first_samples(data_set: Path, tmp_path: Path, image_of: Any) -> None:
    batch = first_batch(_reader(data_set, "test", tmp_path), 3, seed=0)
    assert batch.indices.tolist() == [0, 1, 2]
    for n, image in enumerate(batch.images.numpy()):
        assert np.array_equal(image, image_of("test", n).transpose(2, 0, 1))
    assert first_batch(_reader(data_set, "test", tmp_path), 99, seed=0).weight.tolist() == [1.0] * 23


def test_each_draw_has_noise_of_its_own(data_set: Path, tmp_path: Path) -> None:
    reader = _reader(data_set, "test", tmp_path)
    draws = [next(eval_batches(reader, images=4, seed=0, micro_batch=4, draw=draw)) for draw in (0, 1, 1)]
    assert torch.equal(draws[0].images, draws[1].images)
    assert not torch.equal(draws[0].noise(), draws[1].noise())
    assert torch.equal(draws[1].noise(), draws[2].noise())


def test_a_flow_gets_noise_of_the_shape_it_takes(data_set: Path, tmp_path: Path, monkeypatch: Any) -> None:
    batch = first_batch(_reader(data_set, "train", tmp_path), 5, seed=0)
    config, cpu = FlowConfig((3, 8, 8)), torch.device("cpu")
    images, noise, _ = flow_inputs(batch, config, cpu)
    assert torch.equal(noise, batch.noise())
    monkeypatch.setattr(FlowConfig, "noise_shape", (300,))
    _, more, _ = flow_inputs(batch, config, cpu)
    assert more.shape == (5, 300)
    assert torch.equal(
        more[:, : images[0].numel()].reshape(images.shape), noise
    )  # its first numbers are those of the pixels
    later = Batch(*(t[2:] for t in batch))
    assert torch.equal(flow_inputs(later, config, cpu)[1], more[2:])


def test_labels_are_those_of_the_sidecars(data_set: Path, tmp_path: Path) -> None:
    reader = _reader(data_set, "train", tmp_path)
    shards = reader.split.shards
    expected = [label for shard in shards for label in load_sidecar(str(data_set), shard.name).labels]
    assert len(set(expected)) > 1
    assert reader.read_into(np.empty((50, 8, 8, 3), np.uint8), np.arange(50)).tolist() == expected
    (step,) = _train(reader, 1, global_batch=7, micro_batch=7)
    for batch in step:
        assert batch.labels.tolist() == [expected[i] for i in batch.indices]


def test_only_models_with_classes_get_labels(data_set: Path, tmp_path: Path) -> None:
    batch = first_batch(_reader(data_set, "train", tmp_path), 3, seed=0)
    assert labels_for(batch, 0) is None
    nameless = batch._replace(labels=torch.tensor([0, -1, 1]))
    assert labels_for(nameless, 0) is None
    with pytest.raises(DataError, match="sample 1 has no class"):
        labels_for(nameless, 2)


class Faulty(ShardReader):
    """A reader that survives two storage failures in each micro-batch."""

    def read_into(self, *args: Any) -> Any:
        storage.count_faults(2)
        return super().read_into(*args)


@pytest.mark.parametrize("workers", [0, 2])
def test_survived_storage_failures_are_counted_once(data_set: Path, tmp_path: Path, workers: int) -> None:
    reader = Faulty(str(data_set), load_manifest(str(data_set)), "train", tmp_path)
    new_faults()
    assert len(_train(reader, 2, global_batch=8, micro_batch=4, workers=workers)) == 2
    assert (new_faults(), new_faults()) == (8, 0)
    assert len(list(eval_batches(reader, images=8, seed=0, micro_batch=4, workers=workers))) == 2
    storage.count_faults(3)  # of the process itself, outside of any batch
    assert (new_faults(), new_faults()) == (7, 0)


class Stuck(ShardReader):
    """A reader that waits for storage that never answers."""

    def read_into(self, *args: Any) -> Any:
        time.sleep(600)


def test_workers_that_wait_for_storage_are_stopped(data_set: Path, tmp_path: Path) -> None:
    reader = Stuck(str(data_set), load_manifest(str(data_set)), "train", tmp_path)
    others = multiprocessing.active_children()  # of tests before this one
    batches = train_batches(reader, seed=0, start_step=0, global_batch=4, micro_batch=4, workers=2)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(workers) == 2
    began = time.monotonic()
    del batches
    for worker in workers:
        worker.join(30)
        assert not worker.is_alive()
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_is_one_line_also_from_a_worker(data_set: Path, tmp_path: Path, workers: int) -> None:
    copy = shutil.copytree(data_set, tmp_path / "copy")
    (copy / "train-000002.tar").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        _train(_reader(copy, "train", tmp_path / "cache"), 5, workers=workers)
    assert str(caught.value).startswith("shard train-000002.tar is damaged")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"global_batch": 0}, {"micro_batch": 0}, {"rank": 1}, {"world_size": 0}, {"start_step": -1}]
)
def test_sizes_out_of_range_are_refused_at_once(data_set: Path, tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1|out of range"):
        train_batches(
            _reader(data_set, "train", tmp_path),
            **({"seed": 0, "start_step": 0, "global_batch": 4, "micro_batch": 2} | wrong),
        )


STARTS = """
import multiprocessing, signal, sys, time
from eiwtrain.data import ShardReader, load_manifest, train_batches

def start():
    global batches
    reader = ShardReader(sys.argv[1], load_manifest(sys.argv[1]), "train", sys.argv[2])
    batches = train_batches(reader, seed=0, start_step=0, global_batch=4, micro_batch=4, workers=2)
    print("starting", flush=True)
    next(batches)
    print("started", *(p.pid for p in multiprocessing.active_children()), flush=True)
"""
STOPPED = """
if __name__ == "__main__":
    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.append(1))
    start()
    while not stopped:
        time.sleep(0.05)
    print(sum(len(next(batches)) for _ in range(40)), "steps after the stop", flush=True)
"""
ERROR = """
if __name__ == "__main__":
    start()
    kept = batches
    raise SystemExit("an error elsewhere, with the stream still open")
"""
SLOW_FEEDERS = """
import atexit, threading, time
import multiprocessing.queues, multiprocessing.resource_tracker, multiprocessing.synchronize, multiprocessing.util

def feed(*args, feed=multiprocessing.queues.Queue._feed):
    feed(*args)
    time.sleep(0.1)  # so that this thread is the last to hold the queue's semaphores

def cleanup(name, unlink=multiprocessing.synchronize.sem_unlink):
    unlink(name)
    if threading.current_thread() is not threading.main_thread():
        time.sleep(0.5)  # and the interpreter could end meanwhile
    multiprocessing.resource_tracker.unregister(name, "semaphore")

multiprocessing.queues.Queue._feed = staticmethod(feed)
multiprocessing.synchronize.SemLock._cleanup = staticmethod(cleanup)
atexit.register(time.sleep, 0.3)  # between the end of the stream and that of multiprocessing
"""
WAITING = """
if __name__ == "__main__":
    start()
    time.sleep(600)
"""


def _start(script: str, data_set: Path, tmp_path: Path, before: str = "") -> subprocess.Popen[str]:
    path = tmp_path / "script.py"
    path.write_text(before + STARTS + script)
    return subprocess.Popen(
        [sys.executable, str(path), str(data_set), str(tmp_path / "cache")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _wait_for(process: subprocess.Popen[str], word: str) -> list[int]:
    """Return the numbers after `word` in the line that starts with it."""
    assert process.stdout is not None
    for line in process.stdout:
        first, *rest = line.split()
        if first == word:
            return [int(n) for n in rest]
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize(
    ("moment", "number"), [("starting", signal.SIGINT), ("starting", signal.SIGTERM), ("started", signal.SIGINT)]
)
def test_a_stop_signal_to_the_whole_group_spares_the_workers(
    data_set: Path, tmp_path: Path, moment: str, number: signal.Signals
) -> None:
    process = _start(STOPPED, data_set, tmp_path)
    _wait_for(process, moment)
    if moment == "starting":
        time.sleep(1.0)  # the workers are importing
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "40 steps after the stop" in out
    assert err == ""


@pytest.mark.parametrize("before", ["", SLOW_FEEDERS], ids=["plain", "slow"])
def test_a_program_exits_though_its_stream_is_open(data_set: Path, tmp_path: Path, before: str) -> None:
    process = _start(ERROR, data_set, tmp_path, before)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == "an error elsewhere, with the stream still open\n"


def test_workers_of_a_killed_trainer_exit(data_set: Path, tmp_path: Path) -> None:
    process = _start(WAITING, data_set, tmp_path)
    workers = _wait_for(process, "started")
    assert len(workers) == 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30  # one of them may still be importing torch
    while alive := [pid for pid in workers if _alive(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.2)


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
