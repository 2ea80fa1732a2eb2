"""One attempt: a fixed number of workers from their start to their end, what they report, and what they are asked.

Ray places the workers, makes the process group, and sees when one dies. It does not restart or resize them: it would do
so without a checkpoint, and onto nodes that are about to go. The next attempt (`eiwtrain.driver.launch`) does as well.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import replace

from eiwtrain import checkpoints
from eiwtrain.config import Config, prices
from eiwtrain.on_ray import session
from eiwtrain.on_ray.autoscaling import NodeRequest
from eiwtrain.on_ray.mailbox import DriverEnd, MailboxLost
from eiwtrain.on_ray.messages import (
    Again,
    Assignment,
    Crashed,
    DriverRequest,
    Failed,
    Finished,
    Heard,
    Lost,
    Note,
    Outcome,
    Stopped,
    Training,
    TrainingLine,
)
from eiwtrain.on_ray.trainer import Fit, cause_of
from eiwtrain.storage.lease import Lease
from eiwtrain.terminal.console import Console
from eiwtrain.terminal.signals import Interrupted, Stop
from eiwtrain.tracking import TrackedRun
from eiwtrain.train.loop import train_worker

_POLL_SECONDS = 0.25
_HEAR_SECONDS = 15.0  # within which a living worker hears of a stop, whatever it does
_END_SECONDS = 60.0
_LAST_WORDS_SECONDS = 5.0  # for the other ranks of a run that has failed: their notes, points on their way to MLflow
_LOOK_SECONDS = 2.0  # between two looks at the cluster
_READY_SECONDS = 30.0  # of training, after which processes are made ready for the next attempt


class Attempt:
    """Workers from their start to their end."""

    _ready_at = math.inf  # when processes are made ready for the next attempt
    _price = 0.0  # of all workers, an hour

    def __init__(
        self,
        config: Config,
        data_fingerprint: str,
        tracked: TrackedRun,
        lease: Lease,
        node_request: NodeRequest,
        workers: int,
        number: int,
        began: float,
        attempt_began: float,
        skip_to: int | None,
        shortages: int,
        there: checkpoints.Survey | None,
    ) -> None:
        """Start the workers.

        Args:
            data_fingerprint: of the data set that they must find.
            node_request: is renewed while they run.
            workers: how many.
            number: of this attempt under this driver, from 1.
            began, attempt_began: Unix times at which the driver started, and at which the attempt before ended.
            skip_to: step to resume at, with the weights of the last good checkpoint.
            shortages: attempts under this driver that have run out of a GPU's memory.
            there: checkpoints that they find; None: not known.
        """
        self._config, self._lease, self._node_request, self._workers = config, lease, node_request, workers
        self._cost_before, self._hired = lease.cost, time.monotonic()
        if (price := config.workers.price_per_hour) is not None:
            self._price = workers * prices.bounds(price)[1]  # until it is known which nodes they are on
        self._driver_end = DriverEnd()
        assignment = Assignment(
            config, data_fingerprint, tracked, self._driver_end.mailbox, lease.guard(), session.forwarded_environment(),
            began, lease.earlier_seconds, attempt_began, lease.failures, skip_to, shortages,
            lease.earlier_cost + lease.cost, time.time(), there,
        )  # fmt: skip
        name = f"{config.run.name}-{int(began)}-{number}"
        self._fit = Fit(train_worker, {"assignment": assignment}, config.workers, workers, name)
        self._nodes: list[str] = []
        self._looked_at = self._room_since = self._asked_at = 0.0
        self._asked: DriverRequest | None = None
        self._heard = False
        """Whether a worker has heard of it."""

    @property
    def holds_on(self) -> bool:
        """Whether workers that should have returned have not."""
        return self._fit.is_alive()

    def follow(self, console: Console, stop: Stop) -> Outcome:
        """Print what the workers report and ask them to return where they must, until they have; return how that
        ended."""
        try:
            return self._follow(console, stop)
        except MailboxLost as e:
            return Crashed(cause_of(e))
        finally:
            self._count_cost()

    def _follow(self, console: Console, stop: Stop) -> Outcome:
        while True:
            ended = not self._fit.is_alive()  # before the mail is read: nothing comes after it
            if (outcome := self._read(console, stop)) is not None:
                return self._ended(outcome, console, stop)
            if stop.number and not stop.training:
                raise Interrupted(stop.number)
            if stop.number and not self._nodes:
                return Again(stop.reason)  # the workers are still starting: they have nothing to save
            if lost := self._lease.lost:
                return Lost(lost)
            if ended:
                return Crashed(self._fit.cause)
            if session.has_died():
                return Crashed("Ray of this machine has died")
            if (request := self._request(stop)) is not None:
                self._driver_end.ask(request)
                self._asked, self._heard, self._asked_at = request, False, time.monotonic()
                if request.kind == "again":
                    console.note(f"{request.reason}: a checkpoint first, then on the workers that there is room for")
            if self._unheard():
                return Crashed("no worker heard of the stop")  # they died, or have not started
            self._count_cost()
            time.sleep(_POLL_SECONDS)

    def _count_cost(self) -> None:
        """Have the lease record what this job's workers have cost until now."""
        if self._price:
            self._lease.cost = self._cost_before + self._price * (time.monotonic() - self._hired) / 3600

    def _unheard(self) -> bool:
        """Whether the workers were asked to stop, and none has noticed in the time that a living one needs."""
        if self._asked is None or self._asked.kind != "stop" or self._heard:
            return False
        return time.monotonic() - self._asked_at > _HEAR_SECONDS

    def _read(self, console: Console, stop: Stop) -> Outcome | None:
        """Read the mail: print, take note; return how the workers ended, if they have said so."""
        outcome: Outcome | None = None
        for message in self._driver_end.take():
            match message:
                case Training(step, of, nodes, price):
                    stop.training = True
                    self._nodes, self._price = nodes, price
                    self._ready_at = time.monotonic() + _READY_SECONDS
                    console.note(
                        f"training from step {step:,} to {of:,} on {len(nodes)} workers; "
                        "Ctrl-C writes a checkpoint and stops"
                    )
                case TrainingLine():
                    console.progress(message)
                case Note(text):
                    console.note(text)
                case Heard():
                    self._heard = True
                case Finished() | Stopped() | Again() | Failed() | Crashed() | Lost():
                    outcome = outcome or message
        return outcome

    def _ended(self, outcome: Outcome, console: Console, stop: Stop) -> Outcome:
        # let the workers return, so that nothing is cut off
        end = time.monotonic() + (_LAST_WORDS_SECONDS if isinstance(outcome, Failed) else _END_SECONDS)
        while self._fit.is_alive() and time.monotonic() < end and not session.has_died():
            self._fit.join(_POLL_SECONDS)
        with contextlib.suppress(MailboxLost):  # the outcome is known
            self._read(console, stop)
        if isinstance(outcome, Again) and self.holds_on:
            return Crashed(f"workers that should have returned did not within {_END_SECONDS:g} s")
        if isinstance(outcome, Stopped) and self._asked is not None and self._asked.kind == "stop":
            return replace(outcome, reason=self._asked.reason)  # rank 0 may have learned of it from another rank alone
        return outcome

    def _request(self, stop: Stop) -> DriverRequest | None:
        """Return what the workers are to be asked for, if it has not been asked yet."""
        if stop.number:
            return DriverRequest("stop", stop.reason) if self._asked is None or self._asked.kind == "again" else None
        if self._asked is not None or time.monotonic() - self._looked_at < _LOOK_SECONDS:
            return None
        self._looked_at = time.monotonic()
        self._node_request.renew()
        with contextlib.suppress(Exception):  # Ray's head may be away for a moment; there is another look
            return self._look(self._looked_at)
        return None

    def _look(self, now: float) -> DriverRequest | None:
        """Return what the state of the cluster asks for."""
        if session.own_node_drains():
            return DriverRequest("stop", session.OWN_DRAIN)
        if not self._nodes:  # they are starting
            return None
        if now > self._ready_at:
            self._ready_at = math.inf
            session.keep_ready(self._workers)
        if going := sorted(session.draining() & set(self._nodes)):
            return DriverRequest("again", f"Ray drains node {', '.join(node[:12] for node in going)}")
        if self._workers < self._config.max_workers:
            found = session.room(self._config, self._nodes, patience=_LOOK_SECONDS)
            self._room_since = (self._room_since or now) if found > self._workers else 0.0
            if self._room_since and now - self._room_since >= self._config.workers.grow_seconds:
                return DriverRequest("again", f"there is room for {found} workers")
        return None
