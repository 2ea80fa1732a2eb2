"""Goodput: the share of wall time, over all attempts of a run, that went into steps that count."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any


@dataclass
class Clock:
    """Where the time of a run goes. Seconds; `began` is a Unix time.

    Workers that are restarted under the same driver lose the time since the last checkpoint: it stays in the wall time
    alone. What a driver did after its last checkpoint, before it was killed itself, is in neither.
    """

    began: float
    """When this attempt's driver started."""
    wall_before: float = 0.0
    """Wall time of earlier attempts, up to the last checkpoint of each."""
    productive: float = 0.0
    """Time in training steps that led to the present weights, waiting for data excepted."""
    data_wait: float = 0.0
    """Time those steps waited for data."""

    @property
    def wall(self) -> float:
        """Wall time of the run so far."""
        return self.wall_before + time.time() - self.began

    @property
    def goodput(self) -> float:
        """Productive share of the wall time, 0..1."""
        return min(1.0, self.productive / self.wall) if self.wall > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "began": self.began,
            "wall_before": self.wall_before,
            "wall": self.wall,
            "productive": self.productive,
            "data_wait": self.data_wait,
        }

    @classmethod
    def resumed(cls, saved: dict[str, Any] | None, began: float) -> Clock:
        """The clock of the attempt that began at `began`, going on from a checkpoint's."""
        if saved is None:
            return cls(began)
        same_attempt = saved["began"] == began  # workers restarted under the same driver
        wall_before = saved["wall_before"] if same_attempt else saved["wall"]
        return cls(began, wall_before, saved["productive"], saved["data_wait"])
