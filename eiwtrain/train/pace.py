"""When the next checkpoint is due: by steps, by time, or as Young and Daly have it. Not for how one is written."""

from __future__ import annotations

import math

from eiwtrain.config.interval import parse

FIRST_SECONDS = 60.0  # until the checkpoint from which `auto` learns what one costs
SHORTEST, LONGEST = 10.0, 3600.0  # seconds, of `auto`


def young_daly(cost: float, mtbf: float, write: float) -> float:
    """The interval between checkpoints that loses the least time, to first order: `sqrt(2 cost mtbf)`.

    Longer ones lose more work at each failure, shorter ones stall training more often. It is never shorter than
    `SHORTEST`, nor than a checkpoint takes to be written, as one is written at a time; but for that, never longer than
    `LONGEST`.

    J. W. Young, A first order approximation to the optimum checkpoint interval, Communications of the ACM 17(9), 1974;
    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation
    Computer Systems 22(3), 2006.

    Args:
        cost: what training loses by a checkpoint, seconds: not its whole duration, where it is written meanwhile.
        mtbf: mean time between failures, seconds.
        write: what a checkpoint takes to be written, seconds.
    """
    return max(SHORTEST, write, min(LONGEST, math.sqrt(2.0 * cost * mtbf)))


class Pace:
    """Says when a checkpoint is due. Times are seconds of one clock that never goes back."""

    def __init__(self, every: int | str, mtbf_hours: float, step: int, now: float) -> None:
        """Begin an interval now, at a step that needs no checkpoint.

        Args:
            every: as for `parse`.
            mtbf_hours: mean time between failures that `auto` assumes until the run has seen its own: it counts as so
                many hours that ended in one failure.
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
        """Whether a checkpoint of this step is due. True once an interval: the next one begins now."""
        if self.interval is None:
            return step > self._step and step % self._every.amount == 0
        if now - self._since < self.interval:
            return False
        self._since = now
        if self._every.unit == "auto" and not self._checkpoints:
            self.interval = math.inf  # until it is known what this one has cost
        return True

    def committed(self, step: int, now: float, stall: float, seconds: float, wall: float, failures: int) -> None:
        """Learn from a checkpoint, due or not, that is written now.

        Args:
            step: which it is of.
            stall: for how long training waited for it, seconds.
            seconds: what it took from its beginning to its commit.
            wall: of the run so far, over all its attempts, seconds.
            failures: of attempts so far.
        """
        self._step, self._since = step, max(self._since, now - seconds)
        self._checkpoints += 1
        self._stalls += stall
        self._writes += seconds
        if self._every.unit == "auto":
            mtbf = (self._prior + wall) / (1 + failures)
            self.interval = young_daly(self._stalls / self._checkpoints, mtbf, self._writes / self._checkpoints)
