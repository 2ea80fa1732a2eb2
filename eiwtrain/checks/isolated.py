"""Runs a check in a process of its own, so that neither a crash nor storage that hangs reaches the next check.

Not for what is checked. Imports nothing that may be missing: the doctor also runs where packages are.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from eiwtrain.terminal.lines import one_line

State = Literal["ok", "note", "FAIL"]

_CLEANUP_SECONDS = 5.0  # for which a check that was interrupted may still remove its files
_EXPECTED = {"ConfigError", "StorageError", "RayError", "TrackingError", "DataError"}
"""Errors, by name, whose message alone says what is wrong: their modules may need packages that are missing."""


@dataclass(frozen=True)
class Finding:
    """A line of the doctor: what was looked at, and what was found, with the remedy if it failed."""

    state: State
    subject: str
    text: str


@dataclass(frozen=True)
class Probe:
    """A file or folder that a check makes and removes again."""

    url: str
    removed: bool = False


class Report:
    """Where a check puts its findings, one by one; `send` takes each."""

    def __init__(self, send: Callable[[Finding | Probe], object]) -> None:
        self._send = send

    def ok(self, subject: str, text: str) -> None:
        """Report that all is well."""
        self._send(Finding("ok", subject, text))

    def note(self, subject: str, text: str) -> None:
        """Report what may matter later, and does not count as a failure."""
        self._send(Finding("note", subject, text))

    def fail(self, subject: str, text: str) -> None:
        """Report what must be fixed, with the remedy."""
        self._send(Finding("FAIL", subject, text))

    @contextlib.contextmanager
    def probe(self, url: str, remove: Callable[[], object]) -> Iterator[None]:
        """Have `remove` take away what the block makes at `url`; the doctor names it if that does not happen."""
        self._send(Probe(url))
        try:
            yield
        finally:
            with contextlib.suppress(Exception):  # what failed before it is named already
                remove()
                self._send(Probe(url, removed=True))


Check = Callable[[Report], None]


def run_check(
    subject: str, check: Check, seconds: float, say: Callable[[Finding], object], what: str = "the check"
) -> None:
    """Run a check in a fork of this process and give its findings to `say`; one that takes longer than `seconds`, or
    whose process dies, has failed.

    Args:
        what: the URL or thing that does not answer in that case.
    """
    context: Any = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(subject, check, seconds, sender), daemon=True)
    process.start()
    sender.close()
    left: set[str] = set()
    finished = False
    end = time.monotonic() + seconds
    try:
        while not finished and receiver.poll(max(0.0, end - time.monotonic())):
            try:
                finished = _take(receiver.recv(), left, say)
            except EOFError:
                process.join(1.0)
                say(Finding("FAIL", subject, f"the check's process ended early (exit code {process.exitcode})"))
                break
        else:
            if not finished:
                late = f"{what} did not answer within {seconds:.0f} s"
                say(Finding("FAIL", subject, f"{late}; see that it is up, and look at the network, proxies and mounts"))
    finally:
        if not finished:
            _interrupt(process, receiver, left)
        process.join(_CLEANUP_SECONDS)
        if process.is_alive():
            process.kill()
        for url in sorted(left):
            say(Finding("note", subject, f"{url} could not be removed; if it is there, delete it"))


def explain(error: BaseException) -> str:
    """Return an error as one line; an error that no check expects with its type."""
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is missing; install eiwtrain with `pip install -e .`"
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = "; ".join(str(error).splitlines()) if kinds & _EXPECTED else f"{type(error).__name__}: {error}"
    return one_line(text, 600)


def _take(item: Finding | Probe | None, left: set[str], say: Callable[[Finding], object]) -> bool:
    """Act on what the check's process sent; return whether it was the last."""
    if isinstance(item, Finding):
        say(item)
    elif isinstance(item, Probe):
        (left.discard if item.removed else left.add)(item.url)
    return item is None


def _interrupt(process: Any, receiver: Connection, left: set[str]) -> None:
    """Have the check's process remove its files and stop."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGINT)
    end = time.monotonic() + _CLEANUP_SECONDS
    with contextlib.suppress(EOFError, OSError):
        while receiver.poll(max(0.0, end - time.monotonic())):
            if _take(receiver.recv(), left, lambda _: None):
                return
    process.kill()


def _work(subject: str, check: Check, seconds: float, sender: Connection) -> None:
    """Run the check in this process, away from the terminal: only the doctor prints, and only it hears Ctrl-C."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(int(seconds + 2 * _CLEANUP_SECONDS))  # in case the doctor is killed meanwhile
    report = Report(sender.send)
    try:
        check(report)
    except KeyboardInterrupt:
        pass
    except BaseException as e:
        report.fail(subject, explain(e))
    with contextlib.suppress(OSError):
        sender.send(None)
    os._exit(0)  # without waiting for a thread that hangs
