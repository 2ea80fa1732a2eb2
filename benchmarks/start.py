"""How long a run takes from its command to its first step, and from a killed rank to its next new step, by parts.

    python -m benchmarks.start --json start.json                 (about 3 minutes on two cores)
    python -m benchmarks.start --tree /path/to/older --runs 1    (the code of another checkout beside this one's)
    RAY_preload_python_modules= python -m benchmarks.start       (no process is ready, as on a cluster that is joined)

A run is `python -m eiwtrain.run` of the quick start in an empty folder: it writes its data set, creates MLflow's
database, starts Ray and two workers. A checkpoint is written every CHECKPOINT_EVERY steps. Once it has trained for
--trains seconds, a worker is killed by SIGKILL half-way between two checkpoints, and the run resumes from the first. It
has recovered when it makes a step that it had not made.

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parents[1]
CHECKPOINT_EVERY = 8
_POLL_SECONDS = 0.1
_PATIENCE = 400.0  # seconds for a run to get as far as it should
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
    start: Span
    recovery: Span


def measure(tree: Path, trains: float, overrides: Sequence[str] = ()) -> Row:
    """Run the quick start of the checkout `tree`, kill a rank when it has trained for a while, and return how long the
    start and the recovery took.

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
        processes.look()
        os.kill(processes.ranks()[-1], signal.SIGKILL)
        killed, before = time.time(), processes.look()
        furthest = max(_steps(folder, 0.0).values())  # of any rank: the others may have made one more
        new, cpu = _wait(run, processes, folder, killed, lambda step: step > furthest)
        return Row(str(tree), start, Span(new - killed, cpu - before, _parts(folder, killed, new)))
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
    parser.add_argument("--json", type=Path, help="file for all rows")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="of the quick start's config")
    args = parser.parse_args(argv)
    trees = [HERE, *(tree.resolve() for tree in args.tree)]
    rows: list[Row] = []
    for _ in range(args.runs):
        for tree in trees:
            rows.append(measure(tree, args.trains, args.overrides))
            s, r = rows[-1].start, rows[-1].recovery
            print(
                f"{tree}: first step after {s.seconds:.1f} s ({s.cpu_seconds:.1f} CPU s), next new step after "
                f"{r.seconds:.1f} s ({r.cpu_seconds:.1f} CPU s)",
                flush=True,
            )
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
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
