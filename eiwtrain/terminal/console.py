"""What the main job prints: notes that stay, and a training line that a terminal overwrites."""

from __future__ import annotations

import shutil
import sys
from typing import Any


class Console:
    """Lines on standard output; on a terminal the training line is refreshed in place, else one line a time."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._transient = False

    def note(self, text: str = "") -> None:
        """Print a line that stays."""
        self._clear()
        print(text, flush=True)

    def progress(self, p: dict[str, Any]) -> None:
        """Print the training line: see `training_line`."""
        line = training_line(p)
        if not self._terminal:
            print(line, flush=True)
            return
        self._clear()
        print(line[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        self._transient = True

    def _clear(self) -> None:
        if self._transient:
            print("\r\033[K", end="")
            self._transient = False


def training_line(p: dict[str, Any]) -> str:
    """Step, images, bits/dim, images/s, share of time spent waiting for data, goodput of the run so far, time left;
    storage failures, if any."""
    faults = f"  {p['faults']} storage faults ridden out" if p["faults"] else ""
    return (
        f"step {p['step']:>6,}/{p['max_steps']:,}  {p['images']:>9,} images  {p['bits_per_dim']:.3f} bits/dim  "
        f"{p['images_per_second']:,.1f} images/s  data wait {p['data_wait']:.0%}  "
        f"goodput {p['goodput']:.0%}  ETA {duration(p['eta'])}{faults}"
    )


def duration(seconds: float) -> str:
    """`1:05`, `2:03:04`, `3d 04:05`."""
    minutes, s = divmod(round(max(0.0, seconds)), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{m:02d}"
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
