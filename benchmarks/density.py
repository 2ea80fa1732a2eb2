"""Bits/dim at equal time: how dense a model a configuration gives on a budget, over seeds, beside other libraries.

    pip install --no-deps normflows==1.7.3            # a peer; nflows and FrEIA serve as well
    python -m data_prep folder --source cifar10.tar --output runs/data/cifar10 --resolution 32
    python -m benchmarks.density --data runs/data/cifar10 --json runs/density.jsonl [--seconds 50 200] [--jobs 2]
                                 [--seeds 3] [--iwbo 16] [--device cuda] [--plot runs/density.png]
    python -m benchmarks.density --data runs/data/cifar10 --json runs/density.jsonl order normflows \\
        mine='{"preset": "glow", "optimizer": "adamax", "lr": 1e-3}' \\
        --peer theirs=../a-checkout theirs2='{"peer": "theirs", "patch": 4}'

Each run is a process that trains for a budget of `--seconds`: CPU time of its one thread, so that others may share the
machine, or on a GPU the time by the clock. All variants see the same images in the same order, as many as they have
time for; the learning rate's warm-up and half a cosine span the budget; the averaged weights are scored on held-out
images, outside the clock. An estimator stands beside every figure: ELBO (one draw of all noise) and IWBO(k) (`--iwbo`)
where it is a bound, else "exact".

`--keep 8 3`: after the first budget only the 8 best variants continue, after the second 3 (successive halving, arXiv
1502.07943).

A variant is one of `VARIANTS`, or NAME=JSON: fields of `FlowConfig`, with a `preset`, and those of
`density_subject.Recipe` (optimizer and its options, lr, batch, clip, ema, augment, schedule ...). With `"peer"` it is
a Glow of that library at the size of the FlowConfig (`benchmarks.peers`), or the model of a folder, with the recipe.

`--peer NAME=FOLDER`: FOLDER/peer.py has `make(image_shape, **fields)`, which returns an `nn.Module` whose
`forward(x)` gives log p(x) in nats, (B,), of dequantized images x, reals in [-1/2, 1/2), (B, C, H, W). If the module
has `exact = True`, x is pixels, uint8, and the value their log-probability. The fields are those of the variant's JSON
that are not the recipe's. Without such a variant, NAME is one, with no fields.

A result is a line of the JSON file; the same command again makes the missing ones and prints the table: the mean over
seeds, its standard error, and the mean difference to the first variant over the seeds that both have.
Not for time to a step (`benchmarks.step`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks import density_report, density_subject, environments, peers
from benchmarks.density_variants import GROUPS, VARIANTS
from eiwtrain import data

Row = dict[str, Any]

_IDENTITY = ("variant", "seed", "seconds", "fields", "code", "data", "fingerprint", "images", "iwbo", "device")


def identity(row: Row) -> str:
    """Return what makes two runs the same one."""
    return json.dumps({name: row.get(name) for name in _IDENTITY}, sort_keys=True)


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a file, if there is one; a last line that was not written to its end is cut off.

    Raises:
        ValueError: another line is not a row.
    """
    if not file.exists():
        return []
    text = file.read_bytes()
    if not text.endswith(b"\n"):
        text = text[: text.rfind(b"\n") + 1]
        os.truncate(file, len(text))
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise ValueError(f"{file}, line {number}: not a row of this benchmark") from None
    return rows


def run_missing(jobs: list[Row], file: Path, url: str, folders: dict[str, Path], at_once: int) -> tuple[list[Row], int]:
    """Run in processes of their own what the file lacks; return the rows of these jobs, and how many runs failed."""
    rows = {identity(row): row for row in read_rows(file)}
    where = environments.machine() | {"packages": environments.versions("torch", *peers.PEERS)}

    def one(job: Row) -> int:
        folder = folders.get(job["fields"].get("peer", ""))
        task = {"job": job, "url": url, "folder": None if folder is None else str(folder)}
        name = f"{job['variant']}, {job['seconds']:g} s, seed {job['seed']}"
        try:
            row = environments.child(sys.executable, "benchmarks.density", task) | {"machine": where}
        except environments.FailedError as e:
            print(f"{name}: failed: {e.line}", file=sys.stderr, flush=True)
            return 1
        with file.open("a") as appended:
            appended.write(json.dumps(row) + "\n")
        rows[identity(row)] = row
        bits = row["bits_per_dim"]
        print(f"{name}: {'not finite' if bits is None else f'{bits:.4f}'}", file=sys.stderr, flush=True)
        return 0

    file.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(at_once) as pool:
        failed = sum(pool.map(one, [job for job in jobs if identity(job) not in rows]))
    return [rows[name] for name in map(identity, jobs) if name in rows], failed


def wanted(given: list[str], folders: dict[str, Path]) -> dict[str, Row]:
    """Return the fields of the variants by name. Raises ValueError."""
    found: dict[str, Row] = {}
    for text in [name for each in given for name in GROUPS.get(each, [each])]:
        name, is_new, described = text.partition("=")
        if not is_new and name not in VARIANTS:
            raise ValueError(f"{name} is not one of {', '.join([*GROUPS, *VARIANTS])}; a new one is NAME=JSON")
        try:
            found[name] = json.loads(described) if is_new else VARIANTS[name]
        except ValueError as e:
            raise ValueError(f"{name}: not JSON: {e}") from None
        if not isinstance(found[name], dict):
            raise ValueError(f"{name}: {described} is not a JSON object of fields")
    used = {fields.get("peer") for fields in found.values()}
    return found | {name: {"peer": name} for name in folders if name not in used}


def _default() -> list[str]:
    def can_run(fields: Row) -> bool:
        return "peer" not in fields or peers.installed(str(fields["peer"]))

    return [name for name in GROUPS["ablation"] if can_run(VARIANTS[name])]


def best(rows: list[Row], seconds: float, count: int) -> list[str]:
    """Return the names of the variants with the fewest bits/dim at a budget, at most `count`; their mean over seeds."""
    of: dict[str, list[float]] = {}
    for row in rows:
        if row["seconds"] == seconds:
            bits = row["bits_per_dim"]
            of.setdefault(row["variant"], []).append(float("inf") if bits is None else bits)
    return sorted(of, key=lambda name: sum(of[name]) / len(of[name]))[:count]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.density", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "variants",
        nargs="*",
        metavar="VARIANT",
        help=f"of {', '.join(VARIANTS)}; a group of them: {', '.join(GROUPS)}; or NAME=JSON; default: ablation",
    )
    parser.add_argument("--data", required=True, help="folder or URL of a data set that data_prep wrote")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="file of results, one a line")
    parser.add_argument("--seconds", type=float, nargs="+", default=[100.0], help="budgets; each has runs of its own")
    parser.add_argument(
        "--keep", type=int, nargs="+", default=[], help="how many of the best have the next budget, too"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--images", type=int, default=2000, help="held-out images")
    parser.add_argument("--iwbo", type=int, default=1, metavar="K", help="draws of noise for a second, tighter bound")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER", help="a checkout with a peer.py")
    parser.add_argument("--plot", metavar="FILE", help="picture to draw")
    args = parser.parse_args(arguments)
    for name in ("seeds", "jobs", "images", "iwbo"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: {getattr(args, name)} is less than 1")
    if not all(0 < seconds < float("inf") for seconds in args.seconds):
        parser.error("--seconds: a budget is a positive number")
    budgets = sorted(set(args.seconds))
    if len(args.keep) >= len(budgets) or any(number < 1 for number in args.keep):
        parser.error("--keep: a number above 0 for each of --seconds but the last")
    pairs = [given.partition("=") for given in args.peer]
    if bad := [name for name, _, folder in pairs if not (name and folder) or name in peers.PEERS]:
        parser.error(f"--peer {bad[0]}: give NAME=FOLDER, and a NAME other than {', '.join(peers.PEERS)}")
    folders = {name: Path(folder).resolve() for name, _, folder in pairs}
    url = args.data if "://" in args.data else str(Path(args.data).resolve())
    try:
        manifest = data.load_manifest(url)
        named = wanted(args.variants or ([] if folders else _default()), folders)
        shape = (manifest.channels, manifest.resolution, manifest.resolution)
        for name, fields in named.items():
            try:
                density_subject.check(fields, shape, folders)
            except (ValueError, TypeError) as e:
                raise ValueError(f"{name}: {e}") from None
        protocol = {"data": manifest.title, "fingerprint": manifest.fingerprint, "images": args.images}
        protocol |= {"iwbo": args.iwbo, "device": args.device}
        codes = {name: density_subject.digest(folder) for name, folder in folders.items()}
        rows: list[Row] = []
        failed, going = 0, list(named)
        for seconds, keep in zip_longest(budgets, args.keep):
            jobs = [
                {"variant": name, "seed": seed, "seconds": seconds, "fields": named[name]}
                | {"code": codes.get(named[name].get("peer", "")), **protocol}
                for seed in range(args.seeds)
                for name in going
            ]
            found, lost = run_missing(jobs, args.json, url, folders, args.jobs)
            rows, failed = rows + found, failed + lost
            going = best(found, seconds, keep or len(going))
    except (ValueError, data.DataError) as e:
        parser.error(str(e))
    if rows:
        unit = "CPU seconds of one thread" if args.device == "cpu" else "GPU seconds"
        print(f"{manifest.title}, {args.images} held-out images; {unit}; mean over seeds and its standard error\n")
        print(density_report.table(rows, list(named)))
    if rows and args.plot:
        density_report.plot(rows, list(named), f"{manifest.title}: density at equal time", args.plot)
    return 1 if failed else 0


def child(task: Row) -> None:
    """Print the row of one job, as a process of its own."""
    folder = task["folder"] and Path(task["folder"])
    print(json.dumps(density_subject.train(task["job"], task["url"], folder)))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith('{"job"'):
        child(json.loads(sys.argv[1]))
    else:
        sys.exit(main())
