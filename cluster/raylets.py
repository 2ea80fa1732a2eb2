"""Reads the node's id from a raylet's command line, and builds the command that makes Ray drain a node.

Not for running either; anyone who has Ray installed can use it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence


def node_id(words: Sequence[str]) -> str | None:
    """Return Ray's hex id of the node whose raylet has this command line; None where it is not a raylet's."""
    found = re.search(r"--node_id=(\w+)", " ".join(words))
    return found[1] if found else None


def drain_command(address: str, node_id: str, seconds: int, reason: str) -> list[str]:
    """Return the command that makes Ray put nothing new on a node, as on a cloud's preemption notice; jobs on it leave.

    Args:
        address: HOST:PORT of the cluster.
        seconds: until the node stops.
        reason: for people.
    """
    return [
        sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={address}", f"--node-id={node_id}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION", f"--reason-message={reason}",
        f"--deadline-remaining-seconds={seconds}",
    ]  # fmt: skip
