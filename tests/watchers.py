"""Finds the watcher processes of drivers that a test has started."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable

import psutil

_MARK = "EIWTRAIN_TEST_MARK"


def mark() -> dict[str, str]:
    """Return an environment; `marked` finds its processes and their children."""
    return os.environ | {_MARK: uuid.uuid4().hex}


def marked(environment: dict[str, str]) -> list[psutil.Process]:
    """Return the living processes that have the mark of that environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == environment[_MARK] and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def watchers(environment: dict[str, str]) -> list[psutil.Process]:
    """Return the marked processes that are watchers."""
    found = []
    for process in marked(environment):
        with contextlib.suppress(psutil.Error):
            if "eiwtrain.driver.watcher" in process.cmdline():
                found.append(process)
    return found


def wait_until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait until `true()`; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)
