"""What `lease.json` says: who trains a run, and every period in which somebody did. Not for taking it (`lease`)."""

from __future__ import annotations

import json
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any, Literal

from eiwtrain import storage
from eiwtrain.storage import holders
from eiwtrain.storage.holders import Holder
from eiwtrain.storage.swap import read

FILE = "lease.json"
_KEPT = 1000  # holdings that the history lists; of earlier ones it keeps the sums
_FORMAT = "eiwtrain-lease/1"

HoldingState = Literal["running", "finished", "stopped", "failed", "died"]


@dataclass(frozen=True)
class Holding:
    """One period in which a process held the lease. Times are Unix times in seconds; if the process died, `ended` is
    its last heartbeat."""

    began: float
    ended: float
    outcome: HoldingState
    failures: int = 0
    """Restarts of the workers within it (`Lease.failed`)."""
    cost: float = 0.0
    """What its workers have cost (`Lease.cost`)."""
    why: str = ""
    """Why its workers failed the last time, and why it ended, in a line; empty where neither is known."""


@dataclass(frozen=True)
class Record:
    """Content of `lease.json`. The holding is "running" until the lease is given back, and ends with its last
    heartbeat. In the file it is called "attempt"."""

    name: str
    owner: str
    holder: Holder
    beat: int
    holding: Holding
    number: int = 0  # number of the driver's attempt that may write
    earlier: tuple[Holding, ...] = ()
    folded_seconds: float = 0.0  # sum over the holdings before `earlier`
    folded_failures: int = 0
    folded_cost: float = 0.0

    @property
    def held(self) -> bool:
        """Whether the lease was not given back."""
        return self.holding.outcome == "running"

    @property
    def last(self) -> Holding:
        """The last holding; "running" while its process may live, and "died" once it is known without waiting that it
        does not."""
        gone = self.held and holders.is_gone(self.holder)
        return replace(self.holding, outcome="died") if gone else self.holding

    def as_bytes(self) -> bytes:
        """Return the content of the file."""
        raw = asdict(self) | {"format": _FORMAT, "earlier": [astuple(a) for a in self.earlier]}
        raw["attempt"] = raw.pop("holding")
        return json.dumps(raw, separators=(",", ":")).encode()

    def history(self) -> dict[str, Any]:
        """Return the fields of the next holder's record that describe this and the earlier holdings."""
        last = replace(self.holding, outcome="died") if self.held else self.holding
        known = (*self.earlier, last)
        old, kept = known[:-_KEPT], known[-_KEPT:]
        return {
            "earlier": kept,
            "folded_seconds": self.folded_seconds + seconds_of(old),
            "folded_failures": self.folded_failures + failures_of(old),
            "folded_cost": self.folded_cost + sum(h.cost for h in old),
        }


def read_record(root: str) -> Record | None:
    """Return what the lease of the run at `root` says; None if there is no lease.

    Raises:
        StorageError: it cannot be read.
    """
    content = read(storage.join(root, FILE))
    return None if content is None else parse(content)


def parse(data: bytes) -> Record | None:
    """Return the record in `data`; None if it is not one."""
    try:
        raw = json.loads(data)
        if raw.pop("format") != _FORMAT:
            return None
        raw["holder"], raw["holding"] = Holder(**raw["holder"]), Holding(**raw.pop("attempt"))
        raw["earlier"] = tuple(Holding(*a) for a in raw["earlier"])
        return Record(**raw)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def seconds_of(holdings: tuple[Holding, ...]) -> float:
    """Return the sum of their durations, seconds."""
    return sum(max(0.0, h.ended - h.began) for h in holdings)


def failures_of(holdings: tuple[Holding, ...]) -> int:
    """Return how many of them died or failed, and how often workers were started again within them."""
    return sum(h.failures + (h.outcome in ("died", "failed")) for h in holdings)
