"""Real runs of the main job, each broken once in a seeded way and restarted until it finishes: what was lost?

    python -m benchmarks.chaos --trials 100 --seed 0 --json chaos.json     (an hour or more on two cores)
    python -m benchmarks.chaos --place local --trials 8                    (no cluster and no servers)
    python -m benchmarks.chaos --kinds kill-rank --only-seed 17            (one trial again)
    python -m benchmarks.chaos --gpus --trials 24                          (on two GPUs of this machine)

A trial is `python -m eiwtrain.run` of a small flow on two workers, 8 epochs of 80 images, with a checkpoint every 9
steps. On `--place cluster` it joins a Ray cluster of two nodes on this machine; data and checkpoints are on an S3
server (SeaweedFS) and curves on an MLflow server. On `--place local` it starts Ray by itself, with files and sqlite.
With `--gpus` each worker has a GPU, and kernels that compute the same each time.
One fault of one kind hits it at a seeded moment: in start-up, between steps, in an evaluation or at the end; or a
process dies at a fail point in the code. If the command does not exit with 0, the same command is run again.

A trial has survived if
- it finished, and MLflow says so, in one run;
- the tensors of its last checkpoint (weights, average, optimizer moments) equal those of an uninterrupted run to the
  bit; if a lost node changed the number of workers on the way, their relative distance is at most TOLERANCE of
  `chaos_harness.trial`;
- each sample of each epoch was counted once in the steps that led to these tensors, by the record of the workers;
- each step of each curve is in MLflow once, the loss with the uninterrupted run's values (or within TOLERANCE);
- nothing is left: no process, no temporary file, no part of an uncommitted checkpoint, no unfinished upload.

A fault that came too late, when nothing was left to break, is tried again at another moment and not counted.
`recovery` is the time from the fault to the first training step beyond those made before it. Exit code 1 if a trial
did not survive; its logs are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before anything that reads it is imported; small models gain nothing from more threads, and two trials share cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the harness is a part of the test suite

from chaos_harness.faults import FAULTS, Fault, done, draw_time
from chaos_harness.trial import (
    SAMPLES,
    Place,
    Struck,
    Trial,
    draw_moment,
    judge,
    outcome,
    recovery_seconds,
    with_repository,
)
from chaos_harness.verify import Reference, Verdict

WORKERS = 2
_REDRAWS = 5  # moments that are tried until one is not too late


@dataclass
class Row:
    """One trial, judged."""

    kind: str
    seed: int
    moment: str
    struck: str
    verdict: Verdict
    attempts: int
    seconds: float
    recovery: float | None
    logs: str

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON data."""
        verdict = asdict(self.verdict) | {"survived": self.verdict.survived}
        return {k: v for k, v in asdict(self).items() if k != "verdict"} | verdict


@contextlib.contextmanager
def place(kind: str, folder: Path, gpus: Sequence[str] = ()) -> Iterator[Place]:
    """Yield a place to run in, with a data set of SAMPLES training images in it, and a GPU for each worker or none."""
    each = 1 if gpus else 0
    if kind == "local":
        storage = str(folder / "runs")
        _write_data(folder / "images", str(folder / "data"))
        own = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        yield Place(str(folder / "data"), storage, None, own, gpus=each)
        return
    from cluster.local import LocalCluster

    with (
        _environment({"PYTHONPATH": with_repository(os.environ.get("PYTHONPATH"))}),
        LocalCluster(folder / "cluster", nodes=WORKERS, cpus=1, s3=True, mlflow=True, gpus=gpus) as cluster,
        _environment(cluster.env),
    ):
        bucket = f"s3://{cluster.bucket}"
        _write_data(folder / "images", f"{bucket}/data")
        yield Place(
            f"{bucket}/data", f"{bucket}/runs", cluster.mlflow_uri, dict(cluster.env), cluster.s3, cluster, each
        )


def reference(place: Place, folder: Path) -> Reference:
    """Run once without a fault, and return what it gave.

    Raises:
        RuntimeError: it is not as a run should be.
    """
    trial = Trial(place, "reference", folder / "reference", random.Random(0))
    trial.start()
    verdict = judge(trial, trial.finish(), None)
    if not verdict.survived:
        raise RuntimeError(f"the uninterrupted run: {'; '.join(verdict.lines())}; logs: {trial.folder}")
    return Reference(*outcome(trial, verdict))


def run_trial(kind: Fault, seed: int, place: Place, whole: Reference, folder: Path) -> Row | None:
    """Run one trial, with another moment if the fault came too late; return None if it always did."""
    rng = random.Random(f"{kind.name} {seed}")
    for draw in range(_REDRAWS):
        name = f"{kind.name.replace('.', '-')}-{seed}" + (f"-{draw}" if draw else "")
        trial = Trial(place, name, folder / name, rng, kind.config, submitted=kind.submitted)
        row = _try(trial, kind, seed, whole)
        if row is not None:
            if row.verdict.survived:
                shutil.rmtree(trial.folder)
            return row
        shutil.rmtree(trial.folder)
    return None


def _try(trial: Trial, kind: Fault, seed: int, whole: Reference) -> Row | None:
    began = time.time()
    struck: Struck | None
    if kind.failpoint is not None:
        nth = draw_time(trial.rng, kind.failpoint)
        moment = f"time {nth}"
        trial.environment["EIWTRAIN_FAILPOINTS"] = f"{kind.failpoint}=kill@{nth}"
        trial.environment["EIWTRAIN_FAILPOINTS_DONE"] = str(done(trial))
        trial.start()
        struck = kind.strike(trial)
    else:
        when = draw_moment(trial.rng, kind.earliest)
        moment = str(when)
        trial.start()
        struck = kind.strike(trial) if trial.wait_for(when) else None
    failure = trial.finish()
    if struck is None and not failure:
        trial.kill_all()
        return None
    verdict = judge(trial, failure, whole)
    recovery = recovery_seconds(trial.audit, struck.time) if struck else None
    what = struck.what if struck else "nothing"
    row = Row(
        kind.name, seed, moment, what, verdict, len(trial.codes), time.time() - began, recovery, str(trial.folder)
    )
    (trial.folder / "verdict.json").write_text(json.dumps(row.to_json(), indent=1) + "\n")
    return row


def totals(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the figures of several trials."""
    recoveries = [row.recovery for row in rows if row.recovery is not None]
    return {
        "trials": len(rows),
        "survived": sum(row.verdict.survived for row in rows),
        "samples_lost": sum(row.verdict.samples_lost for row in rows),
        "samples_repeated": sum(row.verdict.samples_repeated for row in rows),
        "weights_equal": sum(row.verdict.weights_equal for row in rows),
        "orphans": sum(len(row.verdict.orphans) for row in rows),
        "recovery_seconds": round(statistics.mean(recoveries), 1) if recoveries else None,
    }


def table(rows: Sequence[Row]) -> str:
    """Return the trials by kind of fault, in Markdown."""
    lines = [
        "| fault | trials | survived | samples lost | repeated | weights equal | orphans | recovery, s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    kinds = sorted({row.kind for row in rows})
    for name, of_kind in [(kind, [r for r in rows if r.kind == kind]) for kind in kinds] + [("all", list(rows))]:
        cells = ["-" if value is None else str(value) for value in totals(of_kind).values()]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def choose(names: Sequence[str] | None, offered: set[str]) -> list[Fault]:
    """Return the faults to draw from: those named, or all that the place can offer.

    Raises:
        ValueError: there is no such fault, or not at this place.
    """
    unknown = set(names or ()) - FAULTS.keys()
    if unknown:
        raise ValueError(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    chosen = [FAULTS[name] for name in names] if names else [f for f in FAULTS.values() if f.needs <= offered]
    if lacking := [f.name for f in chosen if not f.needs <= offered]:
        raise ValueError(f"not available at this place: {', '.join(lacking)}")
    return chosen


def schedule(faults: Sequence[Fault], trials: int, seed: int) -> list[tuple[Fault, int]]:
    """Return which fault is tried with which seed: all in turn, in a seeded order, so that all get equally many."""
    order = list(faults)
    random.Random(seed).shuffle(order)
    return [(order[i % len(order)], seed * 100_000 + i) for i in range(trials)]


def run(
    faults: Sequence[str] | None,
    trials: int,
    seed: int,
    where: str,
    folder: Path,
    only_seed: int | None = None,
    gpus: Sequence[str] = (),
) -> list[Row]:
    """Run all trials, and print a line for each."""
    rows = []
    with place(where, folder, gpus) as there:
        chosen = choose(faults, there.offers)
        planned = schedule(chosen, trials, seed) if only_seed is None else [(fault, only_seed) for fault in chosen]
        began = time.time()
        whole = reference(there, folder)
        print(f"the uninterrupted run: {time.time() - began:.0f} s", flush=True)
        for number, (kind, own_seed) in enumerate(planned, 1):
            row = run_trial(kind, own_seed, there, whole, folder)
            start = f"{number:>3}/{len(planned)}  {kind.name}, seed {own_seed}"
            if row is None:
                print(f"{start}: too late {_REDRAWS} times, not counted", flush=True)
                continue
            rows.append(row)
            recovery = "" if row.recovery is None else f", back after {row.recovery:.1f} s"
            print(
                f"{start}: {'survived' if row.verdict.survived else 'FAILED'}, {row.struck}, {row.moment}; "
                f"{row.attempts} attempts, {row.seconds:.0f} s{recovery}",
                flush=True,
            )
            for line in row.verdict.lines():
                print(f"         {line}", flush=True)
            if not row.verdict.survived:
                print(f"         logs: {row.logs}", flush=True)
    return rows


def own_gpus() -> list[str]:
    """Return a GPU of this machine for each worker, as CUDA_VISIBLE_DEVICES names them.

    Raises:
        ValueError: there are fewer.
    """
    import torch

    count = torch.cuda.device_count()
    if count < WORKERS:
        raise ValueError(f"a trial has {WORKERS} workers with a GPU each, and PyTorch finds {count} here")
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(i) for i in range(count)])[:WORKERS]


def _write_data(images: Path, output: str) -> None:
    import numpy as np
    from PIL import Image

    import data_prep

    held_out = 16
    generator = np.random.default_rng(0)
    for i in range(SAMPLES + held_out):
        coarse = Image.fromarray(generator.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        path = images / f"class{i % 2}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((8, 8), Image.Resampling.BILINEAR).save(path)
    split = {"split": f"last:{held_out}"}
    data_prep.prepare("folder", output, 8, path=str(images), of_source=split, shard_size=16, name="data")


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", type=lambda text: text.split(","), help=f"of {','.join(FAULTS)} (default: all)")
    parser.add_argument("--only-seed", type=int, help="one trial of each kind, with this seed, as a table names it")
    parser.add_argument("--place", choices=("cluster", "local"), default="cluster", help="(default: %(default)s)")
    parser.add_argument("--gpus", action="store_true", help="a GPU for each worker, and deterministic kernels")
    parser.add_argument("--folder", type=Path, help="new, and kept (default: temporary, kept where a trial failed)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args(argv)
    try:
        choose(args.kinds, {"s3", "cluster"} if args.place == "cluster" else set())
    except ValueError as e:
        parser.error(f"--kinds: {e}")
    try:
        gpus = own_gpus() if args.gpus else []
    except ValueError as e:
        parser.error(f"--gpus: {e}")
    folder = args.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"--folder: {folder} is not empty")
    began = time.time()
    rows = run(args.kinds, args.trials, args.seed, args.place, folder.absolute(), args.only_seed, gpus)
    machine = f"{os.cpu_count()} cores" + (f" and {len(gpus)} GPUs" if gpus else "")
    print(f"\n{table(rows)}\n\n{time.time() - began:.0f} s on {machine}")
    if args.json:
        result = totals(rows) | {
            "seed": args.seed,
            "place": args.place,
            "gpus": len(gpus),
            "rows": [row.to_json() for row in rows],
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    survived = all(row.verdict.survived for row in rows)
    if survived and args.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if rows and survived else 1


if __name__ == "__main__":
    sys.exit(main())
