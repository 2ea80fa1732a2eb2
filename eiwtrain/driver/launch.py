"""One attempt after another on Ray, until the run has ended: what ends one, and whether another follows."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

from eiwtrain import checkpoints, storage
from eiwtrain.config import Config, ConfigError
from eiwtrain.on_ray import node_prices, session
from eiwtrain.on_ray.autoscaling import NodeRequest
from eiwtrain.on_ray.messages import Again, Crashed, Failed, Lost, Outcome, Stopped
from eiwtrain.storage.lease import Lease, LeaseLost
from eiwtrain.terminal.console import Console, duration
from eiwtrain.terminal.signals import Interrupted, Stop
from eiwtrain.testing import timeline

if TYPE_CHECKING:
    from eiwtrain.tracking import TrackedRun

_POLL_SECONDS = 0.25
_SETTLE_SECONDS = 5.0  # for which a cluster with room for some workers is given time to have room for all
_WAITING_SECONDS = 60.0  # after which a job for which there is no room says what it waits for


def run_attempts(
    config: Config,
    data_fingerprint: str,
    known: list[checkpoints.Checkpoint],
    tracked: TrackedRun,
    lease: Lease,
    began: float,
    console: Console,
    stop: Stop,
) -> Outcome:
    """Start or join Ray and train until the run is finished, stopped, failed or taken over; return how it ended.

    An attempt that ends otherwise (a worker died, a node is going or has come) is followed by another, which resumes
    from the newest checkpoint on the workers that there is room for then.

    Args:
        known: checkpoints that the run has at its start, the newest first.
    """
    if not session.is_running():
        start_ray(config)  # before Ray is imported, which decides much by the environment
    from eiwtrain.driver.attempt import Attempt

    try:
        node_prices.check_prices(config.workers)
    except session.RayError as e:
        raise ConfigError(str(e)) from None
    timeline.mark("Ray Train")
    node_request = NodeRequest(config)
    try:
        attempt_began, skip_to = began, None
        number = crashes = shortages = 0
        with stop.polled():
            while True:
                number += 1
                lease.next_attempt()
                if not (workers := _wait_for_room(config, node_request, lease, console, stop)):
                    return _stopped(config, stop)
                there: checkpoints.Survey | None = None
                with contextlib.suppress(storage.StorageError):  # the next attempt or checkpoint cleans instead
                    there = _clean(config, lease, stop, known)
                    known = there[0]
                timeline.mark("room")
                console.note(f"starting {workers} workers ({duration(time.time() - began)} since the start)")
                attempt = Attempt(
                    config, data_fingerprint, tracked, lease, node_request, workers, number, began, attempt_began,
                    skip_to, shortages, there,
                )  # fmt: skip
                outcome = attempt.follow(console, stop)
                attempt_began, skip_to = time.time(), None
                timeline.mark("end of the attempt")
                if isinstance(outcome, Again):
                    skip_to = outcome.skip_to
                elif isinstance(outcome, Crashed):
                    console.note(f"the workers failed: {outcome.reason}")
                    lease.failed(outcome.reason)
                    shortages += outcome.short_of_memory
                    before, known = known[:1], _look(config, known)
                    crashes = crashes + 1 if known[:1] == before else 1
                else:
                    return outcome
                if stop.number:  # meanwhile
                    return _stopped(config, stop)
                if crashes > config.run.max_failures and isinstance(outcome, Crashed):
                    return Failed(_gave_up(config, outcome.reason, next(iter(known), None)))
                if attempt.holds_on:  # its workers have not returned, and hold their places in the cluster
                    session.stop()
                    start_ray(config)
    except LeaseLost as e:
        return Lost(str(e))
    finally:
        node_request.end()
        session.stop()


def _clean(config: Config, lease: Lease, stop: Stop, known: list[checkpoints.Checkpoint]) -> checkpoints.Survey:
    """Delete what earlier attempts have left half written, once none of their workers can publish it any more. Return
    what is there then, for the workers of the next one.

    Args:
        known: checkpoints that were found earlier.

    Raises:
        LeaseLost: another driver has the run by now.
        StorageError: storage does not answer, or the job is to stop.
    """
    guard = lease.guard()

    def stopped() -> bool:
        return bool(stop.number)

    guard.check(stopped)
    return checkpoints.clean(config.root, lambda: guard.check(stopped), lambda: guard.outwait(stopped), known)


def _stopped(config: Config, stop: Stop) -> Stopped:
    """Return the outcome of a stop, or of the drain of this job's own node, that no worker has heard of."""
    newest = next(iter(_look(config, [])), None)
    reason = stop.reason or session.OWN_DRAIN
    return Stopped(reason, newest.step, newest.url) if newest else Stopped(reason, 0, None)


def _look(config: Config, known: list[checkpoints.Checkpoint]) -> list[checkpoints.Checkpoint]:
    """Return the run's checkpoints, the newest first; `known` if storage does not answer or has none any more."""
    with contextlib.suppress(storage.StorageError), storage.impatient():
        return checkpoints.survey(config.root, known)[0] or known
    return known


def start_ray(config: Config) -> None:
    """Join the cluster, or start Ray for the workers of `config`.

    Raises:
        ConfigError: it cannot be joined or started.
        Interrupted: a stop signal came meanwhile.
    """
    # else 10 minutes, after which one that does not answer counts as dead
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", f"{config.workers.hang_seconds:g}")
    try:  # logical CPUs: also on one core
        session.start(max(config.max_workers * config.workers.cpus, os.cpu_count() or 1), config)
    except SystemExit:  # SIGTERM came where a stop is polled
        raise Interrupted(signal.SIGTERM) from None
    except session.RayError as e:
        raise ConfigError(str(e)) from None


def _wait_for_room(config: Config, node_request: NodeRequest, lease: Lease, console: Console, stop: Stop) -> int:
    """Wait for room for at least `workers.min` workers; return how many fit, or 0 if the job is to stop.

    Raises:
        LeaseLost: another driver has the run by now.
        Interrupted: before anything was trained.
    """
    began = said_at = time.monotonic()
    while True:
        if stop.number and stop.training:
            return 0
        if stop.number:
            raise Interrupted(stop.number)
        if lease.lost is not None:
            raise LeaseLost(lease.lost)
        if session.own_node_drains():  # this job would be killed while it waits
            return 0
        node_request.renew()
        session.free_places()  # no attempt runs now: a job must never wait for what it holds itself
        found = session.room(config)
        settled = time.monotonic() - began > _SETTLE_SECONDS
        if found == config.max_workers or (found >= config.workers.min and settled):
            return found
        if time.monotonic() - said_at > _WAITING_SECONDS:
            said_at, w = time.monotonic(), config.workers
            console.note(
                f"waiting for {w.min} workers of {w.cpus} CPU and {w.gpus} GPU each; the cluster has room for {found}"
            )
        time.sleep(_POLL_SECONDS)


def _gave_up(config: Config, cause: str, newest: checkpoints.Checkpoint | None) -> str:
    return (
        f"the workers failed more than run.max_failures = {config.run.max_failures} times in a row, the last time by "
        f"{cause}\n"
        f"last good checkpoint: {newest.url if newest else 'none'}; the same command resumes from it\n"
        "worker logs: /tmp/ray/session_latest/logs (on a cluster: its session folder)"
    )
