"""Who does the tasks: this process, or workers of Ray, of this machine or of a cluster. Not what a task is."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec.config

from eiwtrain.data.manifest import DataError
from eiwtrain.on_ray import session
from eiwtrain.storage import StorageError
from eiwtrain.terminal.lines import one_line

T = TypeVar("T")
R = TypeVar("R")

_IN_FLIGHT = 2  # tasks handed out per CPU: while one is done, another waits
_WAITING_SECONDS = 60.0  # after which a job that no node can work for says so
_RETRIES = 3  # of a task whose worker or node has died


def check_workers(workers: int | None) -> None:
    """Raises DataError for a number of workers that cannot be."""
    if workers is not None and workers < 1:
        raise DataError(f"workers must be at least 1, not {workers}")


def run_tasks(call: Callable[[T], R], tasks: Iterator[T], workers: int | None) -> Iterator[tuple[T, R]]:
    """Every task with what `call` makes of it, in the order in which they are done. All three can be pickled.

    With one worker all is done in this process; None takes all CPUs of the machine, or of the cluster. A cluster that
    starts nodes does so for tasks that wait, of which there are none beyond `workers`.

    Raises:
        DataError, StorageError: as a task raised it; or workers died again and again, or Ray cannot be had.
    """
    check_workers(workers)
    if workers == 1:
        return ((task, call(task)) for task in tasks)
    return _run_on_ray(call, tasks, workers)


def in_flight(workers: int | None, cpus: int) -> int:
    """How many tasks Ray is given at a time: those without a CPU wait, and a cluster that can starts nodes for them."""
    return cpus * _IN_FLIGHT if workers is None else min(workers, cpus * _IN_FLIGHT)


def _run_on_ray(call: Callable[[T], R], tasks: Iterator[T], workers: int | None) -> Iterator[tuple[T, R]]:
    if (task := next(tasks, None)) is None:
        return
    if not session.is_running():
        _start(workers or os.cpu_count() or 1)
    import ray

    remote = ray.remote(num_cpus=1, max_retries=_RETRIES)(_run_in_worker)
    environment = session.forwarded_environment()
    running: dict[Any, Any] = {}
    while task is not None or running:
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))  # of a cluster that grows with what waits
        while task is not None and len(running) < in_flight(workers, cpus):
            running[remote.remote(call, task, environment)] = task
            task = next(tasks, None)
        finished, _ = ray.wait(list(running), num_returns=1, timeout=_WAITING_SECONDS)
        if not finished and not ray.cluster_resources().get("CPU"):
            print("waiting: no node of the cluster has CPUs for tasks yet", file=sys.stderr, flush=True)
        for reference in finished:
            try:
                done = ray.get(reference)
            except ray.exceptions.RayError as e:
                cause = one_line(e)
                raise StorageError(f"workers of Ray died (out of memory?): {cause}; run again to go on") from None
            if isinstance(done, Exception):
                raise done
            yield running.pop(reference), done


def _start(workers: int) -> None:
    """Start or join Ray, and keep SIGTERM as it was."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        session.start(workers)
    except session.RayError as e:
        raise StorageError(str(e)) from None
    except SystemExit:  # how Ray answers SIGTERM meanwhile
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _run_in_worker(call: Callable[[T], R], task: T, environment: dict[str, str]) -> R | Exception:
    """The result, or the error as a value: raised, its one line would be buried in a traceback."""
    os.environ.update(environment)
    fsspec.config.set_conf_env(fsspec.config.conf)  # which read the environment when it was imported
    try:
        return call(task)
    except (DataError, StorageError) as e:
        return e
    except OSError as e:  # a full disk, say
        return StorageError(str(e))
