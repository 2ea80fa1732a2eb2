"""One attempt after another on Ray, until the run has ended: what ends one, and whether another follows."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

from eiwtrain import checkpoint, ray_session
from eiwtrain.config import Config, ConfigError
from eiwtrain.console import Console, duration
from eiwtrain.lease import Lease
from eiwtrain.signals import Stop, Stopped

if TYPE_CHECKING:
    from eiwtrain.tracking import TrackedRun

_POLL_SECONDS = 0.25
_SETTLE_SECONDS = 5.0  # for which a cluster with room for some workers is given time to have room for all
_WAITING_SECONDS = 60.0  # after which a job for which there is no room says what it waits for


def train(
    config: Config, tracked: TrackedRun, lease: Lease, began: float, console: Console, stop: Stop
) -> dict[str, Any]:
    """Start or join Ray and train until the run is finished, stopped, failed or taken over; returns how it ended.

    An attempt that ends otherwise (a worker died, a node is going or has come) is followed by another, which goes on
    from the newest checkpoint on the workers that there is room for then.
    """
    import ray

    from eiwtrain.attempt import Attempt

    _start_ray(config, stop)
    try:
        attempt_began, skip_to = began, None
        number = crashes = 0
        newest = checkpoint.newest(config.root)
        ray_session.ask_for(config)
        while True:
            number += 1
            checkpoint.clean(config.root)
            workers = _wait_for_room(config, console, stop)
            if (lost := lease.lost) is not None:
                return {"lost": lost}
            console.note(f"starting {workers} workers ({duration(time.time() - began)} since the start)")
            attempt = Attempt(config, tracked, lease, workers, number, began, attempt_began, skip_to)
            outcome = attempt.follow(console, stop)
            attempt_began, skip_to = time.time(), outcome.get("skip_to")
            if "crashed" in outcome:
                lease.failed()
                before, newest = newest, checkpoint.newest(config.root)
                crashes = crashes + 1 if newest == before else 1
                if crashes > config.run.max_failures:
                    return {"failed": _gave_up(config, outcome["crashed"], newest)}
                console.note(f"the workers failed: {outcome['crashed']}")
                if attempt.holds_on:  # to its place in the cluster, too
                    ray.shutdown()
                    _start_ray(config, stop)
            elif "again" not in outcome:
                return outcome
            if stop.number:  # meanwhile
                return _stopped_between(config, stop)
    finally:
        ray_session.ask_for(None)
        ray.shutdown()


def _start_ray(config: Config, stop: Stop) -> None:
    # else 10 minutes, after which one that does not answer counts as dead
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", f"{config.workers.hang_seconds:g}")
    try:  # logical CPUs: also on one core
        ray_session.start(max(config.max_workers * config.workers.cpus, os.cpu_count() or 1))
    except SystemExit:  # how Ray answers SIGTERM meanwhile
        raise Stopped(signal.SIGTERM) from None
    except ray_session.RayError as e:
        raise ConfigError(str(e)) from None
    stop.listen()


def _wait_for_room(config: Config, console: Console, stop: Stop) -> int:
    """The number of workers that there is room for now, once it is at least `workers.min`."""
    began = said_at = time.monotonic()
    while True:
        found = ray_session.room(config)
        settled = time.monotonic() - began > _SETTLE_SECONDS
        if found == config.max_workers or (found >= config.workers.min and settled):
            return found
        if stop.number:
            raise Stopped(stop.number)
        if time.monotonic() - said_at > _WAITING_SECONDS:
            said_at, w = time.monotonic(), config.workers
            console.note(
                f"waiting for {w.min} workers of {w.cpus} CPU and {w.gpus} GPU each; the cluster has room for {found}"
            )
        time.sleep(_POLL_SECONDS)


def _stopped_between(config: Config, stop: Stop) -> dict[str, Any]:
    newest = checkpoint.newest(config.root)
    step, url = (newest.step, newest.url) if newest else (0, None)
    return {"stopped": stop.reason, "step": step, "checkpoint": url}


def _gave_up(config: Config, cause: str, newest: checkpoint.Checkpoint | None) -> str:
    return (
        f"the workers failed more than run.max_failures = {config.run.max_failures} times in a row, the last time by "
        f"{cause}\n"
        f"last good checkpoint: {newest.url if newest else 'none'}; the same command goes on from it\n"
        "worker logs: /tmp/ray/session_latest/logs (on a cluster: its session folder)"
    )
