"""How long a run takes from its command to its first step, and from a killed rank to its next new step, by parts.

    python -m benchmarks.start --json start.json                 (about 3 minutes on two cores)
    python -m benchmarks.start --tree /path/to/older --runs 1    (the code of another checkout beside this one's)
    RAY_preload_python_modules= python -m benchmarks.start       (no process is ready, as on a cluster that is joined)
    python -m benchmarks.start --bucket data.resolution=8 ...    (a bucket, without and with copies of checkpoints near)

A run is `python -m eiwtrain.run` of the quick start in an empty folder: it writes its data set, creates MLflow's
database, starts Ray and two workers. A checkpoint is written every CHECKPOINT_EVERY steps. Once it has trained for
--trains seconds, a worker is killed by SIGKILL half-way between two checkpoints, and the run resumes from the first. It
has recovered when it makes a step that it had not made.

With --bucket the run is on a real S3 server of this machine, SeaweedFS, behind a relay that makes it as far away as a
bucket often is (LATENCY, BYTES_PER_SECOND of a connection), once without and once with `checkpoint.near`. The relay
counts the bytes that the server sends from the kill to the next new step. The worker is killed as soon as a checkpoint
is reported.

Seconds of CPU are those of all processes of the run together, and wander less than wall time where other jobs share the
machine. Parts come from `eiwtrain.testing.timeline`, for the process that was last to finish a part; a checkout without
that file gives the totals alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.relay import Relay, relayed
from cluster.s3 import S3Server

HERE = Path(__file__).parents[1]
CHECKPOINT_EVERY = 8
LATENCY = 0.02
"""Seconds that each request to the bucket takes longer."""
BYTES_PER_SECOND = 100e6
"""How fast the bucket sends and takes over one connection."""
_POLL_SECONDS = 0.1
_PATIENCE = 400.0  # seconds for a run to get as far as it should
_SAVED = "checkpoint at step "  # begins a line of the run, once one is committed and its copies are left
_MARK = "EIWTRAIN_BENCHMARK"  # names the processes of a run


class Processes:
    """The processes of one run, and how much CPU they have used."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._seconds: dict[int, float] = {}
        self._own: dict[int, psutil.Process] = {}
        self._others: set[int] = set()

    def look(self) -> float:
        """Return the seconds of CPU so far, user and system, of all processes."""
        for pid in psutil.pids():
            if pid in self._own or pid in self._others:
                continue
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.environ().get(_MARK) == self._mark:
                    self._own[pid] = process
                    continue
            self._others.add(pid)
        for pid, process in list(self._own.items()):
            try:
                times = process.cpu_times()
                self._seconds[pid] = times.user + times.system
            except psutil.Error:
                del self._own[pid]
        return sum(self._seconds.values())

    def ranks(self) -> list[int]:
        """Return the ids of the training workers."""
        found = []
        for pid, process in self._own.items():
            with contextlib.suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(pid)
        return sorted(found)

    def kill_all(self) -> None:
        """Kill what is left."""
        self.look()
        for process in self._own.values():
            with contextlib.suppress(psutil.Error):
                process.kill()


@dataclass(frozen=True)
class Span:
    """A start or a recovery."""

    seconds: float
    cpu_seconds: float
    parts: dict[str, float]
    """Wall seconds of each part, in order of time."""


@dataclass(frozen=True)
class Row:
    """One run."""

    tree: str
    """Checkout, or what else makes the difference."""
    start: Span
    recovery: Span
    recovery_bytes: int | None = None
    """Bytes that the bucket sent in the recovery; None without a bucket."""
    resumed: str = ""
    """What the run printed of its recovery."""


@contextlib.contextmanager
def bucket() -> Iterator[tuple[dict[str, str], Relay]]:
    """Yield the environment of a new bucket that is as far away as the constants say, and the relay before it."""
    with tempfile.TemporaryDirectory(prefix="bucket-") as folder, S3Server(Path(folder, "s3")) as server:
        port = server.endpoint.rpartition(":")[2]
        with relayed(int(port), LATENCY, BYTES_PER_SECOND) as relay:
            there = {name: value.replace(f":{port}", f":{relay.port}") for name, value in server.env.items()}
            yield there | {"EIWTRAIN_STORAGE": f"s3://{server.bucket}"}, relay


def measure_near(trains: float, overrides: Sequence[str]) -> list[Row]:
    """Measure a run on a bucket without and with copies of its checkpoints on this machine."""
    rows = []
    for title in ("bucket alone", "checkpoint.near"):
        with tempfile.TemporaryDirectory(prefix="near-", dir="/dev/shm") as near, bucket() as (environment, relay):
            own = [f"checkpoint.near={near}"] * (title == "checkpoint.near")
            row = measure(HERE, trains, [*overrides, *own], environment, relay)
        rows.append(replace(row, tree=title))
    return rows


def measure(
    tree: Path,
    trains: float,
    overrides: Sequence[str] = (),
    surroundings: Mapping[str, str] | None = None,
    relay: Relay | None = None,
) -> Row:
    """Run the quick start of the checkout `tree`, kill a rank when it has trained for a while, and return how long the
    start and the recovery took.

    Args:
        surroundings: environment variables of the run's storage; None: a local folder.
        relay: counts what this storage sends.

    Raises:
        RuntimeError: the run ended before, or did not get so far in time.
    """
    folder = Path(tempfile.mkdtemp(prefix="start-"))
    mark = uuid.uuid4().hex
    for name in ("audit", "timeline"):
        (folder / name).mkdir()
    environment = os.environ | {
        _MARK: mark,
        "PYTHONPATH": str(tree),
        "PYTHONUNBUFFERED": "1",
        "EIWTRAIN_STORAGE": str(folder),
        "EIWTRAIN_DATA": str(folder / "data"),
        "EIWTRAIN_AUDIT": str(folder / "audit"),
        "EIWTRAIN_TIMELINE": str(folder / "timeline"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        **(surroundings or {}),
    }
    config = [f"checkpoint.every={CHECKPOINT_EVERY}", "eval.every=100000", "train.max_steps=100000", *overrides]
    command = [sys.executable, "-m", "eiwtrain.run", "configs/quickstart.yaml", *config]
    log = folder / "log"
    processes = Processes(mark)
    began = time.time()
    with log.open("w") as out:
        run = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        first, cpu = _wait(run, processes, folder, began, lambda step: step >= 0)
        start = Span(first - began, cpu, _parts(folder, began, first))
        half = CHECKPOINT_EVERY // 2
        _wait(run, processes, folder, first + trains, lambda step: step > half and step % CHECKPOINT_EVERY == half - 1)
        if relay:  # far from the bucket a checkpoint may take longer than its interval
            saved = log.read_text().count(_SAVED)
            _wait(run, processes, folder, time.time(), lambda _: log.read_text().count(_SAVED) > saved)
        processes.look()
        os.kill(processes.ranks()[-1], signal.SIGKILL)
        killed, before, sent = time.time(), processes.look(), relay.sent if relay else 0
        furthest = max(_steps(folder, 0.0).values())  # of any rank: the others may have made one more
        new, cpu = _wait(run, processes, folder, killed, lambda step: step > furthest)
        recovery = Span(new - killed, cpu - before, _parts(folder, killed, new))
        said = [line for line in log.read_text().splitlines() if line.startswith(("resuming", "checkpoint.near"))]
        return Row(str(tree), start, recovery, relay.sent - sent if relay else None, "; ".join(said))
    except RuntimeError as e:
        raise RuntimeError(f"{e}\n{log.read_text()[-2000:]}") from None
    finally:
        run.send_signal(signal.SIGKILL)
        processes.kill_all()
        run.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(
    run: subprocess.Popen[bytes], processes: Processes, folder: Path, since: float, wanted: Any
) -> tuple[float, float]:
    """Return when a step that is `wanted` was made after the time `since`, and the CPU seconds of the run by then."""
    while True:
        cpu = processes.look()
        if made := [moment for moment, step in _steps(folder, since).items() if wanted(step)]:
            return min(made), cpu
        if run.poll() is not None:
            raise RuntimeError(f"the run ended with {run.returncode}")
        if time.time() - since > _PATIENCE:
            raise RuntimeError(f"no such step within {_PATIENCE:g} s")
        time.sleep(_POLL_SECONDS)


def _steps(folder: Path, since: float) -> dict[float, int]:
    """Return the steps made after the time `since`, by the time of each."""
    return {line["time"]: line["step"] for line in _lines(folder / "audit") if "step" in line and line["time"] > since}


def _lines(folder: Path) -> list[dict[str, Any]]:
    """Return what processes have written to files of this folder, in order of time."""
    lines = []
    for file in folder.glob("*.jsonl"):
        lines += [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return sorted(lines, key=lambda line: line["time"])


def _parts(folder: Path, began: float, ended: float) -> dict[str, float]:
    """Return the seconds of each part between two times: of ranks, the later one's end counts."""
    marks: dict[str, float] = {}
    for line in _lines(folder / "timeline"):
        if began < line["time"] <= ended:
            marks[line["part"]] = line["time"]
    parts, before = {}, began
    for part, moment in sorted(marks.items(), key=lambda mark: mark[1]):
        parts[part], before = moment - before, moment
    return parts | {"steps": ended - before} if parts else {}


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m benchmarks.start", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tree", type=Path, action="append", default=[], help="another checkout, measured beside this")
    parser.add_argument("--runs", type=int, default=2, help="of each checkout, in turn; the median counts (default 2)")
    parser.add_argument("--trains", type=float, default=45.0, help="seconds before a rank is killed (default 45)")
    parser.add_argument("--bucket", action="store_true", help="compare checkpoint.near with a bucket alone")
    parser.add_argument("--json", type=Path, help="file for all rows")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="of the quick start's config")
    args = parser.parse_args(argv)
    trees = [HERE, *(tree.resolve() for tree in args.tree)]
    rows: list[Row] = []
    for _ in range(args.runs):
        if args.bucket:
            new = measure_near(args.trains, args.overrides)
        else:
            new = [measure(tree, args.trains, args.overrides) for tree in trees]
        for row in new:
            s, r = row.start, row.recovery
            print(
                f"{row.tree}: first step after {s.seconds:.1f} s ({s.cpu_seconds:.1f} CPU s), next new step after "
                f"{r.seconds:.1f} s ({r.cpu_seconds:.1f} CPU s); {row.resumed or 'it began anew'}",
                flush=True,
            )
        rows += new
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(table([asdict(row) for row in rows]))
    return 0


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the medians over the runs of each checkout, as Markdown; the first checkout's parts are its lines."""
    trees = list(dict.fromkeys(row["tree"] for row in rows))
    lines = ["| | " + " | ".join(trees) + " |", "|---" * (len(trees) + 1) + "|"]
    for what, title in (("start", "command to first step"), ("recovery", "killed rank to next new step")):
        spans = {tree: [row[what] for row in rows if row["tree"] == tree] for tree in trees}
        for field, unit in (("seconds", "s"), ("cpu_seconds", "CPU s")):
            medians = [statistics.median(span[field] for span in spans[tree]) for tree in trees]
            first = medians[0]
            cells = [f"**{first:.1f}**"] + [f"{m:.1f} ({m / first:.2f} times)" for m in medians[1:]]
            lines.append(f"| **{title}, {unit}** | " + " | ".join(cells) + " |")
        for part in dict.fromkeys(part for tree in trees for span in spans[tree] for part in span["parts"]):
            found = [[span["parts"][part] for span in spans[tree] if part in span["parts"]] for tree in trees]
            lines.append(
                f"| {part}, s | " + " | ".join(f"{statistics.median(f):.1f}" if f else "" for f in found) + " |"
            )
    if all(row.get("recovery_bytes") is not None for row in rows):
        read = [statistics.median(row["recovery_bytes"] for row in rows if row["tree"] == tree) for tree in trees]
        lines.append("| read from the bucket, MB | " + " | ".join(f"{n / 1e6:.1f}" for n in read) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
