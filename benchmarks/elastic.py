"""Resume at other numbers of workers: the loss of real runs, and samples lost or repeated beside other data loaders.

    python -m benchmarks.elastic [--install] --json elastic.json --plot docs/elastic.png
    python -m benchmarks.elastic --parts counts --peers eiwtrain LitData

`--parts curves` trains one config at 1, 2, 3 and 4 workers, and once with workers that change on the way, on a Ray
cluster of four nodes on this machine (`benchmarks.elastic_curves`).

`--parts counts` goes through an epoch of 576 images in 24 steps with each loader of `benchmarks.elastic_rank`, kills
all its ranks with SIGKILL between two saves of its state, and resumes from the last one, in the loader's own documented
way, with as many or with other ranks, or processes a rank. Steps after that save are taken back. Of the steps that are
left, a sample that none has is lost; one that several have is repeated. "Other steps" are those that do not have the
samples of the same step of an epoch that was not interrupted.

Every peer has an environment of its own, which pip makes with `--install` and not otherwise; a peer without one is left
out with a word. Rows that are in the file of `--json` are not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the harness is a part of the test suite

from chaos_harness.verify import lineage, read_audit

from benchmarks import elastic_report
from benchmarks.environments import DEFAULT_VENVS, ROOT, FailedError, NotInstalledError, machine, peers_python, run

PEERS: dict[str, tuple[str, ...]] = {  # LitData resumes at other numbers of workers from 0.2.69 on: its pull 878
    "eiwtrain": (),
    "LitData": ("litdata==0.2.76",),
    "MosaicML": ("mosaicml-streaming==0.13.0",),
    "torchdata": ("torchdata==0.11.0", "webdataset==1.0.2"),
}
"""What pip installs for each."""
_MODULES = {"LitData": "litdata", "MosaicML": "streaming", "torchdata": "torchdata.stateful_dataloader"}
SCENARIOS = {
    "not interrupted": ((2, 2),),
    "killed, resumed": ((2, 2), (2, 2)),
    "2 → 1 workers": ((2, 2), (1, 2)),
    "1 → 2 workers": ((1, 2), (2, 2)),
    "2 → 1 → 2 workers": ((2, 2), (1, 2), (2, 2)),
    "2 → 1 processes a worker": ((2, 2), (2, 1)),
}
"""Pairs of (ranks, loader processes of each) of every attempt; all but the last are killed."""

IMAGES, BATCH, HELD_OUT = 576, 24, 48
EVERY = (7, 10)
"""Steps between two saves of the state."""
_BEYOND = 3  # steps from a save to the kill
_SECONDS = 240.0  # after which an attempt counts as hung
Row = dict[str, Any]


def count(made: Mapping[int, Counter[int]], whole: Mapping[int, Counter[int]], images: int) -> dict[str, int]:
    """Return the samples of an epoch that were lost and that were repeated, and the steps that have others.

    Args:
        made: how often each sample was in each step that was not taken back.
        whole: the same of an epoch that was not interrupted.
    """
    seen = sum(made.values(), Counter[int]())
    return {
        "lost": sum(seen[number] == 0 for number in range(images)),
        "repeated": seen.total() - len(seen),
        "other_steps": sum(made.get(step) != whole.get(step) for step in made.keys() | whole.keys()),
    }


def why(log: str) -> str:
    """Return the last exception of a rank's output in a line, with the code that raised it where it says nothing."""
    text = re.sub(r"^\[rank\d+\]: ?", "", log, flags=re.MULTILINE)  # so torch marks lines of a rank
    line = FailedError(text).line
    code = [part.strip() for part in text.partition(f"\n{line}")[0].splitlines() if part.strip(" ^~")]
    return line if ":" in line or not code else f"{line}: {code[-1]}"


def attempt(python: str, task: Mapping[str, Any], ranks: int) -> str:
    """Run the ranks until they end; return why they failed, empty if they ended as they should."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    command = [python, "-m", "benchmarks.elastic_rank", json.dumps(task)]
    wanted = 0 if task["die_after"] is None else -signal.SIGKILL
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(ranks)]
        processes = [
            subprocess.Popen(
                command, cwd=ROOT, env=environment | {"RANK": str(i), "LOCAL_RANK": str(i)},
                stdout=logs[i], stderr=logs[i], start_new_session=True,
            )
            for i in range(ranks)
        ]  # fmt: skip
        try:
            end = time.monotonic() + _SECONDS
            while time.monotonic() < end and {p.poll() for p in processes} <= {None, wanted}:
                if all(p.poll() is not None for p in processes):
                    break
                time.sleep(0.1)
            failed = [i for i, p in enumerate(processes) if p.poll() not in (None, wanted)]
            hung = not failed and any(p.poll() is None for p in processes)
        finally:
            for process in processes:  # with the processes of its loader
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if failed:
            logs[failed[0]].seek(0)
            return why(logs[failed[0]].read()[-4000:])
    return f"hung for {_SECONDS:g} s" if hung else ""


def trial(python: str, peer: str, url: str, scenario: str, every: int, folder: Path) -> tuple[dict[int, Any], str]:
    """Return the samples of each step that led to the end of the epoch, and why it failed, empty if it did not."""
    folder.mkdir()
    attempts = SCENARIOS[scenario]
    task = {"peer": peer, "url": url, "images": IMAGES, "batch": BATCH, "every": every, "folder": str(folder)}
    for number, (ranks, processes) in enumerate(attempts, 1):
        die_after = number * every + _BEYOND if number < len(attempts) else None
        failure = attempt(python, task | {"processes": processes, "die_after": die_after}, ranks)
        if failure:
            return {}, f"refused: {failure}" if number > 1 else failure
    return lineage(read_audit(folder)), ""


def counts(peers: Iterable[str], venvs: Path, install: bool, folder: Path, known: Iterable[Row]) -> Iterator[Row]:
    """Yield a row for each peer, interval and scenario, but for those in `known`."""
    images = folder / "images"
    write_images(images)
    for peer in peers:
        here = folder / peer
        try:
            python = sys.executable
            if PEERS[peer]:
                works = f"import {_MODULES[peer]}"
                python = peers_python(venvs, peer.lower(), PEERS[peer], works=works, install=install)
        except NotInstalledError as e:
            print(f"{peer} is left out: {e}", file=sys.stderr, flush=True)
            continue
        here.mkdir()
        if peer == "eiwtrain":
            prepare(images, here / "data")
        else:
            task = {"peer": peer, "source": str(images), "output": str(here / "data"), "images": IMAGES}
            run([python, "-m", "benchmarks.elastic_rank", json.dumps(task)])
        for every in EVERY:
            rows: list[Row] = [{"peer": peer, "every": every, "scenario": scenario} for scenario in SCENARIOS]
            if all(any(row.items() <= old.items() for old in known) for row in rows):
                continue
            whole: dict[int, Any] = {}
            for number, row in enumerate(rows):
                made, note = trial(python, peer, str(here / "data"), row["scenario"], every, here / f"{every}-{number}")
                whole = whole or made
                yield row | {"note": note} | ({} if note else count(made, whole, IMAGES))


def write_images(folder: Path) -> None:
    """Write blurred noise of 8x8 pixels, one image a folder, so that the class of an image is its number."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for i in range(IMAGES + HELD_OUT):
        coarse = Image.fromarray(generator.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        path = folder / f"{i:04d}" / "image.png"
        path.parent.mkdir(parents=True)
        coarse.resize((8, 8), Image.Resampling.BILINEAR).save(path)


def prepare(images: Path, output: Path) -> None:
    """Write the images as a data set of this package, the last of them held out."""
    import data_prep
    from benchmarks.elastic_rank import SHARD

    split = {"split": f"last:{HELD_OUT}"}
    data_prep.prepare("folder", str(output), 8, path=str(images), of_source=split, shard_size=SHARD, name="data")


def main(argv: list[str] | None = None) -> None:
    """Print the tables; write the rows with `--json` and the picture with `--plot`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elastic", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("curves", "counts"), default=["curves", "counts"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--venvs", type=Path, default=DEFAULT_VENVS, help="where the environments of peers are")
    parser.add_argument("--install", action="store_true", help="make environments that are not there, with pip")
    parser.add_argument("--json", type=Path, help="file of the rows; those in it are not measured again")
    parser.add_argument("--plot", type=Path, help="PNG of the curves to draw")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"curves": [], "counts": [], "versions": PEERS, "machine": machine()}
    if args.json and args.json.exists():
        result |= json.loads(args.json.read_text())

    def save() -> None:
        if args.json:
            args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")

    with tempfile.TemporaryDirectory(prefix="elastic-") as folder:
        if "curves" in args.parts and not result["curves"]:
            from benchmarks import elastic_curves

            write_images(Path(folder, "images"))
            prepare(Path(folder, "images"), Path(folder, "data"))
            result["curves"] = elastic_curves.measure(Path(folder))
            save()
        if "counts" in args.parts:
            where = Path(folder, "counts")
            where.mkdir()
            for row in counts(args.peers, args.venvs, args.install, where, list(result["counts"])):
                same = ("peer", "every", "scenario")
                result["counts"] = [old for old in result["counts"] if any(old[k] != row[k] for k in same)] + [row]
                print(json.dumps(row, ensure_ascii=False), file=sys.stderr, flush=True)
                save()
    save()
    if args.plot:
        elastic_report.plot(result["curves"], args.plot)
    print(elastic_report.table(result))


if __name__ == "__main__":
    main()
