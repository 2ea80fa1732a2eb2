"""The notation of `checkpoint.every`. Not for deciding when an interval is over: that is `eiwtrain.train.pace`."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Every(NamedTuple):
    """An interval between checkpoints."""

    unit: Literal["steps", "seconds", "auto"]
    amount: float
    """Steps or seconds; 0 with auto."""


def parse(value: int | str) -> Every:
    """Read `checkpoint.every`: steps (500), a time with its unit (90s, 10m, 1.5h), or auto.

    Raises:
        ValueError: the value has none of these forms.
    """
    if value == "auto":
        return Every("auto", 0.0)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])|(\d+)", str(value).replace(" ", ""), re.ASCII)
    if match is not None:
        time, unit, steps = match.groups()
        every = Every("steps", int(steps)) if steps else Every("seconds", float(time) * _UNITS[unit])
        if every.amount > 0:
            return every
    raise ValueError(f"{value!r} is not an interval: write steps (500), a time with its unit (90s, 10m, 1.5h), or auto")
