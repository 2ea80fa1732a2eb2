"""The virtual environment of the data benchmarks' peers, this machine, and versions of packages.

LitData and MosaicML Streaming pin other versions than this package (botocore, numpy): they get an environment of their
own, made by pip on first use. It sees the packages of this one, so that torch is not fetched twice, where torchvision,
which both need, works beside this torch; beside a build of torch for CPUs the one on PyPI does not, and the
environment gets a torch of its own (some 6 GB, three minutes).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEFAULT_VENVS = Path("~/.cache/eiwtrain-benchmarks")
REQUIREMENTS = ("litdata==0.2.76", "mosaicml-streaming==0.13.0")
_LOOK = 0.2  # seconds between two looks at the processes of a command
_TICKS = os.sysconf("SC_CLK_TCK")
_SAME_AS_HERE = ("pillow", "imagecodecs", "fsspec")
_WORKS = """
import numpy, torch, torchvision.io, imagecodecs
png = torch.from_numpy(numpy.frombuffer(imagecodecs.png_encode(numpy.zeros((2, 2, 3), "u1")), "u1").copy())
assert torchvision.io.decode_image(png).shape == (3, 2, 2)
"""


class NotInstalledError(RuntimeError):
    """The environment of the peers cannot be made; the message says why in one line."""


class FailedError(RuntimeError):
    """A command failed; the message is the end of its standard error. `line` is the line of it that says why."""

    @property
    def line(self) -> str:
        """The last line that starts with the name of an exception, or the last."""
        lines = str(self).strip().splitlines()
        return ([line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)] or lines)[-1]


def peers_python(
    venvs: Path,
    name: str = "peers",
    requirements: Sequence[str] | None = None,
    *,
    works: str = "",
    install: bool = True,
) -> str:
    """Return the interpreter of the peers' environment under the folder `venvs`, made if it is not there.

    Args:
        name: of the environment, where peers do not share one.
        requirements: for pip, by default REQUIREMENTS.
        works: a program that fails where the environment cannot use the torch of this one, by default _WORKS.
        install: whether it may be made.

    Raises:
        NotInstalledError: pip could not do it, or it may not be made.
    """
    requirements = REQUIREMENTS if requirements is None else requirements
    same = [f"{package}=={importlib.metadata.version(package)}" for package in _SAME_AS_HERE]
    wanted = [*requirements, *same]
    folder = venvs.expanduser() / f"{name}-{sys.version_info.major}.{sys.version_info.minor}"
    made, python = folder / "made.json", str(folder / "bin" / "python")
    if made.exists() and json.loads(made.read_text()) == wanted:
        return python
    if not install:
        raise NotInstalledError("not installed; --install makes its environment with pip")
    for shared in (True, False):
        print(f"making {folder} for {', '.join(requirements)}", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)])
        torch: list[str] = []
        if shared:
            paths = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
            site = _run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
            Path(site, "parent.pth").write_text("\n".join(paths) + "\n")
            torch = [f"torch=={importlib.metadata.version('torch').partition('+')[0]}"]
        _run([python, "-m", "pip", "install", "--quiet", "torchvision", *same, *torch])
        _run([python, "-m", "pip", "install", "--quiet", *wanted, *torch])
        if not shared or subprocess.run([python, "-c", works or _WORKS], capture_output=True).returncode == 0:
            break
    made.write_text(json.dumps(wanted))
    return python


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NotInstalledError((done.stderr.strip() or "no output").splitlines()[-1])
    return done.stdout


def run(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """What a command prints, run in the root of the repository with one thread of OpenMP a process.

    Raises:
        FailedError: it failed.
    """
    return timed(command, environment)[0]


def timed(command: Sequence[str], environment: dict[str, str] | None = None) -> tuple[str, float, float]:
    """Do as `run`; also return seconds by the clock and of CPU time, of it and of all processes below it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began, spent = time.perf_counter(), dict[int, float]()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err, text=True)
        while True:
            spent |= cpu_of_tree(process.pid)
            try:
                process.wait(_LOOK)
                break
            except subprocess.TimeoutExpired:
                continue
        seconds = time.perf_counter() - began
        for file in (out, err):
            file.seek(0)
        if process.returncode:
            end = err.read()[-2000:]
            raise FailedError(f"{' '.join(command)}: exit code {process.returncode}\n{end}")
        return out.read(), seconds, sum(spent.values())


def cpu_of_tree(root: int) -> dict[int, float]:
    """Seconds of CPU time so far of a process and of all that it has started, and they, by process id."""
    parents, spent = {}, {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents[int(entry.name)] = int(fields[1])
            spent[int(entry.name)] = (int(fields[11]) + int(fields[12])) / _TICKS
    tree = {root}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return {pid: spent[pid] for pid in tree if pid in spent}


def child(python: str, module: str, task: dict[str, Any], environment: dict[str, str] | None = None) -> Any:
    """Return what `python -m module TASK` prints last, as JSON; the task is given as JSON. Raises as `run`."""
    return json.loads(run([python, "-m", module, json.dumps(task)], environment).splitlines()[-1])


def versions(*packages: str) -> dict[str, str]:
    """Return versions of packages that this interpreter finds; others are left out."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return the machine on which the figures were measured."""
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    return {
        "processor": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": (commit or "unknown") + (" with changes" if changed else ""),
    }


def describe(where: dict[str, Any], packages: dict[str, str]) -> str:
    """Return the lines about machine and versions that stand under a table."""
    return (
        f"{where['cores']} cores, {where['processor']}, Python {where['python']}, commit {where['commit']}\n"
        + ", ".join(f"{name} {version}" for name, version in sorted(packages.items()))
    )
