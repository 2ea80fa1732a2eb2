"""Runs a function in a fixed number of workers under Ray Train, and says why they failed.

Not for what the workers do (`eiwtrain.train.loop`), nor for when they start and stop (`eiwtrain.driver.attempt`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import shutil
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup, state, worker_group

from eiwtrain.config import Workers
from eiwtrain.on_ray import session
from eiwtrain.on_ray.autoscaling import without_request
from eiwtrain.on_ray.network import NodeTorchConfig
from eiwtrain.storage.private import private_folder

_MOST_WORDS = 300  # characters of a cause
_MARGIN_SECONDS = 60.0  # between the watchdog's end of a worker and that of a collective


def collective_seconds(workers: Workers) -> int:
    """Return the seconds for which a collective waits for the other ranks: longer than the watchdog of any rank, whose
    report names what hangs, while a collective that gives up aborts the process that waited."""
    return math.ceil(max(workers.hang_seconds, session.START_SECONDS) + _MARGIN_SECONDS)


class Fit(threading.Thread):
    """Ray Train's blocking `fit` in a thread, where it leaves the signals to the driver. Starts at once."""

    def __init__(
        self, call: Callable[[dict[str, Any]], None], settings: dict[str, Any], config: Workers, workers: int, name: str
    ) -> None:
        """Start the workers.

        Args:
            call: runs in each worker, with the process group up.
            settings: its argument.
            workers: how many.
            name: unique among the attempts on this machine.
        """
        super().__init__(daemon=True, name="fit")
        self._call, self._settings, self._config, self._workers, self._name = call, settings, config, workers, name
        self._notes = private_folder("eiwtrain-ray", "TMPDIR")  # Ray's own, of no use to us, but Ray trusts them
        self._error: BaseException | None = None
        self.start()

    @property
    def cause(self) -> str:
        """Why the workers failed, in one line."""
        return cause_of(self._error)

    def run(self) -> None:
        try:
            _Trainer(
                self._call,
                train_loop_config=self._settings,
                torch_config=NodeTorchConfig(
                    backend="nccl" if self._config.gpus else "gloo", timeout_s=collective_seconds(self._config)
                ),
                scaling_config=ScalingConfig(
                    num_workers=self._workers,
                    use_gpu=bool(self._config.gpus),
                    resources_per_worker=session.resources(self._config),
                ),
                run_config=RunConfig(
                    name=self._name,
                    storage_path=str(self._notes),
                    failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
                    worker_runtime_env={"env_vars": session.worker_environment()},
                ),
            ).fit()
        except BaseException as e:
            self._error = e
        shutil.rmtree(self._notes / self._name, ignore_errors=True)


class _Trainer(TorchTrainer):
    """Ray's trainer without the actors that a run does not need: for each, Ray would start a process and import itself
    and torch, before the workers start or beside them.

    One would control the workers: here, a thread of the driver does, which ends them when it ends. One would tidy up
    after a dead driver: Ray does so itself, and the actor stays in the cluster forever. Another would hand out Ray's
    data sets. Nor does it ask for nodes, which the driver does.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unwanted = ("PlacementGroupCleanerCallback", "DatasetsCallback")
        return [c for c in super()._create_default_callbacks() if type(c).__name__ not in unwanted]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        options["scaling_policy"] = without_request(options["scaling_policy"])
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # what ends an attempt comes as an exception
        controller = _Controller(**options)
        asyncio.run(controller.run())
        return controller.get_result()


class _WorkerGroup(WorkerGroup):
    """Workers of a controller that is no actor."""

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,  # whom workers would ask for checkpoints that they have reported
                    **{name: values[i] for name, values in train_context_args.items()},
                )
                for i, worker in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        """Return nothing on a Ray that this program has started: workers have its environment, and need none of their
        own. Ray starts Python twice for a process with an environment of its own, and keeps none waiting for it."""
        return WorkerGroup._get_worker_runtime_env(custom_runtime_env) if session.joins_cluster() else None


class _Controller(TrainController):
    worker_group_cls = _WorkerGroup


class _NoActor:
    """Stands where Ray Train's workers would meet to report checkpoints to it: they report none."""

    def options(self, **_: Any) -> _NoActor:
        return self

    def remote(self, **_: Any) -> str:
        return "none"


def _end_no_actor(_: Any) -> None:
    """Do nothing, where Ray Train would kill that actor."""


worker_group.SynchronizationActor = _NoActor()
state._shutdown_sync_actor = _end_no_actor


def cause_of(error: BaseException | None) -> str:
    """Return why Ray gave up, in one line: a rank that died comes before one that lost its connection to it."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    for rank, text in ((rank, str(failure)) for rank, failure in failures.items()):
        if re.search(r"actor (died|is dead)|health ?check", text, re.IGNORECASE):
            why = re.search(r"Worker exit detail: ([^.]*)", text)
            return f"the process of rank {rank} is gone" + (f" ({why[1]})" if why else "")
    rank, first = next(iter(failures.items()), (-1, error))
    lines = [line.strip() for line in str(first or "").splitlines() if line.strip()]
    cause = next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception|Died)\w*\b", line)), None)
    where = f"rank {rank}: " if rank >= 0 else ""
    return where + (cause or (lines[0] if lines else type(first).__name__))[:_MOST_WORDS]
