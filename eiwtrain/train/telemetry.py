"""What is measured of each step, and what rank 0 makes of it: points of MLflow's curves, and the training line.

Not for the figures themselves: they come from `eiwtrain.train.report`, `goodput`, `stragglers` and
`eiwtrain.tracking.system`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from eiwtrain.on_ray.messages import Message, Note
from eiwtrain.tracking import Tracker
from eiwtrain.tracking.curves import COST, COST_AT_END, COST_WASTED, SKIPPED_STEPS, WORKERS
from eiwtrain.tracking.system import System
from eiwtrain.train import goodput, report
from eiwtrain.train.agreed import StepSums
from eiwtrain.train.goodput import Clock
from eiwtrain.train.state import TrainState
from eiwtrain.train.stragglers import Speeds


class Step(NamedTuple):
    """What a rank has measured of a step."""

    sums: StepSums
    entropy: Tensor
    norm: float
    lr: float
    waited: float
    """Seconds for which this rank waited for its data."""
    worked: float
    """Seconds that the step then took."""
    computed: float
    """Seconds of these before this rank first waited for others; NaN if that is not known."""


class Telemetry:
    """The measurements of one rank."""

    def __init__(
        self,
        state: TrainState,
        clock: Clock,
        tracker: Tracker | None,
        say: Callable[[Message], None],
        images: int,
        ranks: Sequence[tuple[str, str]],
    ) -> None:
        """
        Args:
            tracker: rank 0's.
            say: sends the driver a message, from rank 0 only.
            images: how many the training split has.
            ranks: each rank's node, and its host's name.
        """
        self._state, self._clock, self._tracker, self._say, self._images = state, clock, tracker, say, images
        self._workers = float(len(ranks))
        self._config = state.config
        self._system = System([node for node, _ in ranks], state.device, lambda text: say(Note(text)))
        self._speeds = Speeds(ranks, lambda text: say(Note(text)))
        if tracker is not None and len(self._speeds.nodes) > 1:
            tracker.tags({"nodes": ", ".join(f"{number} {name}" for number, name in enumerate(self._speeds.nodes))})
        self._meter = report.Meter()
        self._faults = 0

    def logs(self, step: int) -> bool:
        """Whether the curves have points at this step."""
        return step % self._config.tracking.log_every == 0

    def looks(self, step: int) -> bool:
        """Whether the machines' load should be read after this step; False on all ranks but 0."""
        return self.logs(step) and self._system.due()

    def compares(self) -> bool:
        """Whether the ranks' speed should be compared after this step; False on all ranks but 0."""
        return self._speeds.due()

    def add(self, made: Step) -> None:
        """Count the step that was just made, and report it. Collective, if rank 0 looks or compares."""
        state, t = self._state, self._config.train
        bits, penalty, faults = made.sums.bits / t.global_batch, made.sums.penalty / t.global_batch, made.sums.faults
        self._meter.add(t.global_batch, bits, made.waited, made.worked, int(faults))
        self._faults += int(faults)
        self._speeds.add(made.waited, made.computed, made.worked)
        if made.sums.compare:
            speeds = self._speeds.compare()
            if self._tracker is not None:
                self._tracker.metrics(state.step, speeds)
        of_machines = self._system.curves() if made.sums.look else {}
        if self.logs(state.step):
            orders = state.orders()  # collective
            if self._tracker is not None:
                self._tracker.metrics(state.step, self._curves(made, bits, penalty, orders) | of_machines)

    def _curves(
        self, made: Step, bits: float, penalty: float, orders: Sequence[tuple[float, float]]
    ) -> dict[str, float]:
        """Return the points of the curves at the step that was just made; its bits/dim and penalty are of an image."""
        state, epoch = self._state, self._state.samples_seen / self._images
        points = report.curves(
            self._meter, bits, penalty, made.norm, made.lr, made.entropy, orders, self._faults, epoch
        )
        points |= {WORKERS: self._workers, SKIPPED_STEPS: float(state.skipped)} | goodput.curves(self._clock)
        if self._config.workers.price_per_hour is not None:
            points |= goodput.cost_curves(self._clock, self._meter.eta(state.step, self._config.train))
        return points

    def progress(self) -> None:
        """Send the training line, every few seconds."""
        t, step = self._config.train, self._state.step
        if self._meter.seconds >= t.log_every_seconds or step == t.max_steps:
            line = report.progress(self._meter, step, t, self._clock.goodput)
            if self._config.workers.price_per_hour is not None:
                costs = goodput.cost_curves(self._clock, line.eta)
                line = replace(line, cost=costs[COST], cost_at_end=costs[COST_AT_END], wasted=costs[COST_WASTED])
            self._say(line)
            self._meter = report.Meter()

    def close(self) -> None:
        """Stop reading the machine."""
        self._system.close()
