"""The main job: read the config, start or join Ray, hand the worker loop to Ray Train, say what happened.

    python -m eiwtrain.run configs/quickstart.yaml [section.field=value ...] [--dry-run]

Exit codes: 0 finished; 2 the config or the world around it must be mended; 1 failed; 130 or 143 stopped by SIGINT or
SIGTERM with a checkpoint, 75 by `train.max_hours`: the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from eiwtrain import preflight
from eiwtrain.config import Config, ConfigError, describe_fields, load_config
from eiwtrain.console import Console, duration

if TYPE_CHECKING:
    from eiwtrain.data import Manifest
    from eiwtrain.tracking import TrackedRun

EXIT_USAGE, EXIT_FAILED, EXIT_GOES_ON_LATER = 2, 1, 75  # 75: EX_TEMPFAIL of sysexits.h
_POLL_SECONDS = 0.25
_WAITING_SECONDS = 60.0  # after which a job whose workers have not started says what it waits for

# Told to glibc where workers start: a freed activation stays with the process, or each would be unmapped and faulted
# in again, which doubles the time of a backward pass that recomputes. Values above any activation's size.
_WORKER_ENV = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}

# The driver's settings that workers need; they travel as arguments, so no process list or runtime_env shows them.
_FORWARDED = ("AWS_", "MLFLOW_", "FSSPEC_", "GOOGLE_", "AZURE_", "NCCL_", "EIWTRAIN_")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    began = time.time()
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    if args.fields:
        print(describe_fields())
        return 0
    console = Console()
    try:
        config = load_config(args.config, args.overrides)
        preflight.check_gpus(config, _joins_cluster())
        manifest = preflight.find_data(config)
        if args.dry_run:
            return _dry_run(config, manifest, console)
        preflight.check_storage(config)
        with Stop(console) as stop:
            manifest = manifest or _prepare(config, console)
            found = preflight.find_checkpoint(config, manifest)
            if found:
                console.note(f"going on from step {found.step:,}: {found.url}")
            return _run(config, began, argv, console, stop)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return EXIT_USAGE
    except Stopped as e:
        console.note(f"stopped by {e} before training began; nothing is lost, the same command starts again")
        return 128 + e.number


class Stopped(BaseException):
    """A stop signal came where there was nothing to save; like KeyboardInterrupt, no library should catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stop:
    """The first SIGINT or SIGTERM asks for a checkpoint; the third ends the process at once.

    While `raises` is set, that is while nothing is being trained, the first one ends the job by `Stopped`.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._count = 0
        self.number: int | None = None
        self.raises = True

    def __enter__(self) -> Stop:
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals; again after `ray.init`, which takes SIGTERM for itself."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def __exit__(self, *exc: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self.number = self.number or number
        if self._count >= 3:
            os._exit(128 + number)
        if self.raises and self._count == 1:
            raise Stopped(number)
        if self._count == 1:
            name = signal.Signals(number).name
            self._console.note(f"{name}: finishing the step and writing a checkpoint (twice more to end without)")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eiwtrain.run", description="Train a flow; the same command goes on where it stopped."
    )
    parser.add_argument("config", nargs="?", help="YAML file, e.g. configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="e.g. train.max_steps=100")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and check everything")
    parser.add_argument("--fields", action="store_true", help="print every field with its default and meaning")
    args = parser.parse_intermixed_args(argv)
    if args.config is None and not args.fields:
        parser.error("give a config, e.g. configs/quickstart.yaml")
    return args


def _joins_cluster() -> bool:
    return bool(os.environ.get("RAY_ADDRESS"))


def _prepare(config: Config, console: Console) -> Manifest:
    import data_prep
    from eiwtrain import storage
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


def _dry_run(config: Config, manifest: Manifest | None, console: Console) -> int:
    import torch
    import yaml

    from eiwtrain import flow, tracking
    from eiwtrain.state import flow_config

    console.note(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).rstrip())
    with torch.device("meta"):
        model = flow.EIWFlow(flow_config(config, manifest.channels if manifest else 3))
    parameters = sum(p.numel() for p in model.parameters())
    console.note(f"model     {parameters:,} parameters, {4 * parameters / 1e6:,.1f} MB in float32")
    if manifest is None:
        console.note(f"data      none at {config.data.path}; the run writes {config.data.prepare} there first")
    else:
        counts = ", ".join(f"{s.samples:,} {name}" for name, s in manifest.splits.items())
        console.note(f"data      {config.data.path}: {counts} images, fingerprint {manifest.fingerprint[:12]}")
    found = preflight.find_checkpoint(config, manifest)
    console.note(f"start     {'a new run' if found is None else f'step {found.step:,}, {found.url}'}")
    preflight.check_storage(config)
    console.note(f"storage   {config.root}: can be written")
    try:
        tracking.check(config)
    except tracking.TrackingError as e:
        raise ConfigError(str(e)) from None
    console.note(f"tracking  {tracking.tracking_uri(config)}: answers")
    return 0


def _run(config: Config, began: float, argv: list[str], console: Console, stop: Stop) -> int:
    """Everything between a config that can work and the summary."""
    from eiwtrain import tracking

    try:
        tags = {"mlflow.source.git.commit": _git_revision(), "eiwtrain.command": _command(argv)}
        tracked = tracking.begin(config, tags)
    except tracking.TrackingError as e:
        raise ConfigError(str(e)) from None
    status: tracking.Status = "FAILED"
    try:
        outcome = _train(config, tracked, began, console, stop)
        if "finished" in outcome:
            status = "FINISHED"
            _print_summary(config, outcome["finished"], tracked, began, console)
            return 0
        if "stopped" in outcome:
            status = "KILLED"
            console.note(f"stopped at step {outcome['step']:,} of {config.train.max_steps:,} by {outcome['stopped']}")
            console.note(f"checkpoint  {outcome['checkpoint']}")
            console.note(f"go on with  {_command(argv)}")
            return 128 + stop.number if stop.number else EXIT_GOES_ON_LATER
        print(f"error: {outcome['failed']}", file=sys.stderr)
        return EXIT_FAILED
    except Stopped:
        status = "KILLED"
        raise
    finally:
        tracking.end(tracked, status)


def _train(config: Config, tracked: TrackedRun, began: float, console: Console, stop: Stop) -> dict[str, Any]:
    """Start or join Ray, run the workers, pass on what they say; returns how it ended."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not _joins_cluster():
        # Ray's servers listen on every interface, so this cluster asks for a token, of its own: left to itself Ray
        # would keep one in ~/.ray, which the next `ray start` then asks for and `ray job submit` does not give.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    from eiwtrain.mailbox import start_mailbox
    from eiwtrain.worker import Job

    if _joins_cluster():
        ray.init(log_to_driver=False, logging_level="ERROR")
    else:
        ray.init(
            address="local",
            num_cpus=max(config.max_workers * config.workers.cpus, os.cpu_count() or 1),  # logical: also on one core
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
        )
    stop.listen()
    try:
        mailbox = start_mailbox()
        environment = {k: v for k, v in os.environ.items() if k.startswith(_FORWARDED)}
        job = Job(config, tracked, mailbox, environment, began)
        console.note(f"starting {config.max_workers} workers ({duration(time.time() - began)} since the start)")
        fit = Fit(config, job)
        return _listen(config, fit, mailbox, console, stop)
    finally:
        stop.raises = False
        ray.shutdown()


class Fit(threading.Thread):
    """Ray Train's blocking `fit` in a thread, where it leaves the signals to us."""

    def __init__(self, config: Config, job: Any) -> None:
        super().__init__(daemon=True, name="fit")
        self._config, self._job = config, job
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from eiwtrain import storage
        from eiwtrain.worker import train

        w = self._config.workers
        local = storage.is_local(self._config.run.storage)
        try:
            TorchTrainer(
                train,
                train_loop_config={"job": self._job},
                torch_config=TorchConfig(backend="nccl" if w.gpus else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=w.min if self._config.max_workers == w.min else (w.min, self._config.max_workers),
                    use_gpu=bool(w.gpus),
                    resources_per_worker={"CPU": w.cpus} | ({"GPU": w.gpus} if w.gpus else {}),
                ),
                run_config=RunConfig(
                    name=f"{self._config.run.name}-{int(self._job.began)}",
                    storage_path=storage.join(self._config.root, "ray") if local else None,
                    failure_config=FailureConfig(max_failures=self._config.run.max_failures),
                    worker_runtime_env={"env_vars": _WORKER_ENV},
                ),
            ).fit()
        except BaseException as e:
            self.error = e


def _listen(config: Config, fit: Fit, mailbox: Any, console: Console, stop: Stop) -> dict[str, Any]:
    """Print what the workers say and pass a stop on, until they have ended."""
    import ray

    asked, started, waiting_since = False, False, time.time()
    while True:
        ended = not fit.is_alive()  # before the mail is read: nothing comes after it
        for kind, content in ray.get(mailbox.take.remote()):
            if kind == "training":
                started, stop.raises = True, False
                console.note(
                    f"training from step {content['step']:,} to {content['of']:,} "
                    f"on {content['workers']} workers; Ctrl-C writes a checkpoint and stops"
                )
            elif kind == "progress":
                console.progress(content)
            elif kind == "note":
                console.note(content)
            elif kind == "end":
                if "failed" not in content:
                    fit.join(timeout=30)  # let the workers return, so that nothing is cut off
                return dict(content)
        if ended:
            return {"failed": f"the workers ended without a result: {_cause(fit.error)}"}
        if stop.number and not asked:
            ray.get(mailbox.stop.remote(signal.Signals(stop.number).name))
            asked = True
        if not started and time.time() - waiting_since > _WAITING_SECONDS:
            waiting_since = time.time()
            w = config.workers
            console.note(
                f"waiting for {w.min} workers of {w.cpus} CPU and {w.gpus} GPU each; the cluster has "
                f"{ray.cluster_resources().get('CPU', 0):g} CPU and {ray.cluster_resources().get('GPU', 0):g} GPU"
            )
        time.sleep(_POLL_SECONDS)


def _cause(error: BaseException | None) -> str:
    """The last lines of a worker's traceback, which say what happened."""
    text = str(error or "no error").strip().splitlines()
    return f"{type(error).__name__}: " + "\n  ".join(["", *text[-12:]])


def _print_summary(config: Config, s: dict[str, Any], tracked: TrackedRun, began: float, console: Console) -> None:
    from eiwtrain import storage

    console.note()
    console.note(f"{config.run.name}: {s['steps']:,} steps, {s['images']:,} images, {duration(time.time() - began)}")
    console.note(
        f"  held-out     {s['test_bits_per_dim']:.3f} ± {s['test_standard_error']:.3f} bits/dim "
        f"on {s['test_images']:,} images (PNG needs {s['png_bits_per_dim']:.3f} for the same)"
    )
    console.note(f"  throughput   {s['images_per_second']:,.1f} images/s on {s['workers']} workers")
    console.note(f"  goodput      {s['goodput']:.0%} of the wall time went into training steps")
    console.note(f"  drift        {s['drift']:.1e} relative error of images through the flow and back")
    console.note(f"  samples      {s['samples']}")
    console.note(f"  model        {s['exported_model']}  (eiwtrain.flow.load)")
    if tracked.view_command:
        console.note(f"  MLflow       {tracked.view_command}")
        console.note(f"               then open {tracked.url}")
    else:
        console.note(f"  MLflow       {tracked.url}")
    console.note("  summary, as JSON:")
    console.note(storage.join(config.root, "summary.json"))


def _command(argv: list[str]) -> str:
    python = "python" if Path(sys.executable).parent in map(Path, os.environ.get("PATH", "").split(":")) else None
    return shlex.join([python or _shortest(sys.executable), "-m", "eiwtrain.run", *argv])


def _shortest(path: str) -> str:
    """The path as seen from here, when it is below."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _git_revision() -> str:
    here = Path(__file__).parent
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
        timeout=10,
    )
    return result.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
