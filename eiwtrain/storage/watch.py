"""Finds out from outside whether the holder of a lease lives, by whether its lease changes: clocks of machines differ.

Not for taking a lease, which is `eiwtrain.storage.lease`.
"""

from __future__ import annotations

import time
from dataclasses import replace

from eiwtrain.storage import lease
from eiwtrain.storage.lease import Holding

SECONDS = 60.0  # for which a lease must stay the same: many renewals, as storage may be away for a moment


class Watch:
    """Looks at the leases of any number of runs, each of them now and then."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[tuple[str, Holding], float]] = {}

    @property
    def is_unsure(self) -> bool:
        """Whether a holder was seen that may live or not, which a look in `SECONDS` will show."""
        return bool(self._seen)

    def look(self, root: str) -> tuple[str, Holding] | None:
        """Return what `lease.look` does, with the outcome "died" also where the lease has not changed for `SECONDS`.

        Raises:
            StorageError: the lease cannot be read.
        """
        found = lease.look(root)
        if found is None or found[1].outcome != "running":
            self._seen.pop(root, None)
            return found
        seen, since = self._seen.setdefault(root, (found, time.monotonic()))
        if seen != found:  # it lives
            self._seen.pop(root)
            return found
        if time.monotonic() - since < SECONDS:
            return found
        owner, holding = found
        return owner, replace(holding, outcome="died")
