"""Shows how far the writing is: a bar on a terminal, a line every few seconds anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from eiwtrain.terminal.console import duration

_LINE_EVERY = 5.0  # seconds between two lines in a log


class Progress:
    """Counts images out of `total`. Use as a context manager; with `quiet` it counts and shows nothing."""

    def __init__(self, total: int, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.total, self.made, self.skipped = total, 0, 0
        self._stream = stream if stream is not None else sys.stderr
        self._start = self._printed_at = self._first_at = time.monotonic()
        self._first = 0
        self._quiet = quiet
        self._bar: Any = None
        if not quiet and self._stream.isatty():
            self._bar = tqdm(total=total, unit=" images", file=self._stream, smoothing=0.05, dynamic_ncols=True)

    def update(self, n: int, skipped: bool = False) -> None:
        """Count `n` more images; those of shards that were skipped, being there already, are no part of the rate."""
        if skipped:
            self.skipped += n
        else:
            if not self.made:
                self._first, self._first_at = n, time.monotonic()
            self.made += n
        if self._bar is not None:
            self._bar.initial += n * skipped
            self._bar.update(n)
        elif not self._quiet and time.monotonic() - self._printed_at >= _LINE_EVERY:
            self._line()

    def expect(self, n: int) -> None:
        """Add `n` images to the total."""
        self.total += n
        if self._bar is not None:
            self._bar.total += n

    @property
    def rate(self) -> float:
        """Images written a second, counted from the first one: before that, workers were starting."""
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
        self._printed_at = time.monotonic()
        done = self.made + self.skipped
        rate = self.rate
        pace = f", {rate:,.0f} images/s, {duration((self.total - done) / rate)} left" if rate else ""
        print(f"{done:,} of {self.total:,} images{pace}", file=self._stream, flush=True)
