"""The limits of the config at which a run stops before its last step: time and money. Rank 0 looks at them."""

from __future__ import annotations

import time

from eiwtrain.config import Train
from eiwtrain.train.goodput import Clock


def passed(train: Train, began: float, clock: Clock) -> str:
    """Return why the run is to stop, for people; empty while it may continue.

    Args:
        began: Unix time at which the driver started.
        clock: rank 0's.
    """
    if train.max_hours is not None and time.time() - began > train.max_hours * 3600:
        return "its time limit (train.max_hours)"
    if train.max_cost is not None and clock.cost >= train.max_cost:
        return "its cost limit (train.max_cost)"
    return ""
