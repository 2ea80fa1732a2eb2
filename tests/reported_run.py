"""A run as training records it, in a second: checkpoints, lease, curves and samples, and its MLflow in a database."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from helpers import tiny_config
from PIL import Image
from small_run import commit

from eiwtrain import tracking
from eiwtrain.config import Config
from eiwtrain.storage.lease import Lease
from eiwtrain.tracking import curves, provenance

STEPS = 12
KINDS = {"productive": 60.0, "startup": 20.0, "data_wait": 2.0, "checkpoint": 1.0, "evaluation": 7.0, "lost": 5.0}


def begin(folder: Path, database: Path, name: str = "tiny", command: str = "the command", **fields: Any) -> Config:
    """Begin a run in MLflow and under its lease, as a job does that a SIGTERM stops before its first step."""
    fields["run"] = {"name": name} | fields.get("run", {})
    config = Config.model_validate(tiny_config(folder, **fields))
    Path(config.run.storage).mkdir(exist_ok=True)
    if not Path(config.run.storage, "mlflow.db").exists():
        shutil.copy(database, config.run.storage)
    tracked = tracking.begin(config, provenance.tags(config, command))
    tracking.end(tracked, "KILLED")
    Lease.acquire(config.root, name, print).release("stopped", "SIGTERM")
    return config


def train(config: Config, /, data_fingerprint: str = "f" * 64, workers: int = 2, **state: Any) -> str:
    """Record a job that makes all steps; return the run's folder."""
    tracked = tracking.begin(config, {})
    lease = Lease.acquire(config.root, config.run.name, print)
    tracker = tracking.Tracker(tracked, journal=f"{config.root}/metrics.jsonl")
    for step in range(1, STEPS + 1):
        tracker.metrics(
            step, {curves.BITS_PER_DIM: 8 - step / 4, curves.LR: 1e-3, curves.GOODPUT: 0.5, curves.WORKERS: workers}
        )
        if step % 6 == 0:
            tracker.metrics(step, {curves.HELD_OUT_BITS_PER_DIM: 7 - step / 4, curves.CODER_BITS_PER_DIM["png"]: 5.0})
            tracker.image(step, "samples", Image.new("RGB", (40, 20), (20 * step, 0, 0)))
    clock = {"wall": 100.0, "seconds": KINDS, "cost": 1.5, "costs": dict.fromkeys(KINDS, 0.25)}
    about = {"config": config.model_dump(mode="json"), "parameters": 12345, "clock": clock}
    for step in (6, STEPS):
        commit(config.root, step, 7 - step / 4, **(about | {"data_fingerprint": data_fingerprint} | state))
    tracker.close()
    tracking.end(tracked, "FINISHED")
    lease.cost = 1.5
    lease.failed("rank 1 died")
    lease.release("finished")
    return config.root
