"""How far the writing is: a bar on a terminal, a line every few seconds anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

_LINE_EVERY = 5.0  # seconds between two lines in a log


class Progress:
    """Counts images out of `total`. Use as a context manager; `quiet` counts and shows nothing."""

    def __init__(self, total: int, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.total, self.made, self.skipped = total, 0, 0
        self._stream = stream if stream is not None else sys.stderr
        self._start = self._said = self._first_at = time.monotonic()
        self._first = 0
        self._quiet = quiet
        self._bar: Any = None
        if not quiet and self._stream.isatty():
            self._bar = tqdm(total=total, unit=" images", file=self._stream, smoothing=0.05, dynamic_ncols=True)

    def update(self, n: int, stood: bool = False) -> None:
        """`n` more images are done; they are part of the rate unless they stood already."""
        if stood:
            self.skipped += n
        else:
            if not self.made:
                self._first, self._first_at = n, time.monotonic()
            self.made += n
        if self._bar is not None:
            self._bar.initial += n * stood
            self._bar.update(n)
        elif not self._quiet and time.monotonic() - self._said >= _LINE_EVERY:
            self._line()

    def expect(self, n: int) -> None:
        """`n` more images have come to be done."""
        self.total += n
        if self._bar is not None:
            self._bar.total += n

    @property
    def rate(self) -> float:
        """Images made a second, since the first of them came: before that workers were starting."""
        made, since = self.made - self._first, self._first_at
        if not made:
            made, since = self.made, self._start
        return made / max(time.monotonic() - since, 1e-9)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def _line(self) -> None:
        self._said = time.monotonic()
        done = self.made + self.skipped
        rate = self.rate
        pace = f", {rate:,.0f} images/s, {_duration((self.total - done) / rate)} left" if rate else ""
        print(f"{done:,} of {self.total:,} images{pace}", file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
