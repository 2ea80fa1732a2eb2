"""Make batches: the images of a rank's share of a step, with the noise and the augmentation that belong to each sample.

A sample's pixels and noise depend on (seed, epoch, sample index) alone: not on rank, world size or workers.
Not for the order of samples (`order`) or for reading shards (`stream`).
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from eiwtrain import storage
from eiwtrain.config import micro_batches
from eiwtrain.data.augment import vary
from eiwtrain.data.manifest import DataError
from eiwtrain.data.noise import sample_keys, uniform
from eiwtrain.data.order import DEFAULT_BLOCK, DEFAULT_LANES, SampleOrder
from eiwtrain.data.prefetch import Lookahead, Prefetcher, short_cache
from eiwtrain.data.stream import ShardReader
from eiwtrain.flow.config import FlowConfig
from eiwtrain.storage import StorageError

_PREFETCH = 4  # micro-batches that each loader worker makes ahead
_EVAL_SHARDS = 3  # that an evaluation fetches ahead
_TRAIN, _EVAL = 0, 1  # streams of noise that never meet
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


# A batch as a worker sends it: images, (n, H, W, C); keys, indices and labels in one small array, since every tensor
# costs a file descriptor; the number of storage failures that the worker has survived since the batch before.
_Made = tuple[torch.Tensor, npt.NDArray[np.int64], int]


class Batch(NamedTuple):
    """A micro-batch of exactly n rows, some of which may be padding.

    Attributes:
        images: uint8 (n, C, H, W); in memory as (n, H, W, C).
        keys: int64 (n,): the key of each sample's noise.
        indices: int64 (n,): sample index within the split, -1 for padding.
        labels: int64 (n,): classes, -1 for an image without one.
    """

    images: torch.Tensor
    keys: torch.Tensor
    indices: torch.Tensor
    labels: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """The weight of each row, float32 (n,): 1 for a sample, 0 for padding. A step sums to the global batch."""
        return (self.indices >= 0).float()

    def noise(self, device: torch.device | None = None, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Make the noise of the samples on the device: float32 (n, *shape) in [0, 1).

        Args:
            shape: of one sample's numbers, a flow's `noise_shape`; None: the image's, (C, H, W). In memory order the
                numbers are the same for all shapes: a longer one has more of them at its end.
        """
        keys = self.keys.to(device, non_blocking=True)
        return uniform(keys, tuple(self.images.shape[1:]) if shape is None else shape)


def train_batches(
    reader: ShardReader,
    *,
    seed: int,
    start_step: int,
    global_batch: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    augment: str = "none",
    lanes: int = DEFAULT_LANES,
    block: int = DEFAULT_BLOCK,
    warn: Callable[[str], None] | None = None,
) -> Iterator[list[Batch]]:
    """Yield the training stream from step `start_step` on, forever: each item is the share of `rank` in one step.

    A step is a list of `micro_batches(...)` micro-batches of exactly `micro_batch` rows. The samples of a step
    are the same set at any world size and any number of workers; each sample comes once an epoch.

    Args:
        reader: the split to train on.
        seed: of the order, the noise and the augmentation.
        start_step: the position is `start_step * global_batch` samples.
        workers: number of processes that read and decode ahead; 0 does it in this one. They ignore SIGINT and SIGTERM.
        augment: how images vary, anew each epoch: none, flip or eta (`data.augment`).
        lanes, block: see `SampleOrder`; other values give another order.
        warn: called with a line when the cache of remote shards is too small to work.

    Raises:
        ValueError: a size below 1, or a rank outside the world.
        DataError: a shard is missing or damaged.
        StorageError: storage cannot be reached.
    """
    _check_sizes(global_batch=global_batch, micro_batch=micro_batch, world_size=world_size)
    if not 0 <= rank < world_size or start_step < 0 or workers < 0:
        raise ValueError(f"rank {rank} of {world_size}, start_step {start_step}, workers {workers}: out of range")
    order = SampleOrder(reader.shard_sizes, reader.manifest.fingerprint, seed, lanes, block)
    ahead = Lookahead(reader, order, global_batch, rank, world_size)
    if warn is not None and (short := short_cache(ahead, start_step)):
        warn(short)
    shares = _TrainShares(reader, ahead, seed, global_batch, micro_batch, rank, world_size, augment)
    count = micro_batches(global_batch, micro_batch, world_size)
    return _steps(_load(shares, _Numbers(start_step * count), workers), count)


def eval_batches(
    reader: ShardReader,
    *,
    images: int,
    seed: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    draw: int = 0,
) -> Iterator[Batch]:
    """Yield the first `images` samples of the split, or all where it has fewer, strided over ranks.

    Every rank yields the same number of batches of exactly `micro_batch` rows. Noise depends on (seed, draw, index)
    alone, so two evaluations differ by the model only. Raises as `train_batches`.
    """
    _check_sizes(images=images, micro_batch=micro_batch, world_size=world_size)
    if not 0 <= rank < world_size or workers < 0:
        raise ValueError(f"rank {rank} of {world_size}, workers {workers}: out of range")
    total = min(images, len(reader))
    shares = _EvalShares(reader, total, seed, draw, micro_batch, rank, world_size)
    return _load(shares, range(micro_batches(total, micro_batch, world_size)), workers)


def first_batch(reader: ShardReader, n: int, seed: int) -> Batch:
    """Return the first `n` samples of the split, or all where it has fewer, with the noise of `eval_batches`."""
    return next(eval_batches(reader, images=n, seed=seed, micro_batch=min(n, len(reader))))


def redraw(batch: Batch, seed: int, draw: int) -> Batch:
    """Return a batch of `eval_batches` with the noise of another draw, its images not read again."""
    indices = batch.indices.numpy()
    keys = sample_keys(seed, _EVAL, np.full_like(indices, draw), indices)
    return batch._replace(keys=torch.from_numpy(keys.view(np.int64)))


def flow_inputs(
    batch: Batch, config: FlowConfig, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return a batch's pixels, noise and labels on a device, as a flow of this config takes them. Raises as
    `labels_for`."""
    labels = labels_for(batch, config.classes)
    noise = batch.noise(device, config.noise_shape)
    images = batch.images.to(device, non_blocking=True).contiguous()  # or the host waits until the last step is done
    return images, noise, labels if labels is None else labels.to(device, non_blocking=True)


def labels_for(batch: Batch, classes: int) -> torch.Tensor | None:
    """Return the labels of a batch for a model of `classes` classes; None for a model without classes.

    Raises:
        DataError: the model has classes and an image has none.
    """
    if not classes:
        return None
    if (nameless := batch.labels < 0).any():
        raise DataError(f"sample {int(batch.indices[nameless].max())} has no class, and the model has {classes}")
    return batch.labels


class _TrainShares(Dataset[Any]):
    """The micro-batches of one rank in training, by number; numbers count over steps."""

    def __init__(
        self,
        reader: ShardReader,
        ahead: Lookahead,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        augment: str,
    ) -> None:
        self.reader, self.ahead, self.order, self.seed, self.augment = reader, ahead, ahead.order, seed, augment
        self.global_batch, self.micro_batch, self.rank, self.world_size = (
            global_batch,
            micro_batch,
            rank,
            world_size,
        )

    def __getitem__(self, number: int) -> _Made | Exception:
        step, micro = divmod(number, micro_batches(self.global_batch, self.micro_batch, self.world_size))
        self.ahead.at(step)
        share = self.order.rank_positions(step, self.global_batch, self.rank, self.world_size)
        own = share[micro * self.micro_batch : (micro + 1) * self.micro_batch]
        spare = share[:1] if len(share) else self.order.batch_positions(step, self.global_batch)[:1]
        epochs, indices = self.order.at(own if len(own) else spare)
        return _caught(self.reader, indices, epochs, len(own), self.micro_batch, self.seed, _TRAIN, self.augment)


class _EvalShares(Dataset[Any]):
    """The micro-batches of one rank's stride through the first `total` samples, by number."""

    def __init__(
        self, reader: ShardReader, total: int, seed: int, draw: int, micro_batch: int, rank: int, world_size: int
    ) -> None:
        self.reader, self.total, self.seed, self.draw = reader, total, seed, draw
        self.prefetcher = Prefetcher(reader)
        self.micro_batch, self.rank, self.world_size = micro_batch, rank, world_size

    def __getitem__(self, number: int) -> _Made | Exception:
        share = np.arange(self.rank, self.total, self.world_size)
        own = share[number * self.micro_batch :][: self.micro_batch]
        indices = own if len(own) else np.zeros(1, np.int64)
        (first, last), _ = self.reader.place(np.array([indices[0], self.total - 1]))
        self.prefetcher.want(range(first, min(first + _EVAL_SHARDS, last) + 1))
        return _caught(
            self.reader, indices, np.full_like(indices, self.draw), len(own), self.micro_batch, self.seed, _EVAL, "none"
        )


def _caught(reader: ShardReader, *args: Any) -> _Made | Exception:
    """Return the batch, or the error as a value: raised in a worker, its one line would be buried in a traceback."""
    try:
        return _make_batch(reader, *args)
    except (DataError, StorageError) as e:
        return e


def _make_batch(
    reader: ShardReader,
    indices: npt.NDArray[np.int64],
    epochs: npt.NDArray[np.int64],
    real: int,
    rows: int,
    seed: int,
    stream: int,
    augment: str,
) -> _Made:
    """Read the samples and pad them up to `rows` with copies of the first one; the first `real` rows count."""
    channels, height, width = reader.image_shape
    images = torch.empty((rows, height, width, channels), dtype=torch.uint8)
    if get_worker_info() is not None:
        images.share_memory_()  # images must be in shared memory; else they would be copied to it
    pixels, n = images.numpy(), len(indices)
    words = np.empty((3, rows), np.int64)
    keys = sample_keys(seed, stream, epochs, indices)
    words[0, :n], words[1, :n] = keys.view(np.int64), indices
    words[2, :n] = reader.read_into(pixels[:n], indices)
    vary(pixels[:n], keys, augment)
    for padded in (pixels, words.T):
        padded[n:] = padded[0]
    words[1, real:] = -1
    return images, words, 0 if get_worker_info() is None else new_faults()


_faults_reported = 0


def new_faults() -> int:
    """Return the number of storage failures that this process and its loader workers survived since the last call."""
    global _faults_reported
    reported, _faults_reported = _faults_reported, storage.faults()
    return _faults_reported - reported


class _Numbers:
    """The numbers start, start + 1, ... forever, as a sampler for DataLoader."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def _load(dataset: Dataset[Any], numbers: Any, workers: int) -> Iterator[Batch]:
    """Yield the micro-batches of these numbers, in order, made by this process or by worker processes.

    Threads would need less code, but they share the interpreter lock with the trainer: in nine alternating rounds on
    two busy cores, two threads read at 0.7 to 1.1 times the rate of two processes, and the trainer's own small tensor
    operations took 1.1 to 2.0 times as long.
    """
    if workers == 0:
        return _raising(dataset[number] for number in numbers)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        sampler=numbers,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=_PREFETCH,
        multiprocessing_context="spawn",  # remote file systems and threads do not survive a fork
        worker_init_fn=_init_worker,
        generator=torch.Generator(),  # or starting workers would advance torch's global generator
    )
    threads = set(threading.enumerate())
    held: list[Any] = [_start_workers(loader)]  # the only reference: workers stop when it is cleared
    feeders = set(threading.enumerate()) - threads
    processes = list(held[0]._workers)
    batches = _raising(_drain(held))
    # Also at exit, before multiprocessing would send SIGTERM, which they ignore, and wait for them forever.
    weakref.finalize(batches, _stop_workers, held, feeders, processes)
    return batches


def _stop_workers(held: list[Any], feeders: set[threading.Thread], processes: list[Any]) -> None:
    """Stop the workers, then the threads that feed their queues.

    If the interpreter exits while such a thread releases a semaphore, multiprocessing warns of a leak.
    """
    held.clear()
    for process in processes:
        if process.is_alive():  # it may wait for storage for minutes, and ignores SIGTERM
            process.kill()
    for feeder in feeders:
        feeder.join(timeout=5)


def _drain(held: list[Iterator[Any]]) -> Iterator[Any]:
    while held:
        try:
            item = next(held[0])
        except StopIteration:
            held.clear()
            return
        if isinstance(item, Exception):
            held.clear()
        yield item


def _raising(items: Iterator[Any]) -> Iterator[Batch]:
    for item in items:
        if isinstance(item, Exception):
            raise item
        images, words, faults = item
        storage.count_faults(faults)
        yield Batch(images.permute(0, 3, 1, 2), *torch.from_numpy(words).unbind())


def _steps(batches: Iterator[Batch], count: int) -> Iterator[list[Batch]]:
    while True:
        yield [next(batches) for _ in range(count)]


def _start_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the workers with the stop signals blocked, which they inherit.

    A Ctrl-C reaches the whole process group: it must not kill a worker that is still importing and has not reached
    `_init_worker`. In this process, a signal that arrives meanwhile is delivered right after.
    """
    resource_tracker.ensure_running()  # started by the first worker, it would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(worker: int) -> None:
    """Make a loader worker ignore stop signals: the trainer writes a checkpoint first and then stops its workers.

    A worker exits without finalizing the interpreter, as forked ones do. Finalizing can stop the thread that sends
    batches inside C++, which aborts the process, and DataLoader then raises in the trainer.
    """
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    atexit.register(os._exit, 0)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the trainer is gone. DataLoader's own check misses one that was killed before the worker started."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _as_it_is(item: Any) -> Any:
    return item


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
