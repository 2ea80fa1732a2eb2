"""One start of a run: prepare its data set if there is none, take its lease, begin its MLflow run, train, and end both.

Not for the checks before (`eiwtrain.driver.preflight`), nor for the workers (`eiwtrain.driver.launch`).
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eiwtrain import storage
from eiwtrain.config import Config, ConfigError
from eiwtrain.driver import launch, preflight
from eiwtrain.driver.watcher import Watcher
from eiwtrain.on_ray import session
from eiwtrain.on_ray.messages import Finished, Lost, Outcome, Stopped
from eiwtrain.storage.lease import Lease, LeaseHeld
from eiwtrain.terminal.console import Console, money
from eiwtrain.terminal.lines import one_line
from eiwtrain.terminal.signals import Interrupted, Stop
from eiwtrain.testing import timeline

if TYPE_CHECKING:
    from eiwtrain.checkpoints import Checkpoint
    from eiwtrain.data import Manifest
    from eiwtrain.tracking import Status, TrackedRun

_LEASE_OUTCOMES: dict[Status, Any] = {"FINISHED": "finished", "KILLED": "stopped", "FAILED": "failed"}
_MOST_WORDS = 500  # characters of a reason in a tag of MLflow


def prepare(config: Config, console: Console) -> Manifest:
    """Write the data set that `data.prepare` names to `data.path`.

    Raises:
        ConfigError: it cannot be written, or does not fit the config.
    """
    import data_prep
    from eiwtrain.data import DataError

    d = config.data
    assert d.prepare is not None
    console.note(f"no data set at {d.path} yet: writing {d.prepare}")
    try:
        written = data_prep.prepare(d.prepare, d.path, d.resolution, quiet=False)
    except (DataError, storage.StorageError) as e:
        raise ConfigError(f"data.prepare: {e}") from None
    for split in written.splits.values():
        console.note(f"  {split.name}: {split.samples:,} images in {len(split.shards)} shards")
    manifest = preflight.find_data(config)
    assert manifest is not None
    return manifest


def train_under_lease(
    config: Config, known: list[Checkpoint], began: float, command: str, console: Console, stop: Stop
) -> tuple[Outcome, TrackedRun]:
    """Train under the run's lease, and record in MLflow how that ended; return the outcome, and the run in MLflow.

    Args:
        known: checkpoints that were found before the lease.
        began: Unix time at which this program started.
        command: the command that resumes this run.

    Raises:
        ConfigError: somebody else trains this run, it cannot resume with this config and data set, or storage or MLflow
            cannot be used, before training began.
        Interrupted: a stop signal came before training began.
        StorageError: storage failed after training began.
    """
    from eiwtrain import tracking
    from eiwtrain.tracking import provenance

    tracked: TrackedRun | None = None
    watcher: Watcher | None = None
    status: Status = "FAILED"
    detail = why = ""
    lease: Lease | None = None
    outcome: Outcome | None = None
    try:
        lease = Lease.acquire(config.root, config.run.name, console.note)
        _check_cost(config, lease)
        manifest, known = _what_is_there(config, known)
        if tracking.is_local(tracking.tracking_uri(config)):  # a server may still refuse the run
            # not a daemon: Python would not survive its own end in the middle of this import
            threading.Thread(target=importlib.import_module, args=("torch",), name="torch").start()
            launch.start_ray(config)  # its processes import what they need while this one makes MLflow's run
            timeline.mark("Ray")
        about = provenance.description(config, manifest, command, _parameters(config, manifest.channels))
        tags = provenance.tags(config, command) | {provenance.NOTE_TAG: about}
        with stop.held():  # a run that was begun must be ended
            tracked = tracking.begin(config, tags, provenance.inputs(config, manifest), provenance.environment())
            watcher = Watcher(tracked, config.root, lease.owner)
        _end_abandoned(tracked, console)
        timeline.mark("MLflow")
        outcome = launch.run_attempts(config, manifest.fingerprint, known, tracked, lease, began, console, stop)
        status, detail = _in_mlflow(outcome)
        why = getattr(outcome, "reason", "")
        return outcome, tracked
    except (LeaseHeld, tracking.TrackingError) as e:
        why = str(e)
        raise ConfigError.because(str(e), e) from None
    except storage.StorageError as e:
        detail = f"failed: {one_line(e, _MOST_WORDS)}"
        if stop.training:
            raise
        raise ConfigError.because(f"run.storage: {e}", e) from None
    except ConfigError as e:  # Ray cannot be started or joined
        detail = f"failed: {one_line(e, _MOST_WORDS)}"
        raise
    except Interrupted as e:
        status, why = "KILLED", str(e)
        raise
    finally:
        if tracked is not None and watcher is not None:
            watcher.will_end(status, detail)
            if isinstance(outcome, Lost) or tracking.end(tracked, status, detail):  # lost: the run is another's now
                watcher.dismiss()
        session.stop()
        if lease is not None:
            # a run that was refused before it began has not failed
            lease.release(_LEASE_OUTCOMES[status] if tracked is not None else "stopped", why or detail)


def _check_cost(config: Config, lease: Lease) -> None:
    """Check that the run may cost more than it has.

    Raises:
        ConfigError: it may not.
    """
    most, spent = config.train.max_cost, lease.earlier_cost
    if most is not None and spent >= most:
        raise ConfigError(
            f"train.max_cost: {most:g}, and the run has cost {money(spent)} so far; give more than that, or null for "
            "no limit"
        )


def _what_is_there(config: Config, known: list[Checkpoint]) -> tuple[Manifest, list[Checkpoint]]:
    """Return the data set and the run's checkpoints, both checked against the config.

    Call it under the lease: before that, another job may change what earlier checks have found, `known` among them.

    Raises:
        ConfigError: they do not fit the config or each other, or the data set has gone.
    """
    manifest = preflight.find_data(config)
    if manifest is None:
        raise ConfigError(f"data.path: the data set at {config.data.path} has gone; the same command writes it again")
    return manifest, preflight.find_checkpoints(config, manifest, known)


def _end_abandoned(tracked: TrackedRun, console: Console) -> None:
    """End the runs in MLflow that nobody trains any more: some at once, and some later, once their leases are seen not
    to change."""
    from eiwtrain import tracking
    from eiwtrain.storage import watch

    looks = watch.Watch()

    def end() -> None:
        for line in tracking.end_abandoned(tracked, looks):
            console.note(line)

    def end_later() -> None:
        time.sleep(watch.SECONDS)
        end()

    end()
    if looks.is_unsure:
        threading.Thread(target=end_later, daemon=True, name="abandoned").start()


def _in_mlflow(outcome: Outcome) -> tuple[Status, str]:
    """Return the status in MLflow of a run with this outcome, and its detail."""
    if isinstance(outcome, Finished):
        return "FINISHED", ""
    if isinstance(outcome, Stopped):
        return "KILLED", f"stopped by {outcome.reason}; resumes with the same command"
    return "FAILED", f"failed: {one_line(outcome.reason, _MOST_WORDS)}"


def _parameters(config: Config, channels: int) -> int:
    """Return how many parameters the model has."""
    from eiwtrain.train.state import outline

    return sum(p.numel() for p in outline(config, channels).parameters())


def resume_command(argv: list[str]) -> str:
    """Return the command that resumes this run; EIWTRAIN_COMMAND says it where another program gives the command."""
    if given := os.environ.get("EIWTRAIN_COMMAND"):
        return given
    command = ["-m", "eiwtrain.run", *argv]
    if session.joins_cluster():
        return "ray job submit --working-dir . -- " + shlex.join(["python", *command])
    on_path = str(Path(sys.executable).parent) in os.environ.get("PATH", "").split(":")
    return shlex.join(["python" if on_path else _shortest(sys.executable), *command])


def _shortest(path: str) -> str:
    """Return the path relative to the working directory where it is below it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
