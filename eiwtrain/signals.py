"""What SIGINT and SIGTERM mean to the driver: a checkpoint first, if there is something to save."""

from __future__ import annotations

import os
import signal
from types import FrameType

from eiwtrain.console import Console


class Stopped(BaseException):
    """A stop signal came where there was nothing to save; like KeyboardInterrupt, no library should catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """The first SIGINT or SIGTERM asks for a checkpoint; the third ends the process at once.

    While `raises` is set, that is while nothing is being trained, the first one ends the job by `Stopped`.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._count = 0
        self.number: int | None = None
        self.raises = True

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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self.number = self.number or number
        if self._count >= 3:
            os._exit(128 + number)
        if self.raises and self._count == 1:
            raise Stopped(number)
        if self._count == 1:
            name = signal.Signals(number).name
            self._console.note(f"{name}: finishing the step and writing a checkpoint (twice more to end without)")
