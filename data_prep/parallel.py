"""Runs tasks in this process or in workers of Ray, on this machine or a cluster. Not for what a task is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TypeVar

import fsspec.config

from eiwtrain.data.manifest import DataError
from eiwtrain.on_ray import session
from eiwtrain.on_ray.tasks import WorkersDied, unordered
from eiwtrain.storage import StorageError

T = TypeVar("T")
R = TypeVar("R")

NO_MEMORY = "there is too little memory for an image; --workers N bounds how many are decoded at a time"
_IN_FLIGHT = 2  # tasks handed out per CPU: while one is done, another waits


def check_workers(workers: int | None) -> None:
    """Raise DataError if there would be no workers."""
    if workers is not None and workers < 1:
        raise DataError(f"workers must be at least 1, not {workers}")


def run_tasks(call: Callable[[T], R], tasks: Iterator[T], workers: int | None) -> Iterator[tuple[T, R]]:
    """Yield every task with the result of `call`, in the order in which they finish. All three can be pickled.

    One worker is this process; None takes all CPUs of the machine, or of the cluster. A cluster that starts nodes
    starts them for tasks that wait; no more than `workers` tasks run or wait at a time.

    Raises:
        DataError, StorageError: as a task raised it; or workers died again and again, or Ray does not start.
    """
    check_workers(workers)
    if workers == 1:
        return ((task, call(task)) for task in tasks)
    return _run_on_ray(call, tasks, workers)


def in_flight(workers: int | None, cpus: int) -> int:
    """Return how many tasks Ray gets at a time: some wait for a CPU, so that a cluster that can start nodes does."""
    return cpus * _IN_FLIGHT if workers is None else min(workers, cpus * _IN_FLIGHT)


def _run_on_ray(call: Callable[[T], R], tasks: Iterator[T], workers: int | None) -> Iterator[tuple[T, R]]:
    if (first := next(tasks, None)) is None:
        return
    if not session.is_running():
        try:
            session.start(workers or os.cpu_count() or 1)
        except session.RayError as e:
            raise StorageError(str(e)) from None
    common, all_tasks = (call, session.forwarded_environment()), chain([first], tasks)
    try:
        for task, done in unordered(_run_in_worker, common, all_tasks, lambda cpus: in_flight(workers, cpus), _note):
            if isinstance(done, Exception):
                raise done
            yield task, done
    except WorkersDied as e:
        raise StorageError(f"workers of Ray died (out of memory?): {e}; run again to resume") from None


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _run_in_worker(call: Callable[[T], R], environment: dict[str, str], task: T) -> R | Exception:
    """Return the result, or the error: if it were raised, Ray would bury its one line in a traceback."""
    os.environ.update(environment)
    fsspec.config.set_conf_env(fsspec.config.conf)  # fsspec read the environment when it was imported
    try:
        return call(task)
    except (DataError, StorageError) as e:
        return e
    except OSError as e:  # a full disk, say
        return StorageError(str(e))
    except MemoryError:
        return StorageError(NO_MEMORY)
