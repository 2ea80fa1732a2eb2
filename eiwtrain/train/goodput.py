"""Goodput: the share of a run's wall time, over all attempts, spent in steps that count; the shares of all losses; and
what all of it costs. Not for the speed of those steps: that is `eiwtrain.train.report`.

The wall time of a run is the sum over its drivers: time between two drivers, when nothing runs, does not count. Each
second is counted once.

The cost of a run is the sum over its attempts of what their workers cost, from when the driver asks for them until
they have ended. So it follows their number and their kinds, and waiting for room costs nothing. What was paid stays so
if the prices change. The driver counts it (`Lease.cost`), also for attempts that leave no checkpoint; a clock divides
it by kind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from eiwtrain.terminal.console import duration, money
from eiwtrain.tracking.curves import COST, COST_AT_END, COST_WASTED, GOODPUT, LOST_TIME

Kind = Literal["productive", "startup", "data_wait", "checkpoint", "evaluation", "lost"]
"""Uses of time. productive: steps that led to the present weights, without their wait for data, which is data_wait.
startup: each attempt up to its first step. checkpoint: training waited for checkpoints. lost: the work of attempts
after the checkpoint from which the next attempt resumed, and the end of attempts."""
KINDS: tuple[Kind, ...] = get_args(Kind)

LOSSES = {
    "startup": "start-up",
    "data_wait": "waiting for data",
    "checkpoint": "checkpoints",
    "evaluation": "evaluation",
    "lost": "lost work",
    "other": "other",
}
"""The words for each kind of time that is not productive."""
WASTED: tuple[Kind, ...] = ("startup", "data_wait", "checkpoint", "lost")
"""Uses of time whose cost is wasted: by preemptions and crashes, each of which also costs a start-up, and by waits."""


class Clock:
    """Times of a run in seconds, by kind, as kept by one of its attempts."""

    def __init__(
        self,
        began: float,
        earlier: float,
        attempt_began: float,
        spent: float = 0.0,
        hired: float | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Create the clock of an attempt; one that resumes from a checkpoint calls `resume` next.

        Args:
            began: Unix time at which this attempt's driver started.
            earlier: wall time of earlier drivers.
            attempt_began: Unix time at which this attempt began: `began`, or the end of the attempt before, if it had
                the same driver.
            spent: what all attempts before this one have cost.
            hired: Unix time from which this attempt's workers cost money; None: `attempt_began`.
            now: returns the Unix time.
        """
        self._now = now
        self._seconds: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
        self._training = False
        self._wall_before = earlier + attempt_began - began
        self._attempt_began = attempt_began
        self._seconds["lost"] = self._wall_before
        self._spent_before = self._wall_before
        self._hired = attempt_began if hired is None else hired
        self._rate = 0.0
        self._cost_before = spent
        self._costs: dict[Kind, float] = dict.fromkeys(KINDS, 0.0) | {"lost": spent}

    def resume(self, saved: dict[str, Any]) -> None:
        """Continue from the `to_json` of the checkpoint from which the attempt resumes. Call it first."""
        # a driver that was killed may have recorded less of its time than its last checkpoint
        self._wall_before = max(self._wall_before, saved["wall"])
        self._seconds = {kind: saved["seconds"][kind] for kind in KINDS}
        self._seconds["lost"] += self._wall_before - saved["wall"]
        self._spent_before = self._spent()
        paid: float = saved.get("cost", 0.0)  # there was a time before costs were counted
        self._cost_before = max(self._cost_before, paid)
        self._costs = {kind: saved.get("costs", {}).get(kind, 0.0) for kind in KINDS}
        self._costs["lost"] += self._cost_before - paid

    def training(self) -> None:
        """Mark the first step: the time of this attempt until now that was not spent otherwise was its start-up."""
        if not self._training:
            self._training = True
            elapsed = self._now() - self._attempt_began
            startup = max(0.0, elapsed - (self._spent() - self._spent_before))
            self.spend("startup", startup, free=self._hired - self._attempt_began)

    def pay(self, per_hour: float) -> None:
        """Set what the workers of this attempt cost together. Call it before any time is counted."""
        self._rate = per_hour / 3600

    def spend(self, kind: Kind, seconds: float, free: float = 0.0) -> None:
        """Count time that has just passed and is counted nowhere else; for `free` seconds of it nobody was paid."""
        self._seconds[kind] += seconds
        self._costs[kind] += self._rate * max(0.0, seconds - max(0.0, free))

    @contextmanager
    def spending(self, kind: Kind) -> Iterator[None]:
        """Count the time of the block, except for time that is counted inside it."""
        began, spent = self._now(), self._spent()
        try:
            yield
        finally:
            self.spend(kind, max(0.0, self._now() - began - (self._spent() - spent)))

    def seconds(self, kind: Kind) -> float:
        """Return the wall time of this kind over all attempts, seconds."""
        return self._seconds[kind]

    @property
    def wall(self) -> float:
        """Wall time of the run so far, seconds."""
        # the clocks of two machines may differ a little, and a clock may be set back
        return max(self._wall_before + self._now() - self._attempt_began, self._spent())

    @property
    def cost(self) -> float:
        """What the run has cost so far."""
        return max(self._cost_before + self._rate * max(0.0, self._now() - self._hired), sum(self._costs.values()))

    def cost_of(self, kind: Kind) -> float:
        """Return what time of this kind has cost."""
        return self._costs[kind]

    @property
    def wasted(self) -> float:
        """What preemptions, crashes and waits have cost so far."""
        return sum(self._costs[kind] for kind in WASTED)

    def cost_after(self, seconds: float) -> float:
        """Return what the run will have cost after this many more seconds on these workers."""
        return self.cost + self._rate * seconds

    @property
    def goodput(self) -> float:
        """Productive share of the wall time, 0..1."""
        return self.shares()["productive"]

    def shares(self) -> dict[str, float]:
        """Return the share of each kind in the wall time, 0..1, with the sum 1.

        "other" is everything else: the start of an attempt that is not training yet, and the final export.
        """
        wall = max(self.wall, 1e-9)
        return {kind: s / wall for kind, s in self._seconds.items()} | {"other": 1.0 - self._spent() / wall}

    def to_json(self) -> dict[str, Any]:
        """Return the present state, for a checkpoint."""
        return {"wall": self.wall, "seconds": dict(self._seconds), "cost": self.cost, "costs": dict(self._costs)}

    def _spent(self) -> float:
        return sum(self._seconds.values())


def describe(clock: Clock) -> str:
    """Return goodput and losses as one line, largest loss first: `83% of 2:10:00; start-up 12%, checkpoints 0.3%`."""
    shares = clock.shares()
    losses = sorted(((shares[kind], name) for kind, name in LOSSES.items() if shares[kind] >= 0.001), reverse=True)
    words = [f"{name} {share:.1%}" if share < 0.1 else f"{name} {share:.0%}" for share, name in losses]
    return f"{shares['productive']:.0%} of {duration(clock.wall)}" + ("; " if words else "") + ", ".join(words)


def describe_cost(clock: Clock) -> str:
    """Return the cost and what of it was wasted as one line, most first: `12.30; wasted 1.20 (10%): start-up 1.20`."""
    parts = sorted(((clock.cost_of(kind), LOSSES[kind]) for kind in WASTED), reverse=True)
    shown = [f"{name} {money(cost)}" for cost, name in parts if cost >= 0.001 * clock.cost and cost > 0]
    line = f"{money(clock.cost)}; wasted {money(clock.wasted)} ({clock.wasted / max(clock.cost, 1e-9):.0%})"
    return line + (": " if shown else "") + ", ".join(shown)


def cost_curves(clock: Clock, eta: float) -> dict[str, float]:
    """Return what the run has cost, will have cost in `eta` seconds at its last step, and has wasted."""
    return {COST: clock.cost, COST_AT_END: clock.cost_after(eta), COST_WASTED: clock.wasted}


def curves(clock: Clock) -> dict[str, float]:
    """Return goodput, and the share of each loss, as points of their curves."""
    shares = clock.shares()
    return {GOODPUT: shares["productive"]} | {curve: shares[kind] for kind, curve in LOST_TIME.items()}
