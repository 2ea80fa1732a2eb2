"""Fetch remote shards before they are read: which ones are needed soon, and the threads that bring them.

Not for where a shard is kept: that is the business of the reader and its cache.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from eiwtrain.data.manifest import DataError
from eiwtrain.data.order import SampleOrder
from eiwtrain.data.stream import ShardReader
from eiwtrain.storage import StorageError, impatient

_LOOK_EVERY = 5.0  # seconds between two checks that all wanted shards are still on this machine
_THREADS = 4  # simultaneous downloads of one process


class Prefetcher:
    """Fetch the shards that are wanted, each once, in the order of the calls.

    Failures are left to the reader, which meets them when it needs the shard. It can be pickled. Its threads start with
    the first call and never keep a process from exiting.
    """

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader
        self._wanted: SimpleQueue[int] = SimpleQueue()
        self._known: frozenset[int] = frozenset()
        self._threads: list[threading.Thread] = []
        self._looked = -_LOOK_EVERY

    def want(self, shards: Iterable[int]) -> None:
        """Fetch these shards, the first ones first, and forget earlier ones that are not among them."""
        if self.reader.is_local:
            return
        asked, now = list(shards), time.monotonic()
        again = now - self._looked > _LOOK_EVERY  # a fetched shard may have been evicted since
        self._looked = now if again else self._looked
        new = [n for n in asked if (again or n not in self._known) and not self.reader.has(n)]
        self._known = frozenset(asked)
        for number in new:
            self._wanted.put(number)
        while len(self._threads) < min(_THREADS, len(new)):
            self._threads.append(threading.Thread(target=self._work, daemon=True, name="prefetch"))
            self._threads[-1].start()

    def _work(self) -> None:
        while True:
            number = self._wanted.get()
            if number in self._known:
                with suppress(DataError, StorageError), impatient():  # the reader retries for longer
                    self.reader.fetch(number)

    def __reduce__(self) -> tuple[Any, ...]:
        return Prefetcher, (self.reader,)


class Lookahead:
    """The shards that a rank's training stream reads from, now and for about a block of each of its lanes.

    Args:
        reader, order: of the stream.
        global_batch: number of samples of a step, over all ranks.
        rank, world_size: whose share of each step.
    """

    def __init__(self, reader: ShardReader, order: SampleOrder, global_batch: int, rank: int, world_size: int) -> None:
        self.reader, self.order = reader, order
        self.global_batch, self.rank, self.world_size = global_batch, rank, world_size
        self._steps = max(1, order.lanes * order.block // global_batch)  # for which a block of each lane lasts
        self._prefetcher = Prefetcher(reader)
        self._seen = 0  # earlier steps have been looked at
        self._until: dict[int, int] = {}  # by shard, in the order of need: the last of those steps that reads from it

    def at(self, step: int) -> None:
        """Fetch the shards of this step and, where the cache has room, those of the steps after it."""
        if self.reader.is_local or step + self._steps < self._seen:  # another micro-batch of the same step
            return
        for later in range(max(step, self._seen), step + self._steps + 1):
            self._until.update(dict.fromkeys(self.shards(later), later))
        self._seen = max(self._seen, step + self._steps + 1)
        self._until = {shard: last for shard, last in self._until.items() if last >= step}
        wanted = list(self._until)
        while self.node_bytes(wanted) > self.reader.cache.limit and wanted:
            wanted.pop()
        self._prefetcher.want(wanted)

    def shards(self, step: int) -> list[int]:
        """Return the shards that the blocks of the rank's lanes are in at this step."""
        return self.order.shards_near(self.order.rank_positions(step, self.global_batch, self.rank, self.world_size))

    def node_bytes(self, shards: list[int]) -> int:
        """Return the bytes of these shards times the number of ranks of this node."""
        return _ranks_here() * sum(self.reader.split.shards[number].bytes for number in shards)


def short_cache(ahead: Lookahead, step: int) -> str | None:
    """Return a line of warning when the cache cannot hold all shards that are read from at one time; else None."""
    needed, limit = ahead.node_bytes(ahead.shards(step)), ahead.reader.cache.limit
    if ahead.reader.is_local or needed <= limit:
        return None
    return (
        f"data.cache_bytes: {limit:,} bytes are less than the {needed:,} that this node reads from at any one time: "
        "shards will be fetched again and again; raise it, or make new shards that are smaller"
    )


def _ranks_here() -> int:
    """Return the number of ranks of this node, from the variable of Ray Train and torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
