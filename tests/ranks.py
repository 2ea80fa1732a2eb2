"""Ranks that share a gloo group, in processes that stay warm: importing torch and DeepSpeed takes them seconds."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from helpers import free_port

_KEPT = (1, 2)  # world sizes whose processes stay
_SECONDS = 500.0  # the longest that one piece of work may take
TIMEOUT = timedelta(minutes=20)  # of their collectives; not torch's default
_warm: dict[int, _Ranks] = {}


def run_ranks(work: Callable[..., None], world_size: int, *args: Any, fresh: bool = False) -> None:
    """Call `work(*args)` on every rank of a gloo group.

    The ranks keep no process group of `work`'s own, and are replaced after a failure.

    Args:
        work: a function of a module, since it is sent by name.
        fresh: use new processes, for work that counts what its process holds or sends.

    Raises:
        AssertionError: a rank has failed or died; the message holds its traceback.
    """
    ranks = (None if fresh else _warm.pop(world_size, None)) or _Ranks(world_size)
    try:
        ranks.run(work, args)
    except BaseException:
        ranks.close()
        raise
    if world_size in _KEPT and not fresh:
        _warm[world_size] = ranks
    else:
        ranks.close()


class _Ranks:
    """The processes of one gloo group."""

    def __init__(self, world_size: int) -> None:
        context, port = get_context("spawn"), free_port()
        pipes = [context.Pipe() for _ in range(world_size)]
        self._ends = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()

    def run(self, work: Callable[..., None], args: tuple[Any, ...]) -> None:
        """Call the function on every rank, and raise what the first rank that fails says."""
        for end in self._ends:
            end.send((work, args))
        for rank, end in enumerate(self._ends):
            assert end.poll(_SECONDS), f"rank {rank} did not answer within {_SECONDS:g} s"
            try:
                failure = end.recv()
            except EOFError:
                failure = "its process died"
            assert failure is None, f"rank {rank}: {failure}"

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank: int, world_size: int, port: int, end: Connection) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=TIMEOUT)
    while True:
        try:
            work, args = end.recv()
        except EOFError:
            # without the interpreter's own end: a thread of gloo that then drops the last reference to a tensor needs
            # the interpreter's lock, is ended by Python < 3.14 inside a destructor, and aborts the process
            os._exit(0)
        try:
            work(*args)
            failure = None
        except BaseException:
            failure = traceback.format_exc()
        sys.stdout.flush()
        end.send(failure)


@atexit.register
def _close_all() -> None:
    for ranks in _warm.values():
        ranks.close()
