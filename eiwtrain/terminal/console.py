"""Prints the main job's output: notes that stay, and a training line that a terminal overwrites.

Not for where its figures come from: that is `eiwtrain.train.report`.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingLine:
    """The training line: where the run stands, and how fast it goes."""

    step: int
    max_steps: int
    images: int
    """Images that the run has trained on so far."""
    bits_per_dim: float
    images_per_second: float
    """Over all workers."""
    data_wait: float
    """Share of the time of the steps that was spent waiting for data, 0..1."""
    faults: int
    """Storage failures that were retried with success."""
    goodput: float
    """Goodput of the run so far, 0..1."""
    eta: float
    """Seconds until the last step."""
    cost: float | None = None
    """What the run has cost so far; None without prices."""
    cost_at_end: float = 0.0
    """What it will have cost at the last step."""
    wasted: float = 0.0
    """The part of `cost` for preemptions, crashes and waits."""


class Console:
    """Lines on standard output; on a terminal the training line is refreshed in place, else each is a new line."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._transient = False

    def note(self, text: str = "") -> None:
        """Print a line that stays."""
        self._print(f"{text}\n")

    def progress(self, p: TrainingLine) -> None:
        """Print the training line."""
        line = training_line(p)
        if not self._terminal:
            self._print(f"{line}\n")
            return
        self._print(line[: shutil.get_terminal_size().columns - 1])
        self._transient = True

    def _print(self, text: str) -> None:
        """Print the text as one piece, in the place of a training line that a terminal shows."""
        clear, self._transient = "\r\033[K" if self._transient else "", False
        print(clear + text, end="", flush=True)


def training_line(p: TrainingLine) -> str:
    """Return the training line as text; storage failures are left out where there are none. Bits/dim in training are of
    one draw of noise."""
    cost = "" if p.cost is None else f"  cost {money(p.cost)} of {money(p.cost_at_end)}, {money(p.wasted)} wasted"
    faults = f"  {p.faults} storage faults retried" if p.faults else ""
    return (
        f"step {p.step:>6,}/{p.max_steps:,}  {p.images:>9,} images  {p.bits_per_dim:.3f} bits/dim (ELBO)  "
        f"{p.images_per_second:,.1f} images/s  data wait {p.data_wait:.0%}  "
        f"goodput {p.goodput:.0%}  ETA {duration(p.eta)}{cost}{faults}"
    )


def money(amount: float) -> str:
    """Return a sum of money, in whatever currency: `1,234.50`; `0.0021` where two decimals would show too little."""
    return f"{amount:,.2f}" if amount >= 0.1 or not amount else f"{amount:.2g}"


def duration(seconds: float) -> str:
    """Return a time as people write it: `1:05`, `2:03:04`, `3d 04:05`."""
    minutes, s = divmod(round(max(0.0, seconds)), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{m:02d}"
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
