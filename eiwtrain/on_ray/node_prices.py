"""What workers cost on the nodes of a cluster, by the labels that Ray keeps of each node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eiwtrain.config import Workers, prices
from eiwtrain.on_ray import session
from eiwtrain.on_ray.address import RayError


def price_of(workers: Workers, nodes: Sequence[str]) -> float:
    """Return what workers on these nodes cost together in an hour, by `workers.price_per_hour`; 0 without prices."""
    labels = _labels() if isinstance(workers.price_per_hour, dict) else {}
    return prices.per_hour(workers.price_per_hour, [labels.get(node, {}) for node in nodes])


def check_prices(workers: Workers) -> None:
    """Check that there is a price for a worker on every node that can have one.

    Raises:
        RayError: there is none.
    """
    price = workers.price_per_hour
    if not isinstance(price, dict):
        return
    for labels in _labels(session.resources(workers)).values():
        if prices.of_node(price, labels) is None:
            there = [f"{name}={labels[name]}" for name in prices.TYPE_LABELS if name in labels]
            raise RayError(
                f"workers.price_per_hour: no price for a node that is {' or '.join(there) or 'without instance type'}; "
                f"add one, give a single number, or start the node with `--labels instance-type={min(price)}`"
            )


def _labels(least: Mapping[str, float] | None = None) -> dict[str, dict[str, str]]:
    """Return the labels of each node that has at least these resources, by its id."""
    import ray

    return {
        node["NodeID"]: dict(node.get("Labels") or {})
        for node in ray.nodes()
        if all(node["Resources"].get(kind, 0) >= n for kind, n in (least or {}).items())
    }
