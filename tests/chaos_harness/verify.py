"""What must hold of a run that has finished, whatever happened on the way; each check returns what does not hold.

The checks compare with an uninterrupted run of the same config (`Reference`) and with the samples of the training
split. Nothing here starts, stops or breaks anything.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eiwtrain import checkpoints, storage

COMPARED = ("train/bits_per_dim", "train/grad_norm", "eval/bits_per_dim")
"""Curves that depend only on weights and samples, so that they must equal those of the uninterrupted run."""
MARK = "EIWTRAIN_TRIAL"
"""Environment variable that holds the trial's name in each of its processes."""

Curves = dict[str, list[tuple[int, float]]]
"""The points (step, value) of each metric, in the order in which they were logged."""


@dataclass(frozen=True)
class Reference:
    """Tensors and curves of the uninterrupted run."""

    tensors: dict[str, Tensor]
    curves: Curves


@dataclass
class Verdict:
    """Findings about one trial."""

    finished: bool = False
    samples_lost: int = 0
    samples_repeated: int = 0
    weights_equal: bool = False
    distance: float = 0.0
    """Distance of the tensors from those of the uninterrupted run (function `distance`)."""
    curve_problems: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Everything else that is wrong, a line each."""

    @property
    def survived(self) -> bool:
        """Whether nothing is wrong."""
        counted = self.samples_lost + self.samples_repeated
        wrong = counted or self.curve_problems or self.orphans or self.problems
        return self.finished and self.weights_equal and not wrong

    def lines(self) -> list[str]:
        """Return what is wrong, a line each."""
        lines = list(self.problems)
        if not self.finished:
            lines.append("did not finish")
        if self.samples_lost or self.samples_repeated:
            lines.append(f"{self.samples_lost} samples lost, {self.samples_repeated} repeated")
        if self.finished and not self.weights_equal:
            lines.append(f"weights differ from the uninterrupted run's: distance {self.distance:.2g}")
        return lines + self.curve_problems + [f"orphan: {o}" for o in self.orphans]


# Samples


def read_audit(folder: Path) -> list[dict[str, Any]]:
    """Return the lines that all workers of a run wrote, in order of time, without lines cut short by a kill."""
    lines = []
    for file in folder.glob("*.jsonl"):
        text = file.read_text()
        whole = text[: text.rfind("\n") + 1]  # a writer's last line may be half written
        lines += [json.loads(line) for line in whole.splitlines()]
    return sorted(lines, key=lambda line: line["time"])


def lineage(lines: Iterable[Mapping[str, Any]]) -> dict[int, Counter[int]]:
    """Return how often each sample was counted in each step that led to the final weights.

    A start from step s takes back step s and all later ones.
    """
    made: dict[int, Counter[int]] = defaultdict(Counter)
    for line in lines:
        if "restored" in line:
            for step in [s for s in made if s >= line["restored"]]:
                del made[step]
        else:
            made[line["step"]].update(line["indices"])
    return dict(made)


def count_samples(made: Mapping[int, Counter[int]], steps: int, batch: int, samples: int) -> tuple[int, int]:
    """Return how many samples were lost, and how many were counted too often, over all epochs.

    Args:
        made: the samples counted in each step.
        steps: number of steps of the whole run; they make whole epochs.
        batch: samples of a step; divides `samples`.
        samples: number of samples of the training split.
    """
    if samples % batch or (steps * batch) % samples:
        raise ValueError(f"{steps} steps of {batch} are no whole epochs of {samples} samples in whole steps")
    epochs: dict[int, Counter[int]] = {e: Counter() for e in range(steps * batch // samples)}
    beyond = 0
    for step, counted in made.items():
        if 0 <= step < steps:
            epochs[step * batch // samples].update(counted)
        else:
            beyond += counted.total()
    known = range(samples)
    lost = sum(epoch[i] == 0 for epoch in epochs.values() for i in known)
    repeated = sum(n - 1 if i in known else n for epoch in epochs.values() for i, n in epoch.items() if n)
    return lost, repeated + beyond


# Weights


def differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that only one side has, or that differ in a bit."""
    both = ours.keys() & theirs.keys()
    return sorted((ours.keys() ^ theirs.keys()) | {name for name in both if not _same_bits(ours[name], theirs[name])})


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the largest ||ours - theirs|| / ||theirs|| of the sections weights, ema and moments, each taken as one
    vector with the Euclidean norm; infinite where names or shapes differ or a number is not finite."""
    if ours.keys() != theirs.keys() or any(ours[n].shape != theirs[n].shape for n in theirs):
        return float("inf")
    sections: dict[str, list[str]] = defaultdict(list)
    for name in theirs:
        sections[name.split("/", 1)[0]].append(name)
    largest = 0.0
    for names in sections.values():
        gap = sum(float((ours[n].double() - theirs[n].double()).square().sum()) for n in names) ** 0.5
        size = sum(float(theirs[n].double().square().sum()) for n in names) ** 0.5
        relative = gap / size if size else float(gap > 0)
        if relative != relative:
            return float("inf")
        largest = max(largest, relative)
    return largest


# Curves


def read_curves(uri: str, run_id: str) -> Curves:
    """Return every metric that a run has in MLflow, except the system monitor's, which have no training steps."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    keys = [key for key in client.get_run(run_id).data.metrics if not key.startswith("system/")]
    return {key: [(m.step, m.value) for m in client.get_metric_history(run_id, key)] for key in keys}


def check_curves(ours: Curves, theirs: Curves, tolerance: float = 0.0) -> list[str]:
    """Return what is wrong with the curves: a step that was logged twice, not at all, or with another value.

    Args:
        theirs: curves of the uninterrupted run.
        tolerance: relative tolerance of the values of `COMPARED`; 0: equal to the bit.
    """
    problems = []
    for key, points in ours.items():
        twice = [step for step, n in Counter(step for step, _ in points).items() if n > 1]
        if twice:
            problems.append(f"curve {key}: logged more than once: steps {_some(twice)}")
    every = {key for key, points in theirs.items() if len(points) == max(len(p) for p in theirs.values())}
    for key in sorted(every | (set(COMPARED) & theirs.keys())):
        here, there = dict(ours.get(key, [])), dict(theirs[key])
        if missing := sorted(there.keys() - here.keys()):
            problems.append(f"curve {key}: not logged: steps {_some(missing)}")
        if extra := sorted(here.keys() - there.keys()):
            problems.append(f"curve {key}: logged though the uninterrupted run did not: steps {_some(extra)}")
        if key in COMPARED:
            both = sorted(here.keys() & there.keys())
            other = [s for s in both if not abs(here[s] - there[s]) <= tolerance * abs(there[s])]
            if other:
                problems.append(f"curve {key}: other values than the uninterrupted run's: steps {_some(other)}")
    return problems


def _some(steps: list[int]) -> str:
    return ", ".join(map(str, steps[:5])) + (f" and {len(steps) - 5} more" if len(steps) > 5 else "")


# What is left behind

_TEMPORARY = re.compile(r"\.tmp$|(^|/)\.probe-|\.part$|(^|/)tmp")


def stray_files(root: str) -> list[str]:
    """Return the files below a finished run's folder that belong to nothing: temporary files, probes, and files in its
    checkpoints that no manifest names."""
    names = [name for name, _ in storage.find(root)]
    stray = {name for name in names if _TEMPORARY.search(name)}
    top = checkpoints.folder(root).removeprefix(root).strip("/") + "/"
    manifests = {f"{c.url.rsplit('/', 1)[-1]}": {p.name for p in c.parts} for c in checkpoints.committed(root)}
    for name in names:
        if name.startswith(top):
            folder, _, file = name.removeprefix(top).partition("/")
            if file not in manifests.get(folder, set()) | ({checkpoints.MANIFEST} if folder in manifests else set()):
                stray.add(name)
    return sorted(stray)


def lease_problems(root: str) -> list[str]:
    """Return what is wrong with the lease of a finished run, which must have been given back."""
    try:
        attempt = json.loads(storage.read_bytes(storage.join(root, "lease.json")))["attempt"]
    except FileNotFoundError:
        return ["there is no lease.json"]
    return [] if attempt["outcome"] == "finished" else [f"the lease was not given back: {attempt['outcome']}"]


def unfinished_uploads(root: str) -> list[str]:
    """Return the multipart uploads below an s3:// URL that were neither completed nor aborted; other URLs have none."""
    if not root.startswith("s3://"):
        return []
    import botocore.session

    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    client = botocore.session.Session().create_client("s3")
    answer = client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)
    return [f"upload of {u['Key']} ({u['UploadId']})" for u in answer.get("Uploads", [])]


class Process(NamedTuple):
    """A process of a trial."""

    pid: int
    command: str


def processes(trial: str) -> list[Process]:
    """Return the living processes whose environment has the mark of a trial. A zombie's environment cannot be read."""
    found, wanted = [], f"{MARK}={trial}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found.append(Process(int(entry.name), command))
        except OSError:  # it has ended, or is not ours
            continue
    return sorted(found)
