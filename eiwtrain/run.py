"""The main job's command: read the config, check everything, train, print how it ended.

    python -m eiwtrain.run configs/quickstart.yaml [section.field=value ...] [--dry-run]

Exit codes: 0 finished; 2 the config or the world around it must be fixed; 1 failed; 129, 130 or 143 stopped by SIGHUP,
SIGINT or SIGTERM, with a checkpoint if there was something to save, 75 by `train.max_hours` or `train.max_cost`, or as
storage or MLflow do not answer: the same command resumes.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from typing import TYPE_CHECKING

from eiwtrain import storage
from eiwtrain.config import Config, ConfigError, describe_fields
from eiwtrain.config.file import load_config
from eiwtrain.driver import dry_run, main_job, preflight
from eiwtrain.on_ray import session
from eiwtrain.on_ray.messages import Finished, Outcome, Stopped, Summary
from eiwtrain.terminal.console import Console, duration
from eiwtrain.terminal.output import protect
from eiwtrain.terminal.signals import Interrupted, Stop
from eiwtrain.testing import timeline

if TYPE_CHECKING:
    from eiwtrain.tracking import TrackedRun

EXIT_USAGE, EXIT_FAILED, EXIT_RESUMES_LATER = 2, 1, 75  # 75: EX_TEMPFAIL of sysexits.h


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    began = time.time()
    timeline.mark("imports")
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
            with storage.impatient():  # a user may be waiting for the answer
                # a plan needs nothing that the checks below look for
                planned = dry_run.plan(config, console) if args.dry_run else None
                preflight.check_gpus(config, session.joins_cluster())
                preflight.check_cluster()
                preflight.check_folders(config)
                manifest = planned or preflight.find_data(config)
                if args.dry_run:
                    return dry_run.look(config, manifest, console)
                preflight.check_storage(config)
            manifest = manifest or main_job.prepare(config, console)
            timeline.mark("data")
            # so that a mistake is named before the lease is waited for
            known = preflight.find_checkpoints(config, manifest)
            command = main_job.resume_command(argv)
            outcome, tracked = main_job.train_under_lease(config, known, began, command, console, stop)
            return _report(outcome, config, tracked, command, console, stop)
    except ConfigError as e:
        later = e.passing and not args.dry_run
        print(f"error: {e}" + ("; the same command may work later" if later else ""), file=sys.stderr)
        return EXIT_RESUMES_LATER if later else EXIT_USAGE
    except storage.StorageError as e:
        print(f"error: run.storage: {e}; the same command resumes", file=sys.stderr)
        return EXIT_FAILED
    except Interrupted as e:
        console.note(f"stopped by {e} before training began; nothing is lost, the same command starts again")
        return 128 + e.number


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eiwtrain.run", description="Train a flow; the same command resumes where it stopped."
    )
    parser.add_argument("config", nargs="?", help="YAML file, e.g. configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="e.g. train.max_steps=100")
    parser.add_argument("--dry-run", action="store_true", help="print the config, what it costs, and check everything")
    parser.add_argument("--fields", action="store_true", help="print every field with its default and meaning")
    args = parser.parse_intermixed_args(argv)
    if args.config is None and not args.fields:
        parser.error("give a config, e.g. configs/quickstart.yaml")
    return args


def _report(outcome: Outcome, config: Config, tracked: TrackedRun, command: str, console: Console, stop: Stop) -> int:
    """Print how the run ended; return the exit code."""
    if isinstance(outcome, Finished):
        _print_summary(config, outcome.summary, tracked, console)
        return 0
    if isinstance(outcome, Stopped):
        console.note(f"stopped at step {outcome.step:,} of {config.train.max_steps:,} by {outcome.reason}")
        console.note(f"checkpoint  {outcome.checkpoint or 'none yet'}")
        console.note(f"resume with {command}")
        return 128 + stop.number if stop.number else EXIT_RESUMES_LATER
    print(f"error: {outcome.reason}", file=sys.stderr)
    return EXIT_FAILED


def _print_summary(config: Config, s: Summary, tracked: TrackedRun, console: Console) -> None:
    console.note()
    of_all = s.yardstick_images == s.test_images
    yardsticks = "for the same" if of_all else f"for the first {s.yardstick_images:,}"
    console.note(f"{config.run.name}: {s.steps:,} steps, {s.images:,} images, {duration(s.wall_seconds)}")
    console.note(
        f"  held-out     {s.test_bits_per_dim:.3f} ± {s.test_standard_error:.3f} bits/dim ({s.test_estimator}) "
        f"on {s.test_images:,} images (PNG needs {s.png_bits_per_dim:.3f}, "
        f"WebP {s.webp_bits_per_dim:.3f} {yardsticks})"
    )
    console.note(f"  data         {s.data}")
    label = "published"
    for line in s.published.lines():
        console.note(f"  {label:12} {line}")
        label = ""
    console.note(f"  throughput   {s.images_per_second:,.1f} images/s on {s.workers} workers")
    console.note(f"  goodput      {s.goodput_line}")
    if s.cost_line is not None:
        console.note(f"  cost         {s.cost_line}")
    console.note(f"  drift        {s.drift:.1e} relative error of images through the flow and back")
    console.note(f"  samples      {s.samples}")
    console.note(f"  model        {s.exported_model}  (eiwtrain.flow.load)")
    if s.registered:
        console.note(f"  registry     {s.registered}")
    if tracked.view_command:
        console.note(f"  MLflow       {tracked.view_command}")
        console.note(f"               then open {tracked.url}")
    else:
        console.note(f"  MLflow       {tracked.url}")
    console.note("  summary, as JSON:")
    console.note(storage.join(config.root, "summary.json"))


if __name__ == "__main__":
    protect()
    sys.exit(main())
