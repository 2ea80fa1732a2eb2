"""Named places in the code where a test makes a process die, stop or hang; off unless EIWTRAIN_FAILPOINTS names them.

    EIWTRAIN_FAILPOINTS="checkpoint.part-written=kill; checkpoint.before-manifest=stop@2"
    EIWTRAIN_FAILPOINTS_DONE=/some/folder

Each entry is `name=action`; `@n` means the n-th time that a process reaches the place (default: the first). With
EIWTRAIN_FAILPOINTS_DONE each entry is carried out only once, by the process that reaches it first, however often
processes are restarted: a file of its name in that folder marks it as done.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

_reached: Counter[str] = Counter()


def reach(name: str) -> None:
    """Carry out what EIWTRAIN_FAILPOINTS asks for at the place `name`: usually nothing.

    Raises:
        ValueError: the variable cannot be read.
    """
    wanted = os.environ.get("EIWTRAIN_FAILPOINTS")
    if not wanted:
        return
    _reached[name] += 1
    for entry in wanted.split(";"):
        place, equals, what = entry.strip().partition("=")
        action, _, number = what.partition("@")
        if not equals or action not in _ACTIONS or not (number or "1").isdigit():
            raise ValueError(f"EIWTRAIN_FAILPOINTS: {entry.strip()!r}: write name=action or name=action@n, {_KNOWN}")
        if place == name and _reached[name] == int(number or 1) and _first(name):
            _ACTIONS[action]()


def _first(name: str) -> bool:
    """Return whether no process has carried this one out before, and mark it as done."""
    folder = os.environ.get("EIWTRAIN_FAILPOINTS_DONE")
    if folder is None:
        return True
    with contextlib.suppress(FileExistsError):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, name).touch(exist_ok=False)
        return True
    return False


def _signal(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _hang() -> None:
    while True:
        time.sleep(3600)


_ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _signal(signal.SIGKILL),
    "term": _signal(signal.SIGTERM),
    "stop": _signal(signal.SIGSTOP),
    "hang": _hang,
}
_KNOWN = f"actions: {', '.join(_ACTIONS)}"
