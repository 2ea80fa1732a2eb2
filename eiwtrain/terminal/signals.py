"""What stop signals mean to a program here: the first stops it in good order, and a second one does not break that off.

`Stop` is for the main job, which may have something to save first; `exit_on_signals` for all other programs. Exit codes
are the shell's: 128 and the signal's number.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from eiwtrain.terminal.console import Console

_SIGNALS_TO_EXIT = 3


class Interrupted(BaseException):
    """A stop signal came where there was nothing to save; like KeyboardInterrupt, no library should catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """The first SIGINT, SIGTERM or SIGHUP stops the job in good order, the third exits at once.

    A terminal that closes sends SIGHUP, often twice: a repeated one is not counted, and one that is ignored, as under
    nohup, stays so.

    In good order means: while `training` is set, by a checkpoint that the workers are asked for; in `held` blocks,
    after the block; in `polled` blocks when these look; else at once, by `Interrupted`.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._count = 0
        self._held = False
        self._numbers: list[signal.Signals] = []
        self.number: int | None = None
        """The signal that came; None while there was none."""
        self.training = False

    @property
    def reason(self) -> str:
        """The name of the signal that came, e.g. SIGTERM; empty while there was none."""
        return signal.Signals(self.number).name if self.number else ""

    def __enter__(self) -> Stop:
        self._numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self._numbers.append(signal.SIGHUP)
        for number in self._numbers:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number in self._numbers:
            signal.signal(number, signal.SIG_DFL)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let the block finish before a stop takes effect."""
        with self.polled():
            yield
        if self.number is not None:
            raise Interrupted(self.number)

    @contextlib.contextmanager
    def polled(self) -> Iterator[None]:
        """Let the block look at `number` and raise `Interrupted` itself: Ray's C code does not survive an exception
        from a signal handler."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and self.number is not None:
            return
        count = self._count = self._count + 1  # another may come while this one is answered
        self.number = self.number or number
        if count >= _SIGNALS_TO_EXIT:
            os._exit(128 + number)
        name = signal.Signals(number).name
        if count > 1:
            self._console.note(f"{name}: once more to exit at once")
        elif self.training:
            more = _SIGNALS_TO_EXIT - 1
            self._console.note(f"{name}: a checkpoint first, then the job stops ({more} times more: at once)")
        elif not self._held:
            raise Interrupted(number)


def exit_on_signals(last_words: str = "") -> None:
    """Have SIGTERM, and SIGHUP unless it is ignored (nohup does that), stop this program by SystemExit from now on.

    A second one changes nothing: a terminal that closes sends two. SIGINT stays Python's KeyboardInterrupt.

    Args:
        last_words: a line for standard error.
    """
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]

    def leave(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        if last_words:
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(last_words, file=sys.stderr)
        raise SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, leave)
