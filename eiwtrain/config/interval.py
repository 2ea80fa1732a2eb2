"""An interval as `checkpoint.every` writes it. Not for when it is over: that is `eiwtrain.train.pace`."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Every(NamedTuple):
    """What `checkpoint.every` says."""

    unit: Literal["steps", "seconds", "auto"]
    amount: float
    """Of the unit; 0 with auto."""


def parse(value: int | str) -> Every:
    """Read `checkpoint.every`: steps (500), a time with its unit (90s, 10m, 1.5h), or auto.

    Raises:
        ValueError: it is none of these.
    """
    if value == "auto":
        return Every("auto", 0.0)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])|(\d+)", str(value).replace(" ", ""), re.ASCII)
    if match is not None:
        time, unit, steps = match.groups()
        every = Every("steps", int(steps)) if steps else Every("seconds", float(time) * _UNITS[unit])
        if every.amount > 0:
            return every
    raise ValueError(f"{value!r} is no interval: write steps (500), a time with its unit (90s, 10m, 1.5h), or auto")
