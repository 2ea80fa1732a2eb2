"""What SIGINT and SIGTERM mean to the driver: a checkpoint first, if there is something to save."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from eiwtrain.terminal.console import Console

_SIGNALS_TO_END = 3


class Stopped(BaseException):
    """A stop signal came where there was nothing to save; like KeyboardInterrupt, no library should catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """The first SIGINT or SIGTERM stops the job in good order, the third ends the process at once.

    In good order means: while `training` is set, by a checkpoint that the workers are asked for; in `held` blocks,
    after the block; in `polled` blocks when these look; else at once, by `Stopped`.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._count = 0
        self._held = False
        self.number: int | None = None
        """The signal that came; None while none has."""
        self.training = False

    @property
    def reason(self) -> str:
        """The name of the signal that came, e.g. SIGTERM; empty while none has."""
        return signal.Signals(self.number).name if self.number else ""

    def __enter__(self) -> Stop:
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals; again after `ray.init`, which takes SIGTERM for itself."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def __exit__(self, *exc: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the block finish before a stop takes effect."""
        with self.polled():
            yield
        if self.number is not None:
            raise Stopped(self.number)

    @contextmanager
    def polled(self) -> Iterator[None]:
        """The block looks at `number` and raises `Stopped` itself: Ray's C code does not bear it out of a handler."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        count = self._count = self._count + 1  # another may come while this one is answered
        self.number = self.number or number
        if count >= _SIGNALS_TO_END:
            os._exit(128 + number)
        name = signal.Signals(number).name
        if count > 1:
            self._console.note(f"{name}: once more to end at once")
        elif self.training:
            self._console.note(f"{name}: a checkpoint first, then the end ({_SIGNALS_TO_END - 1} times more: at once)")
        elif not self._held:
            raise Stopped(number)


def end_on_signals() -> None:
    """From now on SIGTERM, and SIGHUP where nobody ignores it (nohup does), end this program by SystemExit, in order.

    A second one does not break off what the first has begun: a terminal that closes sends two.
    """
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]

    def end(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, end)
