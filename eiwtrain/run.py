"""The main job: read the config, look before leaping, launch the workers, say what happened.

    python -m eiwtrain.run configs/quickstart.yaml [section.field=value ...] [--dry-run]

Exit codes: 0 finished; 2 the config or the world around it must be mended; 1 failed; 130 or 143 stopped by SIGINT or
SIGTERM, with a checkpoint if there was something to save, 75 by `train.max_hours`: the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eiwtrain import storage
from eiwtrain.config import Config, ConfigError, describe_fields
from eiwtrain.config.file import load_config
from eiwtrain.driver import dry_run, launch, preflight
from eiwtrain.driver.watcher import Watcher
from eiwtrain.on_ray import session
from eiwtrain.storage.lease import Lease, LeaseHeld
from eiwtrain.terminal.console import Console, duration
from eiwtrain.terminal.lines import one_line
from eiwtrain.terminal.signals import Stop, Stopped

if TYPE_CHECKING:
    from eiwtrain.data import Manifest
    from eiwtrain.tracking import TrackedRun

_LEASE_OUTCOMES: dict[str, Any] = {"FINISHED": "finished", "KILLED": "stopped", "FAILED": "failed"}
_MOST_WORDS = 500  # characters of a reason in a tag of MLflow
EXIT_USAGE, EXIT_FAILED, EXIT_GOES_ON_LATER = 2, 1, 75  # 75: EX_TEMPFAIL of sysexits.h


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    began = time.time()
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    if args.fields:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--fields | head` ends quietly
        print(describe_fields())
        return 0
    console = Console()
    try:
        with Stop(console) as stop:
            config = load_config(args.config, args.overrides)
            with storage.impatient():  # somebody may be waiting for the answer
                # a plan needs nothing of what is looked for below
                planned = dry_run.plan(config, console) if args.dry_run else None
                preflight.check_gpus(config, session.joins_cluster())
                preflight.check_cluster()
                manifest = planned or preflight.find_data(config)
                if args.dry_run:
                    return dry_run.look(config, manifest, console)
                preflight.check_storage(config)
            manifest = manifest or _prepare(config, console)
            preflight.find_checkpoint(config, manifest)
            return _run(config, manifest, began, _command(argv), console, stop)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return EXIT_USAGE
    except Stopped as e:
        console.note(f"stopped by {e} before training began; nothing is lost, the same command starts again")
        return 128 + e.number


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eiwtrain.run", description="Train a flow; the same command goes on where it stopped."
    )
    parser.add_argument("config", nargs="?", help="YAML file, e.g. configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="e.g. train.max_steps=100")
    parser.add_argument("--dry-run", action="store_true", help="print the config, what it costs, and check everything")
    parser.add_argument("--fields", action="store_true", help="print every field with its default and meaning")
    args = parser.parse_intermixed_args(argv)
    if args.config is None and not args.fields:
        parser.error("give a config, e.g. configs/quickstart.yaml")
    return args


def _prepare(config: Config, console: Console) -> Manifest:
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


def _parameters(config: Config, channels: int) -> int:
    """How many the model has."""
    from eiwtrain.train.state import outline

    return sum(p.numel() for p in outline(config, channels).parameters())


def _run(config: Config, manifest: Manifest, began: float, command: str, console: Console, stop: Stop) -> int:
    """Everything between a config that can work and the summary.

    Args:
        command: the one that goes on with this run.
    """
    from eiwtrain import tracking
    from eiwtrain.tracking import provenance

    about = provenance.description(config, manifest, command, _parameters(config, manifest.channels))
    tags = provenance.tags(config, command) | {provenance.NOTE_TAG: about}
    tracked: TrackedRun | None = None
    watcher: Watcher | None = None
    status: tracking.Status = "FAILED"
    detail = ""
    lease: Lease | None = None
    outcome: dict[str, Any] = {}
    try:
        lease = Lease.acquire(config.root, config.run.name, console.note)
        with stop.held():  # a run that was begun must be ended
            tracked = tracking.begin(config, tags, provenance.inputs(config, manifest), provenance.environment())
            watcher = Watcher(tracked, config.root, lease.owner)
        for line in tracking.reconcile(tracked):
            console.note(line)
        outcome = launch.train(config, manifest.fingerprint, tracked, lease, began, console, stop)
        if "finished" in outcome:
            status = "FINISHED"
            _print_summary(config, outcome["finished"], tracked, console)
            return 0
        if "stopped" in outcome:
            status, detail = "KILLED", f"stopped by {outcome['stopped']}; goes on with the same command"
            console.note(f"stopped at step {outcome['step']:,} of {config.train.max_steps:,} by {outcome['stopped']}")
            console.note(f"checkpoint  {outcome['checkpoint']}")
            console.note(f"go on with  {command}")
            return 128 + stop.number if stop.number else EXIT_GOES_ON_LATER
        detail = f"failed: {one_line(outcome.get('failed', ''), _MOST_WORDS)}"
        print(f"error: {outcome.get('lost') or outcome['failed']}", file=sys.stderr)
        return EXIT_FAILED
    except LeaseHeld as e:
        raise ConfigError(str(e)) from None
    except tracking.TrackingError as e:
        raise ConfigError(str(e)) from None
    except storage.StorageError as e:
        if stop.training:
            print(f"error: run.storage: {e}; the same command goes on", file=sys.stderr)
            return EXIT_FAILED
        raise ConfigError(f"run.storage: {e}") from None
    except Stopped:
        status = "KILLED"
        raise
    finally:
        if tracked is not None and watcher is not None:
            watcher.will_end(status, detail)
            if "lost" in outcome or tracking.end(tracked, status, detail):  # lost: the run is another's now
                watcher.dismiss()
        if lease is not None:
            lease.release(_LEASE_OUTCOMES[status])


def _print_summary(config: Config, s: dict[str, Any], tracked: TrackedRun, console: Console) -> None:
    console.note()
    of_all = s["yardstick_images"] == s["test_images"]
    yardsticks = "for the same" if of_all else f"for the first {s['yardstick_images']:,}"
    console.note(f"{config.run.name}: {s['steps']:,} steps, {s['images']:,} images, {duration(s['wall_seconds'])}")
    console.note(
        f"  held-out     {s['test_bits_per_dim']:.3f} ± {s['test_standard_error']:.3f} bits/dim "
        f"on {s['test_images']:,} images (PNG needs {s['png_bits_per_dim']:.3f}, "
        f"WebP {s['webp_bits_per_dim']:.3f} {yardsticks})"
    )
    console.note(f"  data         {s['data']}")
    console.note(f"  throughput   {s['images_per_second']:,.1f} images/s on {s['workers']} workers")
    console.note(f"  goodput      {s['goodput_line']}")
    console.note(f"  drift        {s['drift']:.1e} relative error of images through the flow and back")
    console.note(f"  samples      {s['samples']}")
    console.note(f"  model        {s['exported_model']}  (eiwtrain.flow.load)")
    if s["registered"]:
        console.note(f"  registry     {s['registered']}")
    if tracked.view_command:
        console.note(f"  MLflow       {tracked.view_command}")
        console.note(f"               then open {tracked.url}")
    else:
        console.note(f"  MLflow       {tracked.url}")
    console.note("  summary, as JSON:")
    console.note(storage.join(config.root, "summary.json"))


def _command(argv: list[str]) -> str:
    """The command that goes on with this run; EIWTRAIN_COMMAND says it where another program gives the command here."""
    if given := os.environ.get("EIWTRAIN_COMMAND"):
        return given
    command = ["-m", "eiwtrain.run", *argv]
    if session.joins_cluster():
        return "ray job submit --working-dir . -- " + shlex.join(["python", *command])
    on_path = str(Path(sys.executable).parent) in os.environ.get("PATH", "").split(":")
    return shlex.join(["python" if on_path else _shortest(sys.executable), *command])


def _shortest(path: str) -> str:
    """The path as seen from here, when it is below."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


if __name__ == "__main__":
    sys.exit(main())
