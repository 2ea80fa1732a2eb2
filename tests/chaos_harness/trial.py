"""One trial: a real run of the main job, broken once at a chosen moment, restarted until it finishes, then judged.

Not for what the faults are (`chaos_harness.faults`), nor for what must hold afterwards (`chaos_harness.verify`).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from chaos_harness import verify
from eiwtrain import checkpoints, storage

if TYPE_CHECKING:
    from cluster.local import LocalCluster
    from cluster.s3 import S3Server

REPOSITORY = Path(__file__).parents[2]
SAMPLES, BATCH, EPOCHS = 80, 8, 8
STEPS = SAMPLES * EPOCHS // BATCH
CHECKPOINT_EVERY, EVAL_EVERY = 9, 32
TOLERANCE = 1e-6
"""Largest `verify.distance`, and relative difference of the loss, where the number of workers changed on the way. One
worker adds up the gradients of two micro-batches where two workers add up those of one each, so it is usually 0."""

_POLL_SECONDS = 0.05
_ASK_SECONDS = 0.5  # between two requests to Ray's job server
_ATTEMPT_SECONDS = 300.0  # after which an attempt counts as hung
_ATTEMPTS = 30  # refusals by a lease that is not stale yet count too
_AGAIN_SECONDS = 2.0  # between a refused attempt and the next
_GONE_SECONDS = 30.0  # for which processes of a run may outlive it
_OF_RAY = ("ray::IDLE", "ray::_AutoscalingCoordinatorActor")  # a process that waits for work, a detached actor
_START_SECONDS = 15.0  # about the time of a run to its first step


def with_repository(path: str | None) -> str:
    """Return a PYTHONPATH on which this very code comes first, whatever else is installed."""
    return os.pathsep.join(filter(None, [str(REPOSITORY), path]))


class Moment(NamedTuple):
    """Moment at which a fault strikes."""

    step: int
    """Step after which it strikes (the first is 0); -1: at any time from the start on."""
    delay: float
    """Seconds after that."""

    def __str__(self) -> str:
        return f"{self.delay:.2f} s after " + ("the start" if self.step < 0 else f"step {self.step}")


def draw_moment(rng: random.Random, earliest: int = -1) -> Moment:
    """Draw a moment in start-up, between steps, in an evaluation or at the end; not before step `earliest`."""
    where = rng.choices(("start", "step", "evaluation", "end"), (2, 6, 1, 1))[0]
    if where == "start" and earliest < 0:
        return Moment(-1, rng.uniform(0, _START_SECONDS))
    if where == "evaluation":
        step = rng.choice([s for s in range(EVAL_EVERY - 1, STEPS, EVAL_EVERY) if s >= earliest])
        return Moment(step, rng.uniform(0, 0.5))
    if where == "end":
        return Moment(STEPS - 1, rng.uniform(0, 2))
    return Moment(rng.randrange(max(0, earliest), STEPS - 1), rng.uniform(0, 0.1))


@dataclass
class Place:
    """A place for runs: their data, storage and tracking, and the servers that can be broken."""

    data: str
    storage: str
    tracking: str | None
    environment: dict[str, str]
    """Variables for runs at this place, and for this process to look at what they left."""
    s3: S3Server | None = None
    cluster: LocalCluster | None = None
    gpus: int = 0
    """GPUs of each worker."""

    @property
    def offers(self) -> set[str]:
        """Names of what a fault may need and this place has: s3, cluster."""
        return {name for name in ("s3", "cluster") if getattr(self, name) is not None}


class Driver:
    """`python -m eiwtrain.run` as a process of this machine."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.began = time.time()
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=REPOSITORY, start_new_session=True
            )

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self.process.poll()

    def send(self, number: int) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def end(self) -> None:
        """Kill it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Submitted:
    """The same command by `ray job submit`; the driver is then a process of the cluster."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path, address: str, mark: str) -> None:
        from ray.job_submission import JobSubmissionClient

        self.began = time.time()
        self.log, self._mark = log, mark
        self._code: int | None = None
        self._asked = 0.0
        token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()  # Ray reads it only once, when it is imported
        self._client = JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"})
        own = {k: v for k, v in environment.items() if os.environ.get(k) != v and not k.startswith("RAY_")}
        env_vars = own | {"PYTHONPATH": environment["PYTHONPATH"]}
        self._id = self._client.submit_job(entrypoint=" ".join(["exec", *command]), runtime_env={"env_vars": env_vars})

    def poll(self) -> int | None:
        """Return 0 if the job succeeded, another exit code if it failed, None while it runs."""
        if self._code is None and time.monotonic() - self._asked > _ASK_SECONDS:
            self._asked = time.monotonic()
            info = self._client.get_job_info(self._id)
            if info.status.is_terminal():
                self._code = 0 if info.status == "SUCCEEDED" else info.driver_exit_code or 1
                with contextlib.suppress(RuntimeError):
                    self.log.write_text(self._client.get_job_logs(self._id) + f"\n{info.message}\n")
        return self._code

    def send(self, number: int) -> None:
        """Send a signal to the driver."""
        for process in verify.processes(self._mark):
            if "-m eiwtrain.run" in process.command:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def end(self) -> None:
        """Kill it if it still runs."""
        if self.poll() is None:
            self._client.stop_job(self._id)
            self.send(signal.SIGKILL)


@dataclass
class Struck:
    """A fault that has taken effect."""

    time: float
    what: str
    """Description of the victim, for people."""


@dataclass
class Trial:
    """A run under one fault."""

    place: Place
    name: str
    """Name of the run."""
    folder: Path
    """Folder of its config, logs and audit."""
    rng: random.Random
    config: dict[str, Any] = field(default_factory=dict)
    """Sections that override the config of every trial."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables in addition to those of every trial."""
    submitted: bool = False
    """Whether it is started by `ray job submit`."""
    job: Driver | Submitted | None = None
    codes: list[int] = field(default_factory=list)
    """Exit codes of the attempts that have ended."""

    @property
    def root(self) -> str:
        """URL of the run's folder."""
        return storage.join(self.place.storage, self.name)

    @property
    def audit(self) -> Path:
        """Folder in which the workers record what they trained on."""
        return self.folder / "audit"

    @property
    def step(self) -> int:
        """Furthest step that was made, -1 if none was."""
        return max((line.get("step", -1) for line in verify.read_audit(self.audit)), default=-1)

    @property
    def runs(self) -> bool:
        """Whether an attempt is under way."""
        return self.job is not None and self.job.poll() is None

    def start(self) -> None:
        """Run the command, the first time or again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self._config(), sort_keys=False))
        environment = os.environ | self.place.environment | self.environment
        environment |= {verify.MARK: self.name, "EIWTRAIN_AUDIT": str(self.audit), "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = with_repository(environment.get("PYTHONPATH"))
        command = [sys.executable, "-m", "eiwtrain.run", str(path)]
        log = self.folder / f"attempt-{len(self.codes) + 1}.log"
        if self.submitted:
            assert self.place.cluster is not None
            self.job = Submitted(command, environment, log, self.place.cluster.job_address, self.name)
            return
        if self.place.cluster is not None:  # its nodes start this driver's workers, which need the mark too
            environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps(
                {"runtime_env": {"env_vars": {verify.MARK: self.name}}}
            )
        self.job = Driver(command, environment, log)

    def wait_for(self, moment: Moment) -> bool:
        """Wait for a moment of the first attempt; return False if the attempt ended before."""
        assert self.job is not None
        end = time.time() + _ATTEMPT_SECONDS
        while self.step < moment.step:
            if not self.runs or time.time() > end:
                return False
            time.sleep(_POLL_SECONDS)
        time.sleep(moment.delay)
        return self.runs

    def wait_end(self) -> int | None:
        """Return the exit code of this attempt; None if it hung and was killed."""
        assert self.job is not None
        end = self.job.began + _ATTEMPT_SECONDS
        while (code := self.job.poll()) is None:
            if time.time() > end:
                self.job.end()
                return None
            time.sleep(_POLL_SECONDS)
        return code

    def finish(self) -> str:
        """Run the same command again until the run finishes; return why it does not, empty if it does."""
        while True:
            code = self.wait_end()
            if code is None:
                return f"attempt {len(self.codes) + 1} hung for {_ATTEMPT_SECONDS:g} s"
            self.codes.append(code)
            if code == 0:
                return ""
            if len(self.codes) >= _ATTEMPTS:
                return f"{_ATTEMPTS} attempts ended by {self.codes}"
            if code == 2:  # refused; the lease of a killed job is a refusal that passes
                time.sleep(_AGAIN_SECONDS)
            self.start()

    def processes(self) -> list[verify.Process]:
        """Return the processes of the run, without those that Ray keeps for the next job."""
        return [p for p in verify.processes(self.name) if not p.command.startswith(_OF_RAY)]

    def ranks(self) -> list[verify.Process]:
        """Return the training workers."""
        return [p for p in self.processes() if p.command.startswith("ray::RayTrainWorker")]

    def kill_all(self) -> list[str]:
        """Wait until all processes of the run are gone; kill those that stay, and return a line for each."""
        end = time.time() + _GONE_SECONDS
        while left := self.processes():
            if time.time() > end:
                break
            time.sleep(0.2)
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        return [f"process {p.pid} {p.command[:80]}" for p in left]

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "run": {"name": self.name, "storage": self.place.storage},
            "data": {"path": self.place.data, "resolution": 8, "lanes": 4, "shuffle_block": 16},
            "model": {"levels": 2, "steps": 2, "conditioner": {"hidden": 8}},
            "train": {"global_batch": BATCH, "micro_batch": 4, "max_steps": STEPS, "warmup_steps": 8},
            "workers": {"min": 2, "gpus": self.place.gpus, "hang_seconds": 30.0},
            "checkpoint": {"every": CHECKPOINT_EVERY},
            "tracking": {"uri": self.place.tracking, "log_every": 1},
            "eval": {"every": EVAL_EVERY, "images": 8, "samples": 2},
        }
        if self.place.gpus:  # whose sums, without it, differ from run to run
            config["train"]["deterministic"] = True
        for section, fields in self.config.items():
            config[section] = config[section] | fields
        return config


def judge(trial: Trial, failure: str, reference: verify.Reference | None) -> verify.Verdict:
    """Return the verdict on a trial that has ended.

    Args:
        failure: why it did not finish; empty if it did.
        reference: the uninterrupted run; None if this trial is that run.
    """
    left = trial.kill_all()  # before a look at its files, which they would still change
    verdict = verify.Verdict(finished=not failure, orphans=left)
    if failure:
        verdict.problems.append(failure)
    else:
        tensors, curves = outcome(trial, verdict)
        made = [line["world_size"] for line in verify.read_audit(trial.audit) if "step" in line]
        fixed = len(set(made)) == 1
        if reference is None:
            verdict.weights_equal = True
        else:
            verdict.distance = verify.distance(tensors, reference.tensors)
            same = not verify.differing(tensors, reference.tensors)
            verdict.weights_equal = same if fixed else verdict.distance <= TOLERANCE
            verdict.curve_problems = verify.check_curves(curves, reference.curves, 0.0 if fixed else TOLERANCE)
        if not fixed and trial.config.get("workers", {}).get("min", 2) == 2:
            verdict.problems.append(f"the number of workers changed: {sorted(set(made))}")
        verdict.problems += verify.lease_problems(trial.root)
        made_steps = verify.lineage(verify.read_audit(trial.audit))
        verdict.samples_lost, verdict.samples_repeated = verify.count_samples(made_steps, STEPS, BATCH, SAMPLES)
        # files of an unfinished run are no orphans: the next attempt may need or delete them
        verdict.orphans += verify.stray_files(trial.root) + verify.unfinished_uploads(trial.root)
    return verdict


def outcome(trial: Trial, verdict: verify.Verdict) -> tuple[dict[str, Any], verify.Curves]:
    """Return the tensors of the last checkpoint and the curves of a finished run; add what is wrong to the verdict."""
    from mlflow import MlflowClient

    newest = checkpoints.newest(trial.root)
    if newest is None or newest.step != STEPS:
        verdict.problems.append(f"the last checkpoint is {newest.url if newest else 'none'}")
    uri = trial.place.tracking or f"sqlite:///{trial.place.storage}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("eiwtrain")
    runs = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{trial.name}'")
    if len(runs) != 1:
        verdict.problems.append(f"MLflow has {len(runs)} runs of this name")
    if runs and runs[0].info.status != "FINISHED":
        verdict.problems.append(f"MLflow says that the run is {runs[0].info.status}")
    tensors = checkpoints.load(newest) if newest else {}
    return tensors, verify.read_curves(uri, runs[0].info.run_id) if runs else {}


def recovery_seconds(audit: Path, at: float) -> float | None:
    """Return the time from a fault to the first training step beyond those made before training restarted, or before
    the fault if it did not have to restart; None if no step was left to make."""
    lines = verify.read_audit(audit)
    again = min((line["time"] for line in lines if "restored" in line and line["time"] > at), default=at)
    made = [line for line in lines if "step" in line]
    before = max((line["step"] for line in made if line["time"] <= again), default=-1)
    return next((line["time"] - at for line in made if line["time"] > again and line["step"] > before), None)


Strike = Callable[[Trial], "Struck | None"]
"""A function that breaks something of a running trial; it returns None if it came too late to break anything."""
