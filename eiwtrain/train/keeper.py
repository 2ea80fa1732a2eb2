"""When checkpoints are begun, what is in them, and what the user reads when one is written or could not be.

It stands between the loop (`eiwtrain.train.loop`), which asks at every step, and `eiwtrain.checkpoints.writer`. Every
rank has one; rank 0's decides. Not for how a checkpoint is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from eiwtrain.checkpoints import near
from eiwtrain.checkpoints.writer import CheckpointWriter, RanksApartError, SaveResult
from eiwtrain.config import Config
from eiwtrain.storage.lease import Guard, LeaseLost
from eiwtrain.tracking import Tracker, curves
from eiwtrain.train.goodput import Clock
from eiwtrain.train.pace import Pace
from eiwtrain.train.state import TrainState, sum_over_ranks

_PATIENCE = 20.0  # seconds for which a checkpoint waits until the previous one is written
_AGAIN_SECONDS = 30.0  # least time until a failed checkpoint is tried again: each try costs training a copy
_LEASE_SECONDS = 300.0  # for which a checkpoint waits until the lease is seen to be ours; all ranks wait
_NOTHING = (-1, False)


class Keeper:
    """Decides when the checkpoints of a run are written, and reports what became of them."""

    def __init__(
        self,
        config: Config,
        state: TrainState,
        clock: Clock,
        guard: Guard,
        tracker: Tracker | None,
        failures: int,
        note: Callable[[str], None],
        run_id: str,
        nodes: Sequence[str] = (),
    ) -> None:
        """Collective.

        Args:
            tracker: rank 0's.
            failures: attempts of the run that have failed so far.
            note: prints a line for the user.
            run_id: id of the run in MLflow.
            nodes: a name of the node of each rank.
        """
        self._state, self._clock, self._tracker, self._failures, self._note = state, clock, tracker, failures, note
        self._run_id = run_id
        # long enough for storage to answer or to be given up, and shorter than the watchdog's patience
        self._scored_patience = max(_PATIENCE, config.workers.hang_seconds / 2)
        c = config.checkpoint
        self._guard = guard
        self._saver = CheckpointWriter(config.root, c.keep_last, c.keep_every, self._may_write, c.near, nodes)
        self._near, self._root = c.near, config.root
        self._lacks_copies = False
        self._pace = Pace(c.every, c.mtbf_hours, state.step, time.monotonic())
        self._overdue, self._not_before = False, 0.0
        self._known = (state.newest.step, state.score is not None) if state.newest else _NOTHING
        """(step, whether it has its score) of the last checkpoint that was begun or restored."""

    def due(self, step: int | None = None) -> bool:
        """Return whether a checkpoint should be begun now; called on rank 0. One is written at a time.

        Args:
            step: a step that is about to be finished; None: the last one.
        """
        now = time.monotonic()
        self._overdue = self._overdue or self._pace.due(self._state.step if step is None else step, now)
        return self._overdue and not self._saver.busy and now >= self._not_before

    def save(self, wait: bool = False) -> None:
        """Begin a checkpoint of this step, unless one exists that holds as much. Collective.

        Args:
            wait: wait until it is written. Otherwise it is postponed if the previous one takes too long. A checkpoint
                with a score waits longer, as a later one does not have this score.

        Raises:
            LeaseLost: another job has taken the run.
            RanksApartError: these workers cannot write checkpoints any more.
        """
        state = self._state
        patience = _PATIENCE if state.score is None else self._scored_patience
        with self._clock.spending("checkpoint"):
            self._heard(self._saver.wait(None if wait else patience))
        known = (state.step, state.score is not None)
        more, busy = sum_over_ranks([known > self._known, self._saver.busy], state.device)
        if not more:
            return
        if busy:
            self._overdue = True
            if state.score is not None:
                self._note(
                    f"the checkpoint of step {state.step:,} with its score is left out, as the previous one is not "
                    f"written after {patience:g} s: this step cannot be the best that is kept"
                )
            return
        self._known, self._overdue = known, False
        with self._clock.spending("checkpoint"):
            about = state.to_json() | {
                "mlflow_run_id": self._run_id,
                "unlogged": self._tracker.pending() if self._tracker is not None else {},
                "clock": self._clock.to_json(),
            }
            self._heard(self._saver.begin(state.step, state.samples_seen, state.tensors(), about))
            if wait:
                self._heard(self._saver.wait())

    def hear(self) -> None:
        """Report what became of the last checkpoint if that is new. Raises what `save` raises."""
        self._heard(self._saver.poll())

    def settle(self) -> None:
        """Wait until no checkpoint is being written. Raises what `save` raises."""
        self._heard(self._saver.wait())

    def drop_copies(self) -> None:
        """Delete what the writer has left on this machine: no restart will read it."""
        if self._near is not None:
            near.remove(self._near, self._root)

    def _may_write(self) -> None:
        end = time.monotonic() + _LEASE_SECONDS
        self._guard.check(give_up=lambda: time.monotonic() > end)

    def _heard(self, result: SaveResult | None) -> None:
        if result is None:
            return
        if isinstance(result.exception, (LeaseLost, RanksApartError)):
            raise result.exception
        if result.checkpoint is None:
            self._note(f"a checkpoint could not be written: {result.error}; training continues, and tries again")
            self._known, self._overdue = _NOTHING, True
            self._not_before = time.monotonic() + max(_AGAIN_SECONDS, result.seconds)
            return
        saved = self._state.newest = result.checkpoint
        wall, failures = self._clock.wall, self._failures
        self._pace.committed(saved.step, time.monotonic(), result.stall, result.seconds, wall, failures)
        self._note(
            f"checkpoint at step {saved.step:,}: {saved.url} ({result.bytes / 1e6:,.1f} MB; training waited "
            f"{result.stall:.2f} s, written in {result.seconds:.1f} s)"
        )
        if result.error is not None:
            self._note(f"old checkpoints could not be deleted: {result.error}")
        if result.near is not None and not self._lacks_copies:
            self._lacks_copies = True
            self._note(
                f"checkpoint.near: a copy could not be left ({result.near}); training continues, and a restart reads "
                "what is missing from run.storage"
            )
        if self._tracker is not None:
            self._tracker.tags({"checkpoint": saved.url, "step": str(saved.step)})
            seconds = {curves.CHECKPOINT_STALL: result.stall, curves.CHECKPOINT_SECONDS: result.seconds}
            self._tracker.metrics(saved.step, seconds)
