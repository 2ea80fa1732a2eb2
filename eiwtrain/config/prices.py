"""The notation of `workers.price_per_hour`, and what workers cost by it. Not for how much was spent: that is
`eiwtrain.train.goodput`, nor for how a sum of money is printed (`eiwtrain.terminal.console`)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

Price = float | dict[str, float]
"""What one worker costs in an hour: one number, or a number for each instance type."""

TYPE_LABELS = ("instance-type", "ray.io/node-group", "ray.io/accelerator-type")
"""Labels of a Ray node that may hold its instance type: one that its operator sets, the name of its node type or worker
group, the kind of its GPU."""

_TYPE = re.compile(r"[A-Za-z0-9][\w.:/-]{0,99}", re.ASCII)  # as MLflow takes the name of a param


def parse(value: object) -> Price | None:
    """Return the prices that a config gives.

    Raises:
        ValueError: it is neither a price nor prices by instance type.
    """
    if value is None or not isinstance(value, dict):
        return None if value is None else _price(value)
    if not value:
        raise ValueError("there is no price in it; give a number, or a number for each instance type, or null")
    for name in value:
        if not isinstance(name, str) or not _TYPE.fullmatch(name):
            raise ValueError(
                "an instance type must be a word of letters, digits and . : / - _ (quote a number), with its price "
                "behind it: {g6.xlarge: 0.8}"
            )
    return {name: _price(price) for name, price in value.items()}


def _price(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(
            "a price must be a number, 0 or more, or a number for each instance type, {g6.xlarge: 0.8}, with no "
            "currency beside it"
        )
    return float(value)


def of_node(price: Price, labels: Mapping[str, str]) -> float | None:
    """Return the price of a worker an hour on a node with these labels; None if there is none for its type."""
    if not isinstance(price, dict):
        return price
    return next((price[labels[label]] for label in TYPE_LABELS if labels.get(label) in price), None)


def bounds(price: Price) -> tuple[float, float]:
    """Return the lowest and the highest price of a worker an hour."""
    return (min(price.values()), max(price.values())) if isinstance(price, dict) else (price, price)


def per_hour(price: Price | None, nodes: Sequence[Mapping[str, str]]) -> float:
    """Return the price of all workers an hour; 0 without prices.

    Args:
        nodes: labels of each worker's node. One whose type has no price costs as much as the dearest.
    """
    if price is None:
        return 0.0
    dearest = bounds(price)[1]
    found = (of_node(price, labels) for labels in nodes)
    return math.fsum(dearest if one is None else one for one in found)
