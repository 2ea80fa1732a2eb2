"""Define the order in which samples are seen: a pure function from position to sample, without files or saved state.

The position counts the samples seen since the start of training, over all epochs. It is all that a checkpoint keeps
of the data stream. Epoch e covers the positions e*N .. e*N + N - 1 of a split of N samples, each sample once.

Within an epoch the shards are laid end to end in a shuffled order and cut into `lanes` consecutive slices of
near-equal length. Positions cycle through the lanes (position q of the epoch is in lane q mod lanes), and inside a
lane samples are shuffled within blocks of `block` samples. So samples that are close in position are in few shards,
and a rank that gets the same lanes at every step reads each of its shards once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

DEFAULT_LANES = 64  # up to this many nodes can each read shards of their own
DEFAULT_BLOCK = 1024  # about one shard; lanes * block samples are mixed at any time
_KEPT_EPOCHS = 4  # shard permutations kept; a batch straddles two epochs


class SampleOrder:
    """The endless, shuffled order of a split.

    Args:
        shard_sizes: number of samples of each shard, in manifest order; zeros are allowed.
        fingerprint: of the data set.
        seed: another seed gives another order.
        lanes: number of slices of an epoch that are read side by side; independent of the number of ranks.
        block: number of samples inside a lane that are shuffled among each other.

    Raises:
        ValueError: there are no samples, or lanes or block is below 1.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        fingerprint: str,
        seed: int,
        lanes: int = DEFAULT_LANES,
        block: int = DEFAULT_BLOCK,
    ) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.samples = int(self._sizes.sum())
        if self.samples < 1 or (self._sizes < 0).any():
            raise ValueError("an order needs at least one sample")
        if lanes < 1 or block < 1:
            raise ValueError(f"lanes and block must be at least 1, not {lanes} and {block}")
        self.fingerprint, self.seed, self.lanes, self.block = fingerprint, seed, lanes, block
        self._starts = np.cumsum(self._sizes) - self._sizes  # first sample of each shard
        lane = np.arange(lanes, dtype=np.int64)
        self._lane_lengths = self.samples // lanes + (lane < self.samples % lanes)
        self._lane_starts = np.cumsum(self._lane_lengths) - self._lane_lengths
        self._shards_of = lru_cache(_KEPT_EPOCHS)(self._shuffle_shards)
        self._block_of = lru_cache(4 * lanes)(self._shuffle_block)
        self._shards_under = lru_cache(4 * lanes)(self._find_shards)

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleOrder, (self._sizes.tolist(), self.fingerprint, self.seed, self.lanes, self.block)

    def at(self, positions: npt.ArrayLike) -> tuple[Ints, Ints]:
        """Return the epochs and the sample indices within the split of the positions, in the shape of `positions`."""
        epochs, local = self._locate(positions)
        shape, epochs, local = epochs.shape, epochs.reshape(-1), local.reshape(-1)
        lanes, turns = local % self.lanes, local // self.lanes
        blocks, inside = np.divmod(turns, self.block)
        slots = self._lane_starts[lanes] + turns - inside  # where the block starts in the epoch's concatenation
        groups, members = np.unique(np.stack([epochs, lanes, blocks]), axis=1, return_inverse=True)
        members = members.reshape(-1)
        by_group = np.argsort(members, kind="stable")
        bounds = np.searchsorted(members[by_group], np.arange(groups.shape[1] + 1))
        for g, (epoch, lane, block) in enumerate(groups.T.tolist()):
            rows = by_group[bounds[g] : bounds[g + 1]]
            slots[rows] += self._block_of(epoch, lane, block)[inside[rows]]
        indices = np.empty_like(slots)
        for epoch in np.unique(epochs).tolist():
            rows = np.flatnonzero(epochs == epoch)
            _, ends, shift = self._shards_of(epoch)
            indices[rows] = slots[rows] + shift[np.searchsorted(ends, slots[rows], side="right")]
        return epochs.reshape(shape), indices.reshape(shape)

    def shards_near(self, positions: npt.ArrayLike) -> list[int]:
        """Return the shards, each once, that the blocks of these positions are in.

        As long as the lanes of a stream stay in these blocks, it reads from no other shards.
        """
        epochs, local = self._locate(np.reshape(positions, -1))
        lanes, blocks = local % self.lanes, local // self.lanes // self.block
        found: dict[int, None] = {}
        for epoch, block, lane in np.unique(np.stack([epochs, blocks, lanes]), axis=1).T.tolist():
            found.update(dict.fromkeys(self._shards_under(epoch, lane, block)))
        return list(found)

    def lanes_of(self, positions: npt.ArrayLike) -> Ints:
        """Return the lane of each position."""
        return np.asarray(self._locate(positions)[1] % self.lanes)

    def batch_positions(self, step: int, global_batch: int) -> Ints:
        """Return the positions of a step, sorted stably by lane; their set is the same at any world size."""
        positions = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
        return positions[np.argsort(self.lanes_of(positions), kind="stable")]

    def rank_positions(self, step: int, global_batch: int, rank: int, world_size: int) -> Ints:
        """Return the share of `rank` in the positions of a step: a contiguous chunk, lane by lane.

        The chunks of all ranks together are the batch; their lengths differ by at most one.
        """
        start, stop = (global_batch * r // world_size for r in (rank, rank + 1))
        return self.batch_positions(step, global_batch)[start:stop]

    def _locate(self, positions: npt.ArrayLike) -> tuple[Ints, Ints]:
        positions = np.asarray(positions, dtype=np.int64)
        if (positions < 0).any():
            raise ValueError("a position cannot be negative")
        return np.divmod(positions, self.samples)

    def _shuffle_shards(self, epoch: int) -> tuple[Ints, Ints, Ints]:
        """Return the epoch's order of shards; for each, its end in the concatenation, and sample index minus slot."""
        order = seeded_permutation(len(self._sizes), self.fingerprint, self.seed, epoch)
        ends = np.cumsum(self._sizes[order])
        return order, ends, self._starts[order] - (ends - self._sizes[order])

    def _find_shards(self, epoch: int, lane: int, block: int) -> list[int]:
        """Return the shards that the block is in."""
        start = int(self._lane_starts[lane]) + block * self.block
        stop = min(start + self.block, int(self._lane_starts[lane] + self._lane_lengths[lane]))
        order, ends, _ = self._shards_of(epoch)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        return [shard for shard in order[first : last + 1].tolist() if self._sizes[shard]]

    def _shuffle_block(self, epoch: int, lane: int, block: int) -> Ints:
        length = min(self.block, int(self._lane_lengths[lane]) - block * self.block)
        return seeded_permutation(length, self.fingerprint, self.seed, epoch, lane, block)


def seeded_permutation(n: int, *key: str | int) -> Ints:
    """Return a permutation of range(n) that depends on `key` alone.

    It sorts the raw words of a Philox generator: NumPy keeps these the same in every version, unlike
    `Generator.permutation`.
    """
    seed = hashlib.sha256(repr(key).encode()).digest()[:16]
    words = np.random.Philox(key=np.frombuffer(seed, "<u8")).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)
