"""When the next checkpoint is due: by steps, by time, or by Young and Daly's formula. Not for how one is written."""

from __future__ import annotations

import math

from eiwtrain.config.interval import parse

FIRST_SECONDS = 60.0  # until the first checkpoint, from which `auto` learns what one costs
SHORTEST, LONGEST = 10.0, 3600.0  # seconds, bounds of the interval of `auto`


def young_daly(cost: float, mtbf: float, write: float) -> float:
    """Return the interval between checkpoints that loses the least time, to first order: `sqrt(2 cost mtbf)`.

    Longer intervals lose more work at each failure, shorter ones stall training more often. The interval is at least
    `SHORTEST` and the time to write a checkpoint, as one is written at a time; otherwise it is at most `LONGEST`.

    J. W. Young, A first order approximation to the optimum checkpoint interval, Communications of the ACM 17(9), 1974;
    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation
    Computer Systems 22(3), 2006.

    Args:
        cost: seconds of training that a checkpoint costs; less than its duration if it is written meanwhile.
        mtbf: mean time between failures, seconds.
        write: seconds that it takes to write a checkpoint.
    """
    return max(SHORTEST, write, min(LONGEST, math.sqrt(2.0 * cost * mtbf)))


class Pace:
    """Decides when a checkpoint is due. Times are seconds of one clock that never goes back."""

    def __init__(self, every: int | str, mtbf_hours: float, step: int, now: float) -> None:
        """Begin an interval now, at a step that needs no checkpoint.

        Args:
            every: as for `parse`.
            mtbf_hours: mean time between failures that `auto` assumes until the run has seen its own: it counts as
                that many hours that ended in one failure.
        """
        self._every = parse(every)
        self._prior = mtbf_hours * 3600.0
        self._step, self._since = step, now
        self._checkpoints = 0
        self._stalls = self._writes = 0.0
        self.interval: float | None = FIRST_SECONDS if self._every.unit == "auto" else self._every.amount
        """Seconds between two checkpoints; None where steps are counted."""
        if self._every.unit == "steps":
            self.interval = None

    def due(self, step: int, now: float) -> bool:
        """Return whether a checkpoint of this step is due. True once in each interval: the next one begins now."""
        if self.interval is None:
            return step > self._step and step % self._every.amount == 0
        if now - self._since < self.interval:
            return False
        self._since = now
        if self._every.unit == "auto" and not self._checkpoints:
            self.interval = math.inf  # until the cost of this one is known
        return True

    def committed(self, step: int, now: float, stall: float, seconds: float, wall: float, failures: int) -> None:
        """Learn from a checkpoint that was written just now, whether or not it was due.

        Args:
            step: its step.
            stall: seconds for which training waited for it.
            seconds: seconds from its beginning to its commit.
            wall: wall time of the run so far, over all its attempts, seconds.
            failures: attempts that have failed so far.
        """
        self._step, self._since = step, max(self._since, now - seconds)
        self._checkpoints += 1
        self._stalls += stall
        self._writes += seconds
        if self._every.unit == "auto":
            mtbf = (self._prior + wall) / (1 + failures)
            self.interval = young_daly(self._stalls / self._checkpoints, mtbf, self._writes / self._checkpoints)
