"""Who trains a run: a lease in its storage with a heartbeat, and the history of attempts that it carries.

The driver holds the `Lease`; a worker asks its `Guard` before each write of the run. Not for what is written.

Why two attempts never write at the same time:

- A heartbeat replaces `lease.json` by compare-and-swap every _BEAT_SECONDS; of several takers one gets it, and a holder
  that has been replaced cannot renew.
- A taker takes a lease that nobody gave back once its content has been the same for _STALE_SECONDS of the taker's own
  clock, hence that long after the last renewal or later.
- A writer begins a write only within _STALE_SECONDS / 2 of a renewal, which it dates to its last look that found other
  content or to the time the renewal names, whichever is later, and within _LOOK_SECONDS of a look. So when a taker
  takes, no write has been begun for _STALE_SECONDS / 2, and those of a holder that comes back are refused.
- A taker does not wait if the holder gave the lease back, if its process is gone from this very machine, or if its last
  renewal is _LONG_AGO by the clocks of both. Workers that outlive such a driver (Ray ends them within seconds) write
  for _LOOK_SECONDS at most, as do those of an attempt before of the same driver. A new attempt takes longer to start
  its own, and waits so long (`Guard.outwait`) before it deletes what they may be about to commit.
- What remains is one write that is in flight for longer than that, as that of a process stopped in the middle. For a
  checkpoint it is harmless: each has a folder of its own and is none without its manifest, which is written last. Where
  its parts have been deleted meanwhile, the writer takes the manifest back, and should it be killed before, readers
  pass over a manifest without its parts (`checkpoints.survey`).

Clocks: durations are of the process's own, which goes on while the machine sleeps. Clocks of two machines are compared
where it makes a writer wait (a clock that is behind by less than _STALE_SECONDS / 2 harms nothing, one that is ahead
delays a write by a heartbeat), for _LONG_AGO, and to say when something was.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from eiwtrain import storage
from eiwtrain.storage.swap import read, swap
from eiwtrain.terminal.console import duration
from eiwtrain.testing import failpoints

_BEAT_SECONDS = 5.0
_STALE_SECONDS = 30.0
_LONG_AGO = 600.0  # seconds; no two clocks of a cluster are that far apart
_LOOK_SECONDS = 3.0  # for which a guard believes what it has read
_POLL_SECONDS = 1.0  # between two looks of one who waits
_KEPT = 1000  # attempts that the history names; of those before it knows the sums
_FORMAT = "eiwtrain-lease/1"
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

_log = logging.getLogger("eiwtrain.storage.lease")

Outcome = Literal["running", "finished", "stopped", "failed", "died"]


class LeaseHeld(RuntimeError):
    """Somebody else is training the run; one line says who."""


class LeaseLost(RuntimeError):
    """The lease was ours and is no more; one line says who took it."""


@dataclass(frozen=True)
class Attempt:
    """One holding of the lease. Times are Unix times in seconds; the end of one that died is its last heartbeat."""

    began: float
    ended: float
    outcome: Outcome
    failures: int = 0
    """Restarts of the workers within it, see `Lease.failed`."""


@dataclass(frozen=True)
class _Holder:
    host: str
    pid: int
    machine: str  # boot id and pid namespace, empty where they are not to be had
    started: int  # clock ticks from the boot to the start of the process; 0 where unknown


@dataclass(frozen=True)
class _Record:
    """What `lease.json` holds. The attempt is "running" while the lease is held and ends with its last heartbeat."""

    name: str
    owner: str
    holder: _Holder
    beat: int
    attempt: Attempt
    number: int = 0  # of the driver's attempt that may write
    earlier: tuple[Attempt, ...] = ()
    folded_seconds: float = 0.0  # of the attempts before `earlier`
    folded_failures: int = 0

    @property
    def held(self) -> bool:
        return self.attempt.outcome == "running"

    def as_bytes(self) -> bytes:
        raw = asdict(self) | {"format": _FORMAT, "earlier": [astuple(a) for a in self.earlier]}
        return json.dumps(raw, separators=(",", ":")).encode()

    def history(self) -> dict[str, Any]:
        """The fields of the next holder's record that tell of this and the earlier attempts."""
        last = replace(self.attempt, outcome="died") if self.held else self.attempt
        known = (*self.earlier, last)
        old, kept = known[:-_KEPT], known[-_KEPT:]
        return {
            "earlier": kept,
            "folded_seconds": self.folded_seconds + _seconds(old),
            "folded_failures": self.folded_failures + _failures(old),
        }


class Lease:
    """The right to train a run, kept by a heartbeat in a thread until `release`. Made by `acquire`."""

    def __init__(self, url: str, record: _Record, note: Callable[[str], None]) -> None:
        self._url, self._record, self._note = url, record, note
        self._written: bytes | None = record.as_bytes()
        self._failures = 0
        self._lost: str | None = None
        self._ending, self._soon = threading.Event(), threading.Event()
        self._changing = threading.Lock()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")
        self._thread.start()

    @classmethod
    def acquire(cls, root: str, name: str, note: Callable[[str], None]) -> Lease:
        """Take the lease of the run `name` at the URL `root`; while it must be seen whether another holder lives,
        that is for up to _STALE_SECONDS, wait.

        Args:
            note: told in one line what is waited for, and later what could not be done.

        Raises:
            LeaseHeld: another holder is alive.
            StorageError: the lease cannot be read or written, or is none.
        """
        url = storage.join(root, "lease.json")
        watched: bytes | None = None
        since = 0.0
        while True:
            found = read(url)
            before = None if found is None else _parse(found)
            if found is not None and before is None:
                raise storage.StorageError(f"{url} is no lease; delete it if no other job trains this run")
            if before is not None and before.held and not _is_dead(before):
                if watched is None:
                    watched, since = found, _now()
                    note(
                        f"run.name '{name}' was {_last_seen(before)} and not given back; "
                        f"waiting up to {_STALE_SECONDS:.0f} s for a sign of life"
                    )
                if found != watched:
                    raise LeaseHeld(
                        f"run.name: '{name}' is being trained by {_who(before)} (last sign of life just now); "
                        "wait for it, stop it, or use another run.name"
                    )
                if _now() - since < _STALE_SECONDS:
                    time.sleep(_POLL_SECONDS)
                    continue
            began = time.time()
            history = before.history() if before is not None else {}
            record = _Record(name, uuid.uuid4().hex, _here(), 0, Attempt(began, began, "running"), **history)
            if swap(url, found, record.as_bytes()):
                lease = cls(url, record, note)
                failpoints.reach("lease.taken")
                return lease

    @property
    def owner(self) -> str:
        """What tells this holding of the lease from any other: a random id in hex."""
        return self._record.owner

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """The earlier attempts, oldest first; of more than 1,000 the newest."""
        return self._record.earlier

    @property
    def earlier_seconds(self) -> float:
        """The sum of the durations of all earlier attempts."""
        return self._record.folded_seconds + _seconds(self._record.earlier)

    @property
    def failures(self) -> int:
        """Earlier attempts that died or failed, and what `failed` has counted, in this attempt too."""
        return self._record.folded_failures + _failures(self._record.earlier) + self._failures

    @property
    def lost(self) -> str | None:
        """Who has taken the lease, in one line; None while it is ours as far as this process knows."""
        return self._lost

    def failed(self) -> None:
        """Count one more failure within this attempt; the next heartbeat writes it down."""
        self._failures += 1

    def next_attempt(self) -> None:
        """Workers are started, or started again: the guards of those before, which may live on behind a broken
        network, find the lease lost."""
        with self._changing:
            self._record = replace(self._record, number=self._record.number + 1)
        self._soon.set()

    def guard(self) -> Guard:
        """What a worker of the present attempt asks before it writes."""
        return Guard(self._url, self.owner, self._record.number)

    def release(self, outcome: Outcome) -> None:
        """End the heartbeat and give the lease back, with how the attempt ended. All workers must have ended before.

        Does nothing more where the lease is lost or given back already. Storage that does not answer is noted only.
        """
        self._ending.set()
        self._soon.set()
        self._thread.join()
        if self._lost is not None or not self._record.held:
            return
        failpoints.reach("lease.before-release")
        try:
            with storage.impatient():
                self._renew(outcome)
        except storage.StorageError as e:
            self._note(f"the lease could not be given back ({e}); on another machine the next start waits for it")

    def _keep(self) -> None:
        with storage.impatient():  # a renewal that waits for longer would not notice that the lease is lost
            while self._lost is None:
                self._soon.wait(_BEAT_SECONDS)
                self._soon.clear()
                if self._ending.is_set():
                    return
                try:
                    self._renew("running")
                except storage.StorageError:
                    pass  # logged by the retries; the next one may succeed
                except Exception:  # the heart of a living driver shall not stop
                    _log.exception("%s: renewing the lease", self._url)

    def _renew(self, outcome: Outcome) -> None:
        """Write that this process lives, or how it ended; sets `lost` where another owner is in the way."""
        with self._changing:
            r = self._record
            attempt = Attempt(r.attempt.began, time.time(), outcome, self._failures)
            self._record = r = replace(r, beat=r.beat + 1, attempt=attempt)
        data = r.as_bytes()
        while not swap(self._url, self._written, data):
            content = read(self._url)
            found = None if content is None else _parse(content)
            if found is not None and found.owner != self.owner:
                self._lost = f"run.name: '{r.name}' was taken over by {_who(found)}"
                return
            self._written = content
        self._written = data


class Guard:
    """Lets a process of the holder's attempt write only while the lease is seen to be theirs. Goes to workers by
    pickling; any number of threads may share one.

    Args:
        url: of the lease.
        owner: of whose attempts the process is one.
        number: of that attempt, see `Lease.next_attempt`.
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
        """Return once the lease is seen to be ours and alive: as a rule at once, and without looking if it was looked
        at less than _LOOK_SECONDS ago. While it is not renewed, or storage does not answer, wait.

        Args:
            give_up: asked about once a second while it waits; true ends the wait.

        Raises:
            LeaseLost: another has taken the lease, or it was given back. For good.
            StorageError: `give_up` said so.
        """
        while not self._is_alive():
            if give_up():
                raise storage.StorageError(f"{self._url}: it could not be seen whether this job still holds the lease")
            time.sleep(_POLL_SECONDS)

    def outwait(self, give_up: Callable[[], bool] = lambda: False) -> None:
        """After `check`: return once no guard of an attempt before, or of a holder before, can still believe that its
        process may write.

        Args:
            give_up: as for `check`.

        Raises:
            StorageError: `give_up` said so.
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
        found = None if content is None else _parse(content)
        if content is None or found is None:  # the holder's next heartbeat makes it again
            return
        if found.owner != self._owner:
            self._lost = f"run.name: '{found.name}' was taken over by {_who(found)}"
        elif found.number > self._number:
            self._lost = f"run.name: another attempt at '{found.name}' has begun meanwhile"
        elif found.number < self._number:  # the heartbeat is about to say so
            return
        elif not found.held:
            self._lost = f"run.name: the attempt at '{found.name}' has ended ({found.attempt.outcome})"
        elif content != self._content:
            age = max(0.0, time.time() - found.attempt.ended)
            renewed = max(self._looked, now - age)
            self._content, self._good_until = content, renewed + _STALE_SECONDS / 2
        self._looked = now


def look(root: str) -> tuple[str, Attempt] | None:
    """The owner (see `Lease.owner`) of the last holding of the lease of the run at `root`, and that attempt; None where
    there is no lease. It is "running" while the holder may live, and "died" once it is known without waiting that it
    does not. Changes nothing.

    Raises:
        StorageError: the lease cannot be read.
    """
    content = read(storage.join(root, "lease.json"))
    found = None if content is None else _parse(content)
    if found is None:
        return None
    return found.owner, replace(found.attempt, outcome="died") if found.held and _is_dead(found) else found.attempt


def _parse(data: bytes) -> _Record | None:
    """The record in `data`; None where it is none."""
    try:
        raw = json.loads(data)
        if raw.pop("format") != _FORMAT:
            return None
        raw["holder"], raw["attempt"] = _Holder(**raw["holder"]), Attempt(**raw["attempt"])
        raw["earlier"] = tuple(Attempt(*a) for a in raw["earlier"])
        return _Record(**raw)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _seconds(attempts: tuple[Attempt, ...]) -> float:
    return sum(max(0.0, a.ended - a.began) for a in attempts)


def _failures(attempts: tuple[Attempt, ...]) -> int:
    return sum(a.failures + (a.outcome in ("died", "failed")) for a in attempts)


def _is_dead(record: _Record) -> bool:
    """Whether it is known without waiting that the holder is."""
    return time.time() - record.attempt.ended > _LONG_AGO or _is_gone(record.holder)


def _is_gone(holder: _Holder) -> bool:
    """Whether the process was one of this machine and has ended."""
    if not holder.machine or (holder.host, holder.machine) != ((here := _here()).host, here.machine):
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's: it is there
        pass
    return holder.started > 0 and _started(holder.pid) not in (holder.started, None)


def _here() -> _Holder:
    """This process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        machine = ""
    return _Holder(socket.gethostname(), os.getpid(), machine, _started(os.getpid()) or 0)


def _started(pid: int) -> int | None:
    """When the process was started, in clock ticks since the boot; 0 for one that has ended and waits to be reaped;
    None where that is not to be had."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if state in "ZX" else int(fields[18])


def _who(record: _Record) -> str:
    return f"{record.holder.host}, process {record.holder.pid}"


def _last_seen(record: _Record) -> str:
    return f"last trained by {_who(record)}, {duration(time.time() - record.attempt.ended)} ago"


def _now() -> float:
    return time.clock_gettime(_CLOCK)
