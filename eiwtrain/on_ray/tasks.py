"""Runs many small tasks on Ray, each on one CPU, and gives their results as they come.

Not for the workers of training, which need one another: that is `eiwtrain.on_ray.trainer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from eiwtrain.terminal.lines import one_line

T = TypeVar("T")
R = TypeVar("R")

_WAITING_SECONDS = 60.0  # after which tasks for which there is no node are noted
_RETRIES = 3  # of a task whose worker or node has died


class WorkersDied(RuntimeError):
    """A task's workers died again and again; the message is one line."""


def unordered(
    call: Callable[..., R],
    common: tuple[Any, ...],
    tasks: Iterator[T],
    in_flight: Callable[[int], int],
    note: Callable[[str], None],
) -> Iterator[tuple[T, R]]:
    """Yield each task with what `call` makes of it, in the order in which they are done. Ray must be running.

    Args:
        call: raises nothing; all arguments and results can be pickled.
        common: its first arguments, before the task. Ray keeps functions where others can read them, but not arguments.
        in_flight: how many tasks Ray is given at a time, for its number of CPUs.
        note: is given a line for people.

    Raises:
        WorkersDied: as it says.
    """
    import ray

    remote = ray.remote(num_cpus=1, max_retries=_RETRIES)(call)
    running: dict[Any, T] = {}
    more = True
    while more or running:
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))  # of a cluster that grows with what waits
        while more and len(running) < in_flight(cpus):
            try:
                task = next(tasks)
            except StopIteration:
                more = False
            else:
                running[remote.remote(*common, task)] = task
        finished, _ = ray.wait(list(running), num_returns=1, timeout=_WAITING_SECONDS) if running else ([], [])
        if running and not finished and not ray.cluster_resources().get("CPU"):
            note("waiting: no node of the cluster has CPUs for tasks yet")
        for reference in finished:
            try:
                done: R = ray.get(reference)
            except ray.exceptions.RayError as e:
                raise WorkersDied(one_line(e)) from None
            yield running.pop(reference), done
