"""How fast each rank is by itself, and which one the others wait for.

In data-parallel training a step takes equally long on all ranks: a fast one waits in the sum of gradients. So a rank's
own time is what it waits for its data, and what it then computes until that sum begins. Once a minute rank 0 gathers
these. Not for how fast training is (`eiwtrain.train.report`).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median_low
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from eiwtrain.tracking.curves import NODE_COMPUTE, NODE_DATA, RANK_COMPUTE, RANK_DATA

_SECONDS = 60.0  # between two comparisons
_SLOW = 1.5  # times the median
_PATIENCE = 600.0  # seconds of slow steps after which a rank is named


class Own(NamedTuple):
    """A rank's own time of a step, seconds; or its mean over steps."""

    data: float
    compute: float
    """NaN where waiting for others is a part of it."""


class Stopwatch:
    """Measures what a rank computes. On a GPU it has the device take the time, and never waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._events: Any = None
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._begun, self._seconds = 0.0, math.nan

    def begin(self) -> None:
        """Start the watch when the device has done what it was given so far."""
        self._begun, self._seconds = time.perf_counter(), math.nan
        if self._events is not None:
            self._events[0].record()

    def end(self) -> None:
        """Stop the watch when the device has done what it was given by now."""
        self._seconds = time.perf_counter() - self._begun
        if self._events is not None:
            self._events[1].record()

    def seconds(self) -> float:
        """Return the seconds from start to stop; NaN if it was not stopped.

        Call it once the host has read a result that the device computed later.
        """
        if self._events is None or math.isnan(self._seconds):
            return self._seconds
        return float(self._events[0].elapsed_time(self._events[1])) / 1000


class Watch:
    """Finds ranks that stay slow."""

    def __init__(self) -> None:
        self._slow: dict[int, float] = {}  # for how many seconds, by rank
        self._named: set[int] = set()

    def look(self, own: Sequence[float], seconds: float) -> list[int]:
        """Return the ranks that have been slow for long enough, each once.

        Args:
            own: each rank's own time of a step, over steps that took `seconds` together since the last look.
        """
        median = median_low(own)  # of two ranks the faster: the slower one cannot be 1.5 times their mean so easily
        for rank, mine in enumerate(own):
            self._slow[rank] = self._slow.get(rank, 0.0) + seconds if mine >= _SLOW * median > 0 else 0.0
        found = [rank for rank, slow in self._slow.items() if slow >= _PATIENCE and rank not in self._named]
        self._named.update(found)
        return found


class Speeds:
    """One rank's share in the comparison of all ranks."""

    def __init__(self, ranks: Sequence[tuple[str, str]], say: Callable[[str], None]) -> None:
        """
        Args:
            ranks: each rank's node, and its host's name.
            say: prints a line for the user; used on rank 0.
        """
        self._rank, self._say = dist.get_rank(), say
        nodes = list(dict.fromkeys(node for node, _ in ranks))
        hosts = dict(ranks)
        shared = Counter(hosts.values())
        names = {node: host if shared[host] == 1 else f"{host}/{node[:8]}" for node, host in hosts.items()}
        self.nodes = [names[node] for node in nodes]
        """A name of each node, in the order of their first ranks."""
        self._node_of = [nodes.index(node) for node, _ in ranks]
        self._watch = Watch()
        self._begin()

    def _begin(self) -> None:
        """Start a new count."""
        self._steps = 0
        self._data = self._compute = self._worked = 0.0
        self._next = time.monotonic() + _SECONDS

    def add(self, data: float, compute: float, worked: float) -> None:
        """Count a step that took `worked` seconds without its wait for data."""
        self._steps += 1
        self._data += data
        self._compute += compute
        self._worked += data + worked

    def due(self) -> bool:
        """Return whether the ranks should be compared now; False on all ranks but 0, and where it is alone."""
        return self._rank == 0 and len(self._node_of) > 1 and time.monotonic() >= self._next

    def compare(self) -> dict[str, float]:
        """Gather each rank's mean time since the last comparison; print them and return the points of their curves.
        Collective; ranks other than 0 print nothing and return no points."""
        mean, worked = Own(self._data / self._steps, self._compute / self._steps), self._worked
        self._begin()
        gathered: list[Any] | None = [None] * len(self._node_of) if self._rank == 0 else None
        dist.gather_object(mean, gathered, dst=0)
        if gathered is None:
            return {}
        points = self._print(gathered)
        self._name_slow(gathered, worked)
        return points

    def _print(self, ranks: list[Own]) -> dict[str, float]:
        """Print the fastest, median and slowest rank; return the points of their curves and of their nodes'."""
        points: dict[str, float] = {}
        lines = []
        for what, pattern, of_node in (("compute", RANK_COMPUTE, NODE_COMPUTE), ("data", RANK_DATA, NODE_DATA)):
            values = [getattr(own, what) for own in ranks]
            if any(math.isnan(value) for value in values):
                continue
            order = sorted(range(len(values)), key=values.__getitem__)
            middle = order[(len(order) - 1) // 2]
            shown = {"fastest": order[0], "median": middle, "slowest": order[-1]}
            points |= {pattern.format(rank=name): values[rank] for name, rank in shown.items()}
            if len(self.nodes) > 1:
                for node in range(len(self.nodes)):
                    points[of_node.format(node=node)] = max(
                        value for rank, value in enumerate(values) if self._node_of[rank] == node
                    )
            said = (f"{name} {values[rank]:.3f} ({self._name(rank)})" for name, rank in shown.items())
            lines.append(f"{what} {', '.join(said)}")
        self._say("seconds a step by rank: " + "; ".join(lines))
        return points

    def _name_slow(self, ranks: list[Own], worked: float) -> None:
        """Print a line for each rank that has been slow for long enough; `worked` is as for `Watch.look`."""
        both = [own.data + own.compute for own in ranks]
        if any(map(math.isnan, both)):
            return
        for rank in self._watch.look(both, worked):
            self._say(
                f"{self._name(rank)} has been {both[rank] / median_low(both):.1f} times slower than the median "
                f"rank for {_PATIENCE / 60:.0f} minutes, and all ranks wait for it: {ranks[rank].compute:.3f} s a "
                f"step of computing, {ranks[rank].data:.3f} s of waiting for data"
            )

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.nodes[self._node_of[rank]]}"
