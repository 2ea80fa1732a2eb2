"""Train one config at several numbers of workers, and with workers that change on the way. Not for other loaders.

Each run is `python -m eiwtrain.run` in float32 on a Ray cluster of four nodes with a worker each, all on this machine.
The last one starts on four workers. A node is killed, and another; then the driver is killed by SIGKILL, two nodes
join, and the same command resumes. The curves come from MLflow, the samples of each step from the workers' own record.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chaos_harness.trial import Moment, Place, Trial, outcome, with_repository
from chaos_harness.verify import Verdict, count_samples, lineage, read_audit

STEPS, BATCH, SAMPLES = 120, 24, 576
WORKERS = (1, 2, 3, 4)
CHANGING = "changing"
LOSSES = (30, 60)
"""Steps after which a node is killed."""
KILL = 90
"""Step after which the driver is killed."""
LOSS = "train/bits_per_dim"
_CONFIG: dict[str, dict[str, Any]] = {
    "train": {"global_batch": BATCH, "micro_batch": 6, "max_steps": STEPS, "warmup_steps": 8, "precision": "fp32"},
    "eval": {"every": 10 * STEPS, "images": 8, "samples": 2},
}


def measure(folder: Path) -> list[dict[str, Any]]:
    """Return {"name", "loss", "workers", "lost", "repeated"} of each run, the first two lists by step.

    Args:
        folder: a new one with the data set `data`.
    """
    with _cluster(folder) as place:
        rows = [_row(_trial(place, folder, str(n), n, n), str(n)) for n in WORKERS]
        trial = _trial(place, folder, CHANGING, 1, max(WORKERS))
        return [*rows, _row(trial, CHANGING)]


@contextlib.contextmanager
def _cluster(folder: Path) -> Iterator[Place]:
    from cluster.local import LocalCluster

    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = with_repository(path)
    try:
        with LocalCluster(folder / "cluster", nodes=max(WORKERS), cpus=1, s3=False, mlflow=False) as cluster:
            yield Place(str(folder / "data"), str(folder / "runs"), None, dict(cluster.env), None, cluster)
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path


def _trial(place: Place, folder: Path, name: str, least: int, most: int) -> Trial:
    """Run to the end, with all that happens on the way to the run whose workers change."""
    workers = {"min": least, "max": most, "hang_seconds": 120.0}
    trial = Trial(place, f"workers-{name}", folder / name, random.Random(0), _CONFIG | {"workers": workers})
    trial.start()
    cluster = place.cluster
    if name == CHANGING and cluster is not None:
        for step in LOSSES:
            _wait(trial, step)
            [node for node in cluster.nodes if node.alive][-1].kill()
        _wait(trial, KILL)
        assert trial.job is not None
        trial.job.send(signal.SIGKILL)
        trial.codes.append(trial.wait_end() or 0)
        for _ in LOSSES:
            cluster.add_node()
        trial.start()
    if failure := trial.finish():
        raise RuntimeError(f"{trial.name}: {failure}; logs: {trial.folder}")
    return trial


def _wait(trial: Trial, step: int) -> None:
    if not trial.wait_for(Moment(step, 0.0)):
        raise RuntimeError(f"{trial.name} ended before step {step}; logs: {trial.folder}")


def _row(trial: Trial, name: str) -> dict[str, Any]:
    lines = read_audit(trial.audit)
    last: dict[int, int] = {line["step"]: line["world_size"] for line in lines if "step" in line}
    lost, repeated = count_samples(lineage(lines), STEPS, BATCH, SAMPLES)
    _, curves = outcome(trial, Verdict())
    loss = dict(curves[LOSS])
    return {
        "name": name,
        "loss": [loss[step] for step in sorted(loss)],
        "workers": [last[step] for step in sorted(last)],
        "lost": lost,
        "repeated": repeated,
    }
