"""Start or join Ray, run the workers under Ray Train, pass on what they say and what they are told."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from eiwtrain import checkpoint, ray_session, storage
from eiwtrain.config import Config, ConfigError
from eiwtrain.console import Console, duration
from eiwtrain.signals import Stop, Stopped

if TYPE_CHECKING:
    from eiwtrain.tracking import TrackedRun

_POLL_SECONDS = 0.25
_HEAR_SECONDS = 10.0  # within which a living worker hears of a stop, whatever it does
_END_SECONDS = 30.0
_WAITING_SECONDS = 60.0  # after which a job whose workers have not started says what it waits for

# Told to glibc where workers start: a freed activation stays with the process, or each would be unmapped and faulted
# in again, which doubles the time of a backward pass that recomputes. Values above any activation's size.
WORKER_ENV = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


def train(config: Config, tracked: TrackedRun, began: float, console: Console, stop: Stop) -> dict[str, Any]:
    """Start or join Ray, run the workers, pass on what they say; returns how it ended."""
    import ray

    from eiwtrain.mailbox import start_mailbox
    from eiwtrain.worker import Job

    try:  # logical CPUs: also on one core
        ray_session.start(max(config.max_workers * config.workers.cpus, os.cpu_count() or 1))
    except SystemExit:  # how Ray answers SIGTERM meanwhile
        raise Stopped(signal.SIGTERM) from None
    except ray_session.RayError as e:
        raise ConfigError(str(e)) from None
    stop.listen()
    try:
        mailbox = start_mailbox()
        job = Job(config, tracked, mailbox, ray_session.forwarded_environment(), began)
        console.note(f"starting {config.max_workers} workers ({duration(time.time() - began)} since the start)")
        fit = Fit(config, job)
        return _listen(config, fit, mailbox, console, stop)
    finally:
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

        from eiwtrain.worker import train as train_worker

        w = self._config.workers
        local = storage.is_local(self._config.run.storage)
        try:
            TorchTrainer(
                train_worker,
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
                    worker_runtime_env={"env_vars": WORKER_ENV},
                ),
            ).fit()
        except BaseException as e:
            self.error = e


def _listen(config: Config, fit: Fit, mailbox: Any, console: Console, stop: Stop) -> dict[str, Any]:
    """Print what the workers say and pass a stop on, until they have ended."""
    import ray

    started, heard, asked_at, said_at = False, False, 0.0, time.time()
    while True:
        ended = not fit.is_alive()  # before the mail is read: nothing comes after it
        for kind, content in ray.get(mailbox.take.remote()):
            if kind == "training":
                started, stop.training = True, True
                console.note(
                    f"training from step {content['step']:,} to {content['of']:,} "
                    f"on {content['workers']} workers; Ctrl-C writes a checkpoint and stops"
                )
            elif kind == "progress":
                console.progress(content)
            elif kind == "note":
                console.note(content)
            elif kind == "heard":
                heard = True
            elif kind == "end":
                if "failed" not in content:
                    fit.join(timeout=_END_SECONDS)  # let the workers return, so that nothing is cut off
                if "stopped" in content and stop.number:  # rank 0 may have learned of it from another rank alone
                    content["stopped"] = stop.reason
                return dict(content)
        if ended:
            return {"failed": _cause(fit.error, config)}
        if stop.number and not asked_at:
            ray.get(mailbox.stop.remote(stop.reason))
            asked_at = time.time()
        if asked_at and not heard and time.time() - asked_at > _HEAR_SECONDS:  # they died, and are not yet back
            newest = checkpoint.newest(config.root)
            step, url = (newest.step, newest.url) if newest else (0, None)
            return {"stopped": stop.reason, "step": step, "checkpoint": url}
        if not started and time.time() - said_at > _WAITING_SECONDS:
            said_at = time.time()
            w, there = config.workers, ray.cluster_resources()
            console.note(
                f"waiting for {w.min} workers of {w.cpus} CPU and {w.gpus} GPU each; the cluster has "
                f"{there.get('CPU', 0):g} CPU and {there.get('GPU', 0):g} GPU"
            )
        time.sleep(_POLL_SECONDS)


def _cause(error: BaseException | None, config: Config) -> str:
    """What Ray gave up on, the last good checkpoint and where more is written."""
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    cause = next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception|Died)\w*\b", line)), None)
    newest = checkpoint.newest(config.root)
    return (
        f"the workers failed more than run.max_failures = {config.run.max_failures} times, the last time by "
        f"{(cause or (lines[0] if lines else type(error).__name__))[:300]}\n"
        f"last good checkpoint: {newest.url if newest else 'none'}; the same command goes on from it\n"
        "worker logs: /tmp/ray/session_latest/logs (on a cluster: its session folder)"
    )
