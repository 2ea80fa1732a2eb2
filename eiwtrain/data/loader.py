"""Make batches: the images of a rank's share of a step, with the noise and the augmentation that belong to each sample.

A sample's pixels and noise depend on (seed, epoch, sample index) alone: not on rank, world size or workers.
Not for the order of samples (`order`), for reading shards (`stream`) or for the processes that do it (`processes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, get_worker_info

from eiwtrain import storage
from eiwtrain.config import micro_batches
from eiwtrain.data.augment import vary
from eiwtrain.data.manifest import DataError
from eiwtrain.data.noise import sample_keys, uniform
from eiwtrain.data.order import DEFAULT_BLOCK, DEFAULT_LANES, SampleOrder
from eiwtrain.data.prefetch import Lookahead, Prefetcher, short_cache
from eiwtrain.data.processes import Count, load_items
from eiwtrain.data.stream import ShardReader
from eiwtrain.flow.config import FlowConfig
from eiwtrain.storage import StorageError

_EVAL_SHARDS = 3  # that an evaluation fetches ahead
_TRAIN, _EVAL = 0, 1  # streams of noise that never meet


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
    return _steps(_batches(load_items(shares, Count(start_step * count), workers)), count)


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
    return _batches(load_items(shares, range(micro_batches(total, micro_batch, world_size)), workers))


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


def _batches(items: Iterator[Any]) -> Iterator[Batch]:
    """Yield each item as a batch, count its storage failures, and raise one that is an error."""
    for item in items:
        if isinstance(item, Exception):
            raise item
        images, words, faults = item
        storage.count_faults(faults)
        yield Batch(images.permute(0, 3, 1, 2), *torch.from_numpy(words).unbind())


def _steps(batches: Iterator[Batch], count: int) -> Iterator[list[Batch]]:
    while True:
        yield [next(batches) for _ in range(count)]


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
