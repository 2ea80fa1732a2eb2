"""The faults, each a function that breaks one thing of a running trial; `FAULTS` holds all of them by name.

To add one, write a function with `@fault("its-name")`. It returns what it did, or None if it came too late to do it.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos_harness.trial import CHECKPOINT_EVERY, STEPS, Strike, Struck, Trial
from eiwtrain import checkpoints, storage
from eiwtrain.testing import failpoints

_MANY_STEPS = 2 * CHECKPOINT_EVERY + 6  # by then two checkpoints are committed


@dataclass(frozen=True)
class Fault:
    """A kind of fault."""

    name: str
    strike: Strike
    needs: frozenset[str] = frozenset()
    """Names of what the place must offer: s3, cluster."""
    earliest: int = -1
    """Step after which it can strike; -1: from the start on."""
    config: dict[str, Any] = field(default_factory=dict)
    """Sections that the trial overrides."""
    submitted: bool = False
    """Whether the run is started by `ray job submit`."""
    failpoint: str | None = None
    """Place in the code where the process dies, instead of a moment."""


FAULTS: dict[str, Fault] = {}
_ELASTIC = {"workers": {"min": 1, "max": 2, "grow_seconds": 3.0, "hang_seconds": 30.0}}


def fault(name: str, *needs: str, **options: Any) -> Callable[[Strike], Strike]:
    """Register a function as the fault `name`."""

    def register(strike: Strike) -> Strike:
        FAULTS[name] = Fault(name, strike, frozenset(needs), **options)
        return strike

    return register


# Processes


def _signal_rank(trial: Trial, number: int) -> Struck | None:
    ranks = trial.ranks()
    if not ranks:
        return None
    victim = trial.rng.choice(ranks)
    try:
        os.kill(victim.pid, number)
    except ProcessLookupError:
        return None
    return Struck(time.time(), f"{signal.Signals(number).name} to worker {victim.pid} of {len(ranks)}")


@fault("kill-rank", earliest=0)
def _kill_rank(trial: Trial) -> Struck | None:
    return _signal_rank(trial, signal.SIGKILL)


@fault("terminate-rank", earliest=0)
def _terminate_rank(trial: Trial) -> Struck | None:
    return _signal_rank(trial, signal.SIGTERM)


@fault("stop-rank", earliest=0)
def _stop_rank(trial: Trial) -> Struck | None:
    return _signal_rank(trial, signal.SIGSTOP)


def _signal_driver(trial: Trial, number: int) -> Struck | None:
    if not trial.runs:
        return None
    assert trial.job is not None
    trial.job.send(number)
    return Struck(time.time(), f"{signal.Signals(number).name} to the driver")


@fault("kill-driver")
def _kill_driver(trial: Trial) -> Struck | None:
    return _signal_driver(trial, signal.SIGKILL)


@fault("terminate-driver")
def _terminate_driver(trial: Trial) -> Struck | None:
    return _signal_driver(trial, signal.SIGTERM)


@fault("interrupt-driver")
def _interrupt_driver(trial: Trial) -> Struck | None:
    return _signal_driver(trial, signal.SIGINT)


@fault("kill-supervisor", "cluster", submitted=True, earliest=0)
def _kill_supervisor(trial: Trial) -> Struck | None:
    for process in trial.processes():
        if "JobSupervisor" in process.command:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
                return Struck(time.time(), f"SIGKILL to the job supervisor {process.pid}")
    return None


# Nodes


def _lose_node(trial: Trial, how: str, lose: Callable[[Any], None]) -> Struck | None:
    """Take a node away, and add another some seconds later."""
    cluster = trial.place.cluster
    assert cluster is not None
    living = [node for node in cluster.nodes if node.alive]
    victim = trial.rng.choice(living)
    struck = Struck(time.time(), f"node {victim.node_id[:12]} {how}")
    lose(victim)
    time.sleep(trial.rng.uniform(2, 25))  # before or after training has resumed without it
    victim.kill()  # a drained one too: its deadline has passed
    cluster.add_node()
    return struck


@fault("kill-node", "cluster", earliest=0, config=_ELASTIC)
def _kill_node(trial: Trial) -> Struck | None:
    return _lose_node(trial, "killed", lambda node: node.kill())


@fault("drain-node", "cluster", earliest=0, config=_ELASTIC)
def _drain_node(trial: Trial) -> Struck | None:
    return _lose_node(trial, "drained", lambda node: node.drain(10))


# Servers


def _away(trial: Trial, what: str, stop: Callable[[], None], start: Callable[[], None]) -> Struck:
    seconds = trial.rng.uniform(1, 8)
    struck = Struck(time.time(), f"{what} for {seconds:.1f} s")
    stop()
    time.sleep(seconds)
    start()
    return struck


@fault("stop-storage", "s3")
def _stop_storage(trial: Trial) -> Struck | None:
    assert trial.place.s3 is not None
    return _away(trial, "object store stopped", trial.place.s3.stop, trial.place.s3.start)


@fault("kill-storage", "s3")
def _kill_storage(trial: Trial) -> Struck | None:
    assert trial.place.s3 is not None
    return _away(trial, "object store killed", trial.place.s3.kill, trial.place.s3.start)


@fault("stop-mlflow", "cluster")
def _stop_mlflow(trial: Trial) -> Struck | None:
    cluster = trial.place.cluster
    assert cluster is not None
    return _away(trial, "MLflow stopped", cluster.stop_mlflow, cluster.start_mlflow)


@fault("kill-mlflow", "cluster")
def _kill_mlflow(trial: Trial) -> Struck | None:
    cluster = trial.place.cluster
    assert cluster is not None
    return _away(trial, "MLflow killed", cluster.kill_mlflow, cluster.start_mlflow)


# Bytes


def _damage(trial: Trial, how: str, change: Callable[[bytes], bytes | None]) -> Struck | None:
    """Kill the driver, then change a file of a committed checkpoint, of which there must be another."""
    struck = _signal_driver(trial, signal.SIGKILL)
    if struck is None:
        return None
    trial.kill_all()  # they might still write after the damage
    found = checkpoints.committed(trial.root)
    if len(found) < 2:
        return None
    chosen = trial.rng.choice(found)
    name = trial.rng.choice([checkpoints.MANIFEST, *(part.name for part in chosen.parts)])
    url = storage.join(chosen.url, name)
    changed = change(storage.read_bytes(url))
    if changed is None:
        storage.delete(url)
    else:
        storage.write_bytes(url, changed)
    return Struck(struck.time, f"{how}: {url}, {found.index(chosen) + 1} of {len(found)} from the newest")


@fault("flip-bit", earliest=_MANY_STEPS)
def _flip_bit(trial: Trial) -> Struck | None:
    def flip(data: bytes) -> bytes:
        bit = trial.rng.randrange(8 * len(data))
        return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]

    return _damage(trial, "a bit flipped", flip)


@fault("truncate", earliest=_MANY_STEPS)
def _truncate(trial: Trial) -> Struck | None:
    return _damage(trial, "cut short", lambda data: data[: trial.rng.randrange(len(data))])


@fault("delete-file", earliest=_MANY_STEPS)
def _delete_file(trial: Trial) -> Struck | None:
    return _damage(trial, "deleted", lambda data: None)


# Fail points: a process kills itself at a place in the code


def failpoint_names() -> list[str]:
    """Return the names of all fail points in the product's code."""
    found: set[str] = set()
    for path in Path(failpoints.__file__).parents[1].rglob("*.py"):
        if path.name != "failpoints.py":
            found.update(re.findall(r'reach\("([\w.-]+)"\)', path.read_text()))
    return sorted(found)


def draw_time(rng: random.Random, name: str) -> int:
    """Draw at which visit to a fail point a process dies there; the first is 1."""
    if name.startswith("lease.") or name == "worker.finish":  # each process gets there once
        return 1
    return rng.randint(1, STEPS if name == "worker.step" else 3)


def done(trial: Trial) -> Path:
    """Folder in which `eiwtrain.testing.failpoints` keeps a file of each fail point that was carried out."""
    return trial.folder / "failpoints"


def _await_failpoint(trial: Trial) -> Struck | None:
    while trial.runs:
        if found := list(done(trial).glob("*")):
            return Struck(found[0].stat().st_mtime, f"died at {found[0].name}")
        time.sleep(0.05)
    found = list(done(trial).glob("*"))
    return Struck(found[0].stat().st_mtime, f"died at {found[0].name}") if found else None


for _name in failpoint_names():
    FAULTS[f"at-{_name}"] = Fault(f"at-{_name}", _await_failpoint, failpoint=_name)
