"""Start or join Ray, run the workers under Ray Train, pass on what they say and what they are told."""

from __future__ import annotations

import os
import re
import secrets
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from eiwtrain import checkpoint, storage
from eiwtrain.config import Config, ConfigError
from eiwtrain.console import Console, duration
from eiwtrain.signals import Stop, Stopped

if TYPE_CHECKING:
    from eiwtrain.tracking import TrackedRun

_POLL_SECONDS = 0.25
_HEAR_SECONDS = 10.0  # within which a living worker hears of a stop, whatever it does
_END_SECONDS = 30.0
_WAITING_SECONDS = 60.0  # after which a job whose workers have not started says what it waits for

_OBJECT_STORE_BYTES = 128 << 20  # nothing but small messages goes through Ray's object store

# Told to glibc where workers start: a freed activation stays with the process, or each would be unmapped and faulted
# in again, which doubles the time of a backward pass that recomputes. Values above any activation's size.
WORKER_ENV = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}

# The driver's settings that workers need; they travel as arguments, so no process list or runtime_env shows them.
_FORWARDED = ("AWS_", "MLFLOW_", "FSSPEC_", "GOOGLE_", "AZURE_", "NCCL_", "EIWTRAIN_")


def joins_cluster() -> bool:
    """Whether the job is to run on a cluster that is there: Ray sets the variable in a submitted job."""
    return bool(os.environ.get("RAY_ADDRESS"))


def train(config: Config, tracked: TrackedRun, began: float, console: Console, stop: Stop) -> dict[str, Any]:
    """Start or join Ray, run the workers, pass on what they say; returns how it ended."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not joins_cluster():
        # Ray's servers listen on every interface, so this cluster asks for a token, of its own: left to itself Ray
        # would keep one in ~/.ray, which the next `ray start` then asks for and `ray job submit` does not give.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    from eiwtrain.mailbox import start_mailbox
    from eiwtrain.worker import Job

    where: dict[str, Any] = {}
    if not joins_cluster():
        where = {
            "address": "local",
            "num_cpus": max(config.max_workers * config.workers.cpus, os.cpu_count() or 1),  # logical: also on one core
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **where)
    except SystemExit:  # how Ray answers SIGTERM meanwhile
        raise Stopped(signal.SIGTERM) from None
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise ConfigError(f"RAY_ADDRESS: Ray cannot be {'joined' if joins_cluster() else 'started'}: {e}") from None
    stop.listen()
    try:
        mailbox = start_mailbox()
        environment = {k: v for k, v in os.environ.items() if k.startswith(_FORWARDED)}
        job = Job(config, tracked, mailbox, environment, began)
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
