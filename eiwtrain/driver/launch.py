"""One attempt after another on Ray, until the run has ended: what ends one, and whether another follows."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING, Any

from eiwtrain import storage
from eiwtrain.checkpoints import checkpoint
from eiwtrain.config import Config, ConfigError
from eiwtrain.on_ray import session
from eiwtrain.on_ray.autoscaling import NodeRequest
from eiwtrain.storage.lease import Lease, LeaseLost
from eiwtrain.terminal.console import Console, duration
from eiwtrain.terminal.signals import Stop, Stopped

if TYPE_CHECKING:
    from eiwtrain.tracking import TrackedRun

_POLL_SECONDS = 0.25
_SETTLE_SECONDS = 5.0  # for which a cluster with room for some workers is given time to have room for all
_WAITING_SECONDS = 60.0  # after which a job for which there is no room says what it waits for


def train(
    config: Config,
    data_fingerprint: str,
    tracked: TrackedRun,
    lease: Lease,
    began: float,
    console: Console,
    stop: Stop,
) -> dict[str, Any]:
    """Start or join Ray and train until the run is finished, stopped, failed or taken over; returns how it ended.

    An attempt that ends otherwise (a worker died, a node is going or has come) is followed by another, which goes on
    from the newest checkpoint on the workers that there is room for then.
    """
    _start_ray(config, stop)  # before Ray is imported, which it decides much by
    import ray

    from eiwtrain.driver.attempt import Attempt

    node_request = NodeRequest(config)
    try:
        attempt_began, skip_to = began, None
        number = crashes = 0
        newest = _newest(config)
        with stop.polled():
            while True:
                number += 1
                lease.next_attempt()
                if not (workers := _wait_for_room(config, node_request, lease, console, stop)):
                    return _stopped(config, stop)
                with contextlib.suppress(storage.StorageError):  # the next attempt, or the next checkpoint, does it
                    _clean(config, lease, stop)
                console.note(f"starting {workers} workers ({duration(time.time() - began)} since the start)")
                attempt = Attempt(
                    config, data_fingerprint, tracked, lease, node_request, workers, number, began, attempt_began,
                    skip_to,
                )  # fmt: skip
                outcome = attempt.follow(console, stop)
                attempt_began, skip_to = time.time(), outcome.get("skip_to")
                if "crashed" not in outcome and "again" not in outcome:
                    return outcome
                if "crashed" in outcome:
                    console.note(f"the workers failed: {outcome['crashed']}")
                    lease.failed()
                    before, newest = newest, _newest(config) or newest
                    crashes = crashes + 1 if newest == before else 1
                if stop.number:  # meanwhile
                    return _stopped(config, stop)
                if crashes > config.run.max_failures:
                    return {"failed": _gave_up(config, outcome["crashed"], newest)}
                if attempt.holds_on:  # to its place in the cluster, too
                    ray.shutdown()
                    _start_ray(config, stop)
    except LeaseLost as e:
        return {"lost": str(e)}
    finally:
        node_request.end()
        ray.shutdown()


def _clean(config: Config, lease: Lease, stop: Stop) -> None:
    """Delete what attempts before have left half written, once none of their workers can publish it any more.

    Raises:
        LeaseLost: the run is another's by now.
        StorageError: storage does not answer, or the job is to stop.
    """
    guard = lease.guard()

    def stopped() -> bool:
        return bool(stop.number)

    guard.check(stopped)
    if checkpoint.unfinished(config.root):
        guard.outwait(stopped)
    checkpoint.clean(config.root, lambda: guard.check(stopped))


def _stopped(config: Config, stop: Stop) -> dict[str, Any]:
    """The outcome of a stop, or of the drain of this job's own node, that no worker has heard of."""
    newest = _newest(config)
    step, url = (newest.step, newest.url) if newest else (0, "none yet")
    return {"stopped": stop.reason or session.OWN_DRAIN, "step": step, "checkpoint": url}


def _newest(config: Config) -> checkpoint.Checkpoint | None:
    """The last checkpoint; None where there is none, or storage does not answer."""
    with contextlib.suppress(storage.StorageError), storage.impatient():
        return checkpoint.newest(config.root)
    return None


def _start_ray(config: Config, stop: Stop) -> None:
    # else 10 minutes, after which one that does not answer counts as dead
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", f"{config.workers.hang_seconds:g}")
    try:  # logical CPUs: also on one core
        session.start(max(config.max_workers * config.workers.cpus, os.cpu_count() or 1))
    except SystemExit:  # how Ray answers SIGTERM meanwhile
        raise Stopped(signal.SIGTERM) from None
    except session.RayError as e:
        raise ConfigError(str(e)) from None
    stop.listen()


def _wait_for_room(config: Config, node_request: NodeRequest, lease: Lease, console: Console, stop: Stop) -> int:
    """For how many workers there is room, once it is for `workers.min` at least; 0 if the job is to stop.

    Raises:
        LeaseLost: the run is another's by now.
        Stopped: before anything was trained.
    """
    began = said_at = time.monotonic()
    while True:
        if stop.number and stop.training:
            return 0
        if stop.number:
            raise Stopped(stop.number)
        if lease.lost is not None:
            raise LeaseLost(lease.lost)
        if session.own_node_drains():  # and so would be killed while it waits
            return 0
        node_request.renew()
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


def _gave_up(config: Config, cause: str, newest: checkpoint.Checkpoint | None) -> str:
    return (
        f"the workers failed more than run.max_failures = {config.run.max_failures} times in a row, the last time by "
        f"{cause}\n"
        f"last good checkpoint: {newest.url if newest else 'none'}; the same command goes on from it\n"
        "worker logs: /tmp/ray/session_latest/logs (on a cluster: its session folder)"
    )
