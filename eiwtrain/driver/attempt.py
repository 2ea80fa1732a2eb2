"""One attempt: workers of a fixed number under Ray Train, what they say, and what they are asked.

Ray places the workers, makes the process group, and sees when one dies. It does not restart or resize them: it would do
so without a checkpoint, and onto nodes that are about to go. The next attempt (`eiwtrain.driver.launch`) is as good.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ray

from eiwtrain.config import Config
from eiwtrain.on_ray import session
from eiwtrain.on_ray.autoscaling import NodeRequest, without_request
from eiwtrain.on_ray.mailbox import Request, start_mailbox
from eiwtrain.storage.lease import Lease
from eiwtrain.terminal.console import Console
from eiwtrain.terminal.signals import Stop, Stopped
from eiwtrain.tracking import TrackedRun
from eiwtrain.train.loop import Job
from eiwtrain.train.loop import train as train_worker

_POLL_SECONDS = 0.25
_HEAR_SECONDS = 15.0  # within which a living worker hears of a stop, whatever it does
_END_SECONDS = 60.0
_LAST_WORDS_SECONDS = 5.0  # for the other ranks of a run that has failed: their notes, points on their way to MLflow
_LOOK_SECONDS = 2.0  # between two looks at the cluster


class Attempt:
    """Workers from their start to their end."""

    def __init__(
        self,
        config: Config,
        data_fingerprint: str,
        tracked: TrackedRun,
        lease: Lease,
        node_request: NodeRequest,
        workers: int,
        number: int,
        began: float,
        attempt_began: float,
        skip_to: int | None,
    ) -> None:
        """Start them.

        Args:
            data_fingerprint: of the data set that they must find.
            node_request: is renewed while they run.
            workers: how many.
            number: of this attempt under this driver, from 1.
            began, attempt_began: Unix times at which the driver started, and at which the attempt before ended.
            skip_to: step to go on with, from the weights of the last good checkpoint.
        """
        self._config, self._lease, self._node_request, self._workers = config, lease, node_request, workers
        self._mailbox = start_mailbox()
        environment = session.forwarded_environment()
        job = Job(
            config, data_fingerprint, tracked, self._mailbox, lease.guard(), environment, began, lease.earlier_seconds,
            attempt_began, lease.failures, skip_to,
        )  # fmt: skip
        self._fit = _Fit(config, job, workers, f"{config.run.name}-{int(began)}-{number}")
        self._nodes: list[str] = []
        self._looked_at = self._room_since = 0.0
        self._asked: Request | None = None
        self._heard = False
        """Whether a worker has heard of it."""

    @property
    def holds_on(self) -> bool:
        """Whether workers that should have ended have not."""
        return self._fit.is_alive()

    def follow(self, console: Console, stop: Stop) -> dict[str, Any]:
        """Print what the workers say and ask them to end where they must, until they have; returns how they ended:
        a dictionary that has one of finished, stopped, again, failed, crashed, lost."""
        try:
            return self._follow(console, stop)
        except ray.exceptions.RayError as e:  # the mailbox is gone, or Ray's head was away
            return {"crashed": _cause(e)}

    def _follow(self, console: Console, stop: Stop) -> dict[str, Any]:
        asked_at = 0.0
        while True:
            ended = not self._fit.is_alive()  # before the mail is read: nothing comes after it
            if (outcome := self._read(console, stop)) is not None:
                return self._ended(outcome, console, stop)
            if stop.number and not stop.training:
                raise Stopped(stop.number)
            if lost := self._lease.lost:
                return {"lost": lost}
            if ended:
                return {"crashed": _cause(self._fit.error)}
            if (request := self._request(stop)) is not None:
                ray.get(self._mailbox.ask.remote(request))
                self._asked, self._heard, asked_at = request, False, time.monotonic()
                if request.kind == "again":
                    console.note(f"{request.reason}: a checkpoint, then on with the workers that there is room for")
            if stop.number and not self._heard and time.monotonic() - asked_at > _HEAR_SECONDS:
                return {"crashed": "no worker heard of the stop"}  # they died, or have not started
            time.sleep(_POLL_SECONDS)

    def _read(self, console: Console, stop: Stop) -> dict[str, Any] | None:
        """Read the mail: print, take note; returns how the workers ended, if they have said so."""
        outcome: dict[str, Any] | None = None
        for kind, content in ray.get(self._mailbox.take.remote()):
            if kind == "training":
                stop.training = True
                self._nodes = content["nodes"]
                console.note(
                    f"training from step {content['step']:,} to {content['of']:,} "
                    f"on {content['workers']} workers; Ctrl-C writes a checkpoint and stops"
                )
            elif kind == "progress":
                console.progress(content)
            elif kind == "note":
                console.note(content)
            elif kind == "heard":
                self._heard = True
            elif kind == "end":
                outcome = outcome or dict(content)
        return outcome

    def _ended(self, outcome: dict[str, Any], console: Console, stop: Stop) -> dict[str, Any]:
        # let the workers return, so that nothing is cut off
        self._fit.join(timeout=_LAST_WORDS_SECONDS if "failed" in outcome else _END_SECONDS)
        self._read(console, stop)
        if "again" in outcome and self.holds_on:
            return {"crashed": f"workers that should have ended did not within {_END_SECONDS:g} s"}
        if "stopped" in outcome and self._asked is not None and self._asked.kind == "stop":
            outcome["stopped"] = self._asked.reason  # rank 0 may have learned of it from another rank alone
        return outcome

    def _request(self, stop: Stop) -> Request | None:
        """What the workers are to be asked for, if it has not been asked yet."""
        if stop.number:
            return Request("stop", stop.reason) if self._asked is None or self._asked.kind == "again" else None
        if self._asked is not None or time.monotonic() - self._looked_at < _LOOK_SECONDS:
            return None
        self._looked_at = time.monotonic()
        self._node_request.renew()
        with contextlib.suppress(Exception):  # Ray's head may be away for a moment; there is another look
            return self._look(self._looked_at)
        return None

    def _look(self, now: float) -> Request | None:
        """What the state of the cluster asks for."""
        if session.own_node_drains():
            return Request("stop", session.OWN_DRAIN)
        if not self._nodes:  # they are starting
            return None
        if going := sorted(session.draining() & set(self._nodes)):
            return Request("again", f"Ray drains node {', '.join(node[:12] for node in going)}")
        if self._workers < self._config.max_workers:
            found = session.room(self._config, self._nodes, patience=_LOOK_SECONDS)
            self._room_since = (self._room_since or now) if found > self._workers else 0.0
            if self._room_since and now - self._room_since >= self._config.workers.grow_seconds:
                return Request("again", f"there is room for {found} workers")
        return None


class _Fit(threading.Thread):
    """Ray Train's blocking `fit` in a thread, where it leaves the signals to us."""

    def __init__(self, config: Config, job: Job, workers: int, name: str) -> None:
        super().__init__(daemon=True, name="fit")
        self._config, self._job, self._workers, self._name = config, job, workers, name
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from eiwtrain.on_ray.network import NodeTorchConfig

        class Trainer(TorchTrainer):
            """One that starts no detached actor to tidy up after a dead driver: Ray does so itself, and the actor stays
            in the cluster for good. Nor does it ask for nodes, which the driver does."""

            def _create_default_callbacks(self) -> list[Any]:
                callbacks = super()._create_default_callbacks()
                return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]

            def _initialize_and_run_controller(self, **options: Any) -> Any:
                options["scaling_policy"] = without_request(options["scaling_policy"])
                return super()._initialize_and_run_controller(**options)

        w = self._config.workers
        notes = Path(tempfile.gettempdir(), f"eiwtrain-ray-{os.getuid()}")  # Ray's own, of no use to us
        try:
            Trainer(
                train_worker,
                train_loop_config={"job": self._job},
                torch_config=NodeTorchConfig(backend="nccl" if w.gpus else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=self._workers,
                    use_gpu=bool(w.gpus),
                    resources_per_worker=session.resources(w),
                ),
                run_config=RunConfig(
                    name=self._name,
                    storage_path=str(notes),
                    failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
                    worker_runtime_env={"env_vars": session.worker_environment()},
                ),
            ).fit()
        except BaseException as e:
            self.error = e
        shutil.rmtree(notes / self._name, ignore_errors=True)


def _cause(error: BaseException | None) -> str:
    """What Ray gave up on, in one line: a rank that died before one that lost its connection to it."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    for rank, text in ((rank, str(failure)) for rank, failure in failures.items()):
        if re.search(r"actor (died|is dead)|health ?check", text, re.IGNORECASE):
            why = re.search(r"Worker exit detail: ([^.]*)", text)
            return f"the process of rank {rank} is gone" + (f" ({why[1]})" if why else "")
    rank, first = next(iter(failures.items()), (-1, error))
    lines = [line.strip() for line in str(first or "").splitlines() if line.strip()]
    cause = next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception|Died)\w*\b", line)), None)
    where = f"rank {rank}: " if rank >= 0 else ""
    return where + (cause or (lines[0] if lines else type(first).__name__))[:300]
