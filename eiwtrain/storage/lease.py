"""Who trains a run: a lease in its storage with a heartbeat, and the history of all who held it.

The driver holds the `Lease`; a worker asks its `Guard` before each write of the run. Not for what is written.

Why two jobs never write at the same time:

- A heartbeat replaces `lease.json` by compare-and-swap every _BEAT_SECONDS. Of several processes that try to take it
  one succeeds, and a holder that has been replaced cannot renew.
- If a lease was not given back, it can be taken once its content has been the same for _STALE_SECONDS of the taker's
  own clock, hence that long after the last renewal or later.
- A writer begins a write only within _STALE_SECONDS / 2 of a renewal and within _LOOK_SECONDS of a look. It dates the
  renewal to its last look that found other content, or to the time that the renewal names, whichever is later. So when
  a lease is taken, no write has begun for _STALE_SECONDS / 2, and a holder that comes back is refused.
- A taker does not wait if the holder gave the lease back, or if the holder's process is gone from this very machine.
  Workers that outlive such a driver (Ray stops them within seconds) write for _LOOK_SECONDS at most, as do the workers
  of the same driver's previous attempt. A new attempt takes longer to start its own, and waits that long
  (`Guard.outwait`) before it deletes what they may be about to commit.
- What remains is one write that is in flight for longer than that, such as that of a process stopped in the middle. It
  is harmless to checkpoints: each has its own folder and counts only with its manifest, which is written last. If its
  parts have been deleted meanwhile, the writer takes the manifest back. If the writer is killed before that, readers
  pass over a manifest without its parts (`checkpoints.survey`).

Clocks: durations are measured by the process's own clock, which also counts while the machine sleeps. Clocks of two
machines are compared only where it makes a writer wait (a clock that is behind by less than _STALE_SECONDS / 2 does no
harm, one that is ahead delays a write by a heartbeat), and to print when something was.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from eiwtrain import storage
from eiwtrain.storage import holders
from eiwtrain.storage.holdings import FILE, Holding, HoldingState, Record, failures_of, parse, read_record, seconds_of
from eiwtrain.storage.swap import read, swap
from eiwtrain.terminal.console import duration
from eiwtrain.terminal.lines import one_line
from eiwtrain.testing import failpoints

_BEAT_SECONDS = 5.0
_STALE_SECONDS = 30.0
_LOOK_SECONDS = 3.0  # a guard trusts what it has read for so long
_POLL_SECONDS = 1.0  # between two looks while waiting
_MOST_WORDS = 200  # characters of why a holding ended: all are written at each heartbeat
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

_log = logging.getLogger("eiwtrain.storage.lease")


class LeaseHeld(RuntimeError):
    """Another process is training the run; one line says which."""


class LeaseLost(RuntimeError):
    """The lease was ours and no longer is; one line says which process took it."""


class Lease:
    """The right to train a run, kept by a heartbeat in a thread until `release`; `acquire` makes one."""

    def __init__(self, url: str, record: Record, note: Callable[[str], None]) -> None:
        self._url, self._record, self._note = url, record, note
        self._written: bytes | None = record.as_bytes()
        self.cost = 0.0
        """What the workers of this holding have cost so far; the next heartbeat records what is set."""
        self._failures = 0
        self._why = ""
        self._lost: str | None = None
        self._ending, self._soon = threading.Event(), threading.Event()
        self._changing = threading.Lock()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")
        self._thread.start()

    @classmethod
    def acquire(cls, root: str, name: str, note: Callable[[str], None]) -> Lease:
        """Take the lease of the run `name` at the URL `root`. Wait for up to _STALE_SECONDS where only time can show
        whether another holder lives.

        Args:
            note: called with one line that says what is waited for, and later what could not be done.

        Raises:
            LeaseHeld: another holder is alive.
            StorageError: the lease cannot be read or written, or the file is not a lease.
        """
        url = storage.join(root, FILE)
        watched: bytes | None = None
        since = 0.0
        while True:
            found = read(url)
            before = None if found is None else parse(found)
            if found is not None and before is None:
                raise storage.StorageError(f"{url} is not a lease; delete it if no other job trains this run")
            if before is not None and before.held and not holders.is_gone(before.holder):
                if watched is None:
                    watched, since = found, _now()
                    note(
                        f"run.name '{name}' was {_last_seen(before)} and not given back; "
                        f"waiting up to {_STALE_SECONDS:.0f} s for a sign of life"
                    )
                if found != watched:
                    raise LeaseHeld(
                        f"run.name: '{name}' is being trained by {before.holder} (last sign of life just now); "
                        "wait for it, stop it, or use another run.name"
                    )
                if _now() - since < _STALE_SECONDS:
                    time.sleep(_POLL_SECONDS)
                    continue
            began = time.time()
            history = before.history() if before is not None else {}
            record = Record(name, uuid.uuid4().hex, holders.here(), 0, Holding(began, began, "running"), **history)
            if swap(url, found, record.as_bytes()):
                lease = cls(url, record, note)
                failpoints.reach("lease.taken")
                return lease

    @property
    def owner(self) -> str:
        """Random id of this holding of the lease, in hex."""
        return self._record.owner

    @property
    def earlier(self) -> tuple[Holding, ...]:
        """The earlier holdings, oldest first; if there are more than 1,000, the newest of them."""
        return self._record.earlier

    @property
    def earlier_seconds(self) -> float:
        """Sum of the durations of all earlier holdings, seconds."""
        return self._record.folded_seconds + seconds_of(self._record.earlier)

    @property
    def earlier_cost(self) -> float:
        """Sum of the costs of all earlier holdings."""
        return self._record.folded_cost + sum(h.cost for h in self._record.earlier)

    @property
    def failures(self) -> int:
        """Number of earlier holdings that died or failed, and of the failures counted by `failed`, in this one too."""
        return self._record.folded_failures + failures_of(self._record.earlier) + self._failures

    @property
    def lost(self) -> str | None:
        """One line that says which process has taken the lease; None while it is ours as far as this process knows."""
        return self._lost

    def failed(self, why: str = "") -> None:
        """Count one more failure within this holding; the next heartbeat records it.

        Args:
            why: why its workers failed.
        """
        self._failures += 1
        self._why = why and f"its workers failed: {one_line(why, _MOST_WORDS)}"

    def next_attempt(self) -> None:
        """Begin a new attempt of this driver, whose workers are about to start. Guards of earlier workers, which may
        still live behind a broken network, then find the lease lost."""
        with self._changing:
            self._record = replace(self._record, number=self._record.number + 1)
        self._soon.set()

    def guard(self) -> Guard:
        """Return the guard that a worker of the present attempt asks before it writes."""
        return Guard(self._url, self.owner, self._record.number)

    def release(self, outcome: HoldingState, why: str = "") -> None:
        """Stop the heartbeat and give the lease back with `outcome`, and why. All workers must have stopped before.

        A lease that is lost or already given back is left as it is. If storage does not answer, that is only noted.
        """
        self._ending.set()
        self._soon.set()
        self._thread.join()
        if self._lost is not None or not self._record.held:
            return
        self._why = "; ".join(filter(None, [self._why, one_line(why, _MOST_WORDS)]))
        failpoints.reach("lease.before-release")
        try:
            with storage.impatient():
                self._renew(outcome)
        except storage.StorageError as e:
            self._note(f"the lease could not be given back ({e}); on another machine the next start waits for it")

    def _keep(self) -> None:
        with storage.impatient():  # a renewal that waited longer would not notice that the lease is lost
            while self._lost is None:
                self._soon.wait(_BEAT_SECONDS)
                self._soon.clear()
                if self._ending.is_set():
                    return
                try:
                    self._renew("running")
                except storage.StorageError:
                    pass  # logged by the retries; the next one may succeed
                except Exception:  # the heartbeat of a living driver must not stop
                    _log.exception("%s: renewing the lease", self._url)

    def _renew(self, outcome: HoldingState) -> None:
        """Write that this process lives, or how it ended; set `lost` if the lease has another owner."""
        with self._changing:
            r = self._record
            holding = Holding(r.holding.began, time.time(), outcome, self._failures, self.cost, self._why)
            self._record = r = replace(r, beat=r.beat + 1, holding=holding)
        data = r.as_bytes()
        while not swap(self._url, self._written, data):
            content = read(self._url)
            found = None if content is None else parse(content)
            if found is not None and found.owner != self.owner:
                self._lost = f"run.name: '{r.name}' was taken over by {found.holder}"
                return
            self._written = content
        self._written = data


class Guard:
    """A check that lets a worker write only while its driver is seen to hold the lease. It reaches workers by pickling;
    any number of threads may share one.

    Args:
        url: URL of the lease.
        owner: `Lease.owner` of the driver.
        number: number of the driver's attempt to which the worker belongs (`Lease.next_attempt`).
    """

    def __init__(self, url: str, owner: str, number: int = 0) -> None:
        self._url, self._owner, self._number = url, owner, number
        self._lock = threading.Lock()
        self._content: bytes | None = None
        self._looked = self._good_until = -math.inf
        self._lost: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Guard, (self._url, self._owner, self._number)

    def check(self, give_up: Callable[[], bool] = lambda: False) -> None:
        """Return once the lease is seen to be ours and alive. That is usually at once, and without a look if the last
        one was less than _LOOK_SECONDS ago. While the lease is not renewed, or storage does not answer, wait.

        Args:
            give_up: called about once a second during the wait; true ends it.

        Raises:
            LeaseLost: another process has taken the lease, or it was given back; this is final.
            StorageError: `give_up` returned true.
        """
        while not self._is_alive():
            if give_up():
                raise storage.StorageError(f"{self._url}: it could not be seen whether this job still holds the lease")
            time.sleep(_POLL_SECONDS)

    def outwait(self, give_up: Callable[[], bool] = lambda: False) -> None:
        """Return once no guard of an earlier attempt or an earlier holder can still let its process write. Call it
        after `check`.

        Args:
            give_up: as for `check`.

        Raises:
            StorageError: `give_up` returned true.
        """
        end = _now() + _LOOK_SECONDS
        while _now() < end:
            if give_up():
                raise storage.StorageError(f"{self._url}: others may still write")
            time.sleep(_POLL_SECONDS)

    def _is_alive(self) -> bool:
        with self._lock:
            now = _now()
            if self._lost is None and not (now < self._looked + _LOOK_SECONDS and now < self._good_until):
                try:
                    with storage.impatient():
                        self._look()
                except storage.StorageError:
                    return False
            if self._lost is not None:
                raise LeaseLost(self._lost)
            return _now() < self._good_until

    def _look(self) -> None:
        now = _now()
        content = read(self._url)
        found = None if content is None else parse(content)
        if content is None or found is None:  # the holder's next heartbeat writes it again
            return
        if found.owner != self._owner:
            self._lost = f"run.name: '{found.name}' was taken over by {found.holder}"
        elif found.number > self._number:
            self._lost = f"run.name: another attempt at '{found.name}' has begun meanwhile"
        elif found.number < self._number:  # the next heartbeat will raise it
            return
        elif not found.held:
            self._lost = f"run.name: the attempt at '{found.name}' has ended ({found.holding.outcome})"
        elif content != self._content:
            age = max(0.0, time.time() - found.holding.ended)
            renewed = max(self._looked, now - age)
            self._content, self._good_until = content, renewed + _STALE_SECONDS / 2
        self._looked = now


def look(root: str) -> tuple[str, Holding] | None:
    """Return the last `Lease.owner` of the run at `root` and its holding; None if there is no lease. The outcome is
    "running" while the holder may live, and "died" once it is known without waiting that it does not.

    Raises:
        StorageError: the lease cannot be read.
    """
    found = read_record(root)
    return None if found is None else (found.owner, found.last)


def _last_seen(record: Record) -> str:
    return f"last trained by {record.holder}, {duration(time.time() - record.holding.ended)} ago"


def _now() -> float:
    return time.clock_gettime(_CLOCK)
