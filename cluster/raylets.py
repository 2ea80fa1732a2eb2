"""What a raylet's command line says of its node, and the command that has Ray drain a node.

Not for running either; whoever has Ray installed can use it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence


def node_id(words: Sequence[str]) -> str | None:
    """Ray's hex id of the node whose raylet has this command line; None where that is no raylet's."""
    found = re.search(r"--node_id=(\w+)", " ".join(words))
    return found[1] if found else None


def drain_command(address: str, node_id: str, seconds: int, reason: str) -> list[str]:
    """Has Ray put nothing new on a node and tell those on it to leave, as on a cloud's preemption notice.

    Args:
        address: HOST:PORT of the cluster.
        seconds: until the node ends.
        reason: for people.
    """
    return [
        sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={address}", f"--node-id={node_id}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION", f"--reason-message={reason}",
        f"--deadline-remaining-seconds={seconds}",
    ]  # fmt: skip
