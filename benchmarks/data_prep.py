"""Measure the images a second of `python -m data_prep`, beside webdataset, LitData and MosaicML Streaming.

    python -m benchmarks.data_prep [--quick] [--source PATH] [--images N] [--resolution 64] [--processes P]
                                   [--encoding png npy] [--codec own ours] [--rounds 1]
                                   [--peers webdataset LitData MosaicML] [--json FILE]

All read the same files, take the central square, resize it with Pillow's box filter, and write to the same disk with
the same number of processes. Each writes a data set of few images and one of many, each with a command of its own:

- "images/s": from the difference of the two times; "-" if many took no longer than few, because they were too few or
  other programs used the machine.
- "CPU us": from the difference of the CPU times of all processes, an image; it varies less on a shared machine.
- "start s": the rest of the command's time (imports, processes, closing).
- "total s": the time for many.

Of several rounds the best times count, because other programs only add to them.

Every data set is read back once by its peer's own reader. Its names, classes and pixels must be those that Pillow finds
in ours, or there is no figure.

A peer has rows with its own codec, as its users write, and with ours, which separates the codec's part from the rest
(see `data_peers`). Ours also checks its input for truncation, hashes pixels and shards, writes sidecars and a manifest,
and flushes to disk; no peer does so by default.

`--source` is a folder or an uncompressed tar of images, which is first copied into the folder of this run; the default
is crops of photographs that other packages ship, 256-pixel JPEGs. `--folder` holds all files of a run. The peers are
installed on first use (`environments`).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import environments, images
from benchmarks.data_options import add_options, report
from benchmarks.data_peers import CODECS, PACKAGES, digest, key_of

OURS = "eiwtrain"
SIDE = 256  # pixels, of the made JPEGs
Row = dict[str, Any]
Times = tuple[float, float]
"""A command's seconds by the clock and of CPU time."""
Found = dict[str, list[Any]]
"""The class and the digest of the pixels of each image, by name."""


def main(argv: list[str] | None = None) -> None:
    """Print the table; write the rows with `--json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_prep", description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--images", type=int, help="default 14000, quick 2000")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shard-size", type=int, help="images, where they are counted: default 500, quick 100")
    parser.add_argument("--rounds", type=int, default=1, help="of which the best counts (default: %(default)s)")
    args = parser.parse_args(argv)
    args.images = args.images or (2000 if args.quick else 14000)
    args.shard_size = args.shard_size or (100 if args.quick else 500)
    report(args, run, table)


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure all writers; return {"rows", "about", "machine", "versions"}."""
    sources = _sources(args, folder)
    pythons, notes = pythons_of(args.peers, args.venvs)
    plan = [(OURS, encoding, "own") for encoding in args.encoding]
    stored = [(encoding, codec) for encoding, codec in CODECS if encoding in args.encoding and codec in args.codec]
    plan += [(peer, encoding, codec) for encoding, codec in stored for peer in args.peers]
    seconds: dict[tuple[str, str, str], list[tuple[Times, Times]]] = {key: [] for key in plan}
    rows: list[Row] = []
    expected: dict[str, Found] = {}
    if not args.quick:  # once before it counts, so that all code is in the page cache
        for key in {key[0]: key for key in plan if key[0] not in notes}.values():
            with suppress(environments.FailedError):
                _timed(_command(args, key, sources[0], folder / "warm", pythons), folder / "warm")
    for turn in range(args.rounds):
        for key in plan:
            writer, encoding, codec = key
            if writer in notes:
                continue
            output = folder / "-".join(key)
            try:
                times = [_timed(_command(args, key, source, output, pythons), output) for source in sources]
                seconds[key].append((times[0], times[1]))
                if turn == 0:
                    found = read_ours(output, encoding) if writer == OURS else _read_peer(pythons[writer], key, output)
            except environments.FailedError as e:
                if writer == OURS:
                    raise
                notes[writer] = f"failed: {e.line}"
                rows = [row for row in rows if row["writer"] != writer]
                continue
            if turn == 0:
                if writer == OURS:
                    expected[encoding] = found
                rows.append(_row(key, output, compare(expected[encoding], found)))
            shutil.rmtree(output)
    few, many = (len(images.entries(source)) for source in sources)
    for row in rows:
        measured = seconds[row["writer"], row["encoding"], row["codec"]]
        row |= rates(measured, few, many)
    ours = {row["encoding"]: row for row in rows if row["writer"] == OURS}
    for row in rows:
        our_rate = ours[row["encoding"]]["images_per_second"]
        known = row["same"] and our_rate is not None and row["images_per_second"] is not None
        row["ours_to_this"] = our_rate / row["images_per_second"] if known else None
    for writer, encoding, codec in plan:
        if writer in notes:
            rows.append({"writer": writer, "encoding": encoding, "codec": codec, "note": notes[writer]})
    packages = environments.versions("eiwtrain", "webdataset", "pillow", "imagecodecs", "ray", "torch", "numpy")
    packages |= versions_of_peers(pythons)
    about = {
        "images": [few, many],
        "source": str(args.source or f"made, {SIDE} pixels"),
        "resolution": args.resolution,
        "processes": args.processes,
        "rounds": args.rounds,
    }
    return {"rows": rows, "about": about, "machine": environments.machine(), "versions": packages}


def pythons_of(peers: list[str], venvs: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the interpreter of each peer, and for peers without one the reason."""
    pythons, notes = {"webdataset": sys.executable}, {}
    if apart := [peer for peer in peers if peer != "webdataset"]:
        try:
            pythons |= dict.fromkeys(apart, environments.peers_python(venvs))
        except environments.NotInstalledError as e:
            notes = dict.fromkeys(apart, f"not installed: {e}")
    return pythons, notes


def versions_of_peers(pythons: dict[str, str]) -> dict[str, str]:
    """Return the versions of the peers, and of their torch and numpy where they have their own."""
    found = {}
    for peer, python in pythons.items():
        if python != sys.executable:
            theirs = environments.child(python, "benchmarks.data_peers", {"do": "versions"})
            found[PACKAGES[peer]] = theirs.pop(PACKAGES[peer])
            found |= {f"{name} (of the peers)": theirs[name] for name in ("torch", "numpy")}
    return found


def read_ours(folder: Path, encoding: str) -> Found:
    """Read a data set of ours with tarfile and Pillow or NumPy, without code of this package."""
    found: Found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        for name, data in members.items():
            key, _, kind = name.partition(".")
            if kind == encoding:
                about = json.loads(members[f"{key}.json"])
                pixels = (
                    np.asarray(Image.open(io.BytesIO(data), formats=["PNG"]))
                    if kind == "png"
                    else np.load(io.BytesIO(data))
                )
                found[key_of(about["source"])] = [about["label"], digest(pixels)]
    return found


def compare(expected: Found, found: Found) -> str:
    """Return the differences of `found` in a few words; empty for the same images."""
    lost, more = expected.keys() - found.keys(), found.keys() - expected.keys()
    other = [name for name in expected.keys() & found.keys() if expected[name] != found[name]]
    said = ((lost, "lost"), (more, "too many"), (other, "with another class or other pixels"))
    return ", ".join(f"{len(names)} {what} (one: {min(names)})" for names, what in said if names)


def rates(measured: list[tuple[Times, Times]], few: int, many: int) -> Row:
    """Return the steady rate and the start time from the times for few and for many images, a pair a round."""
    short, long = (min(both[i][0] for both in measured) for i in (0, 1))
    rate = (many - few) / (long - short) if long > short else None
    cpu = min(both[1][1] for both in measured) - min(both[0][1] for both in measured)
    return {
        "images_per_second": rate,
        "cpu_us": 1e6 * cpu / (many - few),
        "start_seconds": None if rate is None else short - few / rate,
        "total_seconds": long,
    }


def _sources(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Return folders of few and of many images: whole shards for each process, so that none waits for another."""
    _say("making the images" if args.source is None else f"copying {args.source}")
    everything, few, many = (folder / name for name in ("everything", "few", "many"))
    whole = args.processes * args.shard_size
    if args.source is None:
        images.make(everything, args.images, SIDE, args.processes)
    else:
        images.take(args.source, everything, args.images)
    count = len(images.entries(everything)) // whole * whole
    if count < 2 * whole:
        sys.exit(f"{args.processes} processes and shards of {args.shard_size} need {2 * whole} images or more")
    images.limit(everything, few, whole)
    images.limit(everything, many, count)
    return few, many


def _command(
    args: argparse.Namespace, key: tuple[str, str, str], source: Path, output: Path, pythons: dict[str, str]
) -> list[str]:
    writer, encoding, codec = key
    if writer != OURS:
        task: dict[str, Any] = {"do": "write", "peer": writer, "source": str(source), "output": str(output)}
        task |= {"resolution": args.resolution, "processes": args.processes, "shard_size": args.shard_size}
        task |= {"encoding": encoding, "codec": codec}
        return [pythons[writer], "-m", "benchmarks.data_peers", json.dumps(task)]
    numbers = {"--resolution": args.resolution, "--workers": args.processes, "--shard-size": args.shard_size}
    command = [sys.executable, "-m", "data_prep", "folder", "--source", str(source), "--output", str(output)]
    command += ["--split", "all", "--encoding", encoding]
    return command + [str(word) for pair in numbers.items() for word in pair]


def _timed(command: list[str], output: Path) -> Times:
    shutil.rmtree(output, ignore_errors=True)
    return environments.timed(command)[1:]


def _read_peer(python: str, key: tuple[str, str, str], output: Path) -> Found:
    peer, encoding, codec = key
    task = {"do": "read", "peer": peer, "folder": str(output), "encoding": encoding, "codec": codec}
    return environments.child(python, "benchmarks.data_peers", task)


def _row(key: tuple[str, str, str], output: Path, wrong: str) -> Row:
    writer, encoding, codec = key
    size = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
    _say(f"{' '.join(key)}: {wrong or 'the same images'}")
    return {"writer": writer, "encoding": encoding, "codec": codec, "bytes": size, "same": not wrong, "note": wrong}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    about = report["about"]
    few, many = about["images"]
    lines = [
        f"{many:,} images ({few:,} for the start) of {about['source']} to {about['resolution']} pixels, "
        f"{about['processes']} processes, rounds: {about['rounds']}",
        "",
        "| stored | writer | codec | images/s | ours to this | CPU us | start s | total s | MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(report["rows"], key=lambda r: (r["encoding"] != "png", r["codec"] == "ours")):
        cells = [row["encoding"], row["writer"], row["codec"]]
        if row["note"]:
            lines.append(f"| {' | '.join(cells)} | {row['note']} |")
            continue
        cells += [_cell(row["images_per_second"], ",.0f"), _cell(row["ours_to_this"], ".2f"), f"{row['cpu_us']:.0f}"]
        cells += [_cell(row["start_seconds"], ".1f"), f"{row['total_seconds']:.1f}", f"{row['bytes'] / 1e6:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", environments.describe(report["machine"], report["versions"])])


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    main()
