"""Measure the images a second of this package's stream, beside webdataset, LitData and MosaicML Streaming.

    python -m benchmarks.loader [--quick] [--place local|s3] [--source PATH] [--images N] [--resolution 32]
                                [--batch 256] [--encoding png npy] [--codec own ours] [--workers 1 2] [--seconds 3]
                                [--peers webdataset LitData MosaicML] [--json FILE]

All give shuffled batches of uint8 images and their classes, from the same images and inside a DataLoader:

- `eiwtrain stream`: `train_batches`, with flips and in the exact order.
- `eiwtrain with noise`: also the noise, which the process that takes the batches makes on its device, here the CPU.
- `eiwtrain reader`: `ShardReader` alone, the pixels in that order.
- a peer: with its own codec, as its users read, and with PNGs of our encoder decoded by imagecodecs (`data_peers`).

A single worker is pinned to a core of its own. With other numbers of workers than the first of `--workers`, only the
stream and the peers' own codecs are measured. All run under the allocator setting of this package's workers.

- "images/s a core": by the CPU time of all processes below the one that takes the batches, that is, the rate of a core
  that does nothing else. "wall" is by the clock.
- "first s": from the start to the first batch: opening the data set, starting the worker, fetching.
- "cold": the rest of the first epoch. On a disk the shards are in the page cache, which a program may not empty; from
  S3 (`--place s3`: SeaweedFS on this machine, whose work is in "wall" and not in "a core") the cache folder is empty.
- "warm": whole epochs after it, for at least `--seconds`, without the time between two epochs.
- "taker us": CPU time, an image, of the process that takes the batches: the training step loses that time.

After the figures an epoch of every loader is counted. The last column names images that are lost or repeated, or that
have other pixels or another class.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import environments, images
from benchmarks.data_options import add_options, report
from benchmarks.data_peers import CODECS, epochs

OURS = ("eiwtrain stream", "eiwtrain with noise", "eiwtrain reader")
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    """Print the table; write the rows with `--json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--place", choices=("local", "s3"), default="local")
    parser.add_argument("--images", type=int, help="default 16384, quick 2048; rounded down to whole batches")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", nargs="+", type=int, help="default 1 and 2, quick and s3 1")
    parser.add_argument("--seconds", type=float, help="of warm epochs: default 3, quick 0.5")
    parser.add_argument("child", nargs="?", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print("\n" + json.dumps(measure(**json.loads(args.child))))
        sys.stdout.flush()
        os._exit(0)  # the exit is not measured, and that of some peers takes long
    args.images = args.images or (2048 if args.quick else 16384)
    args.workers = args.workers or ([1] if args.quick or args.place == "s3" else [1, 2])
    args.seconds = args.seconds or (0.5 if args.quick else 3.0)
    report(args, run, table)


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure all loaders; return {"rows", "about", "machine", "versions"}."""
    from benchmarks.data_prep import pythons_of, versions_of_peers
    from eiwtrain.on_ray.session import WORKER_ENV

    pythons, notes = pythons_of(args.peers, args.venvs)
    pythons |= dict.fromkeys(OURS, sys.executable)
    sets = _write(args, folder, pythons, notes)
    rows: list[Row] = []
    with _Place(args.place, folder, sets) as place:
        for encoding, codec in _codecs(args):
            for loader in (*(OURS if codec == "own" else ()), *args.peers):
                several = codec == "own" and loader not in OURS[1:]
                for workers in args.workers if several else args.workers[:1]:
                    known = {"loader": loader, "encoding": encoding, "codec": codec, "workers": workers}
                    if loader in notes:
                        rows.append(known | {"note": notes[loader]})
                        continue
                    task = known | {"url": place.url(loader, encoding, codec), "batch": args.batch}
                    task |= {"expected": str(folder / "expected.json"), "cache": str(folder / "cache")}
                    task |= {"seconds": args.seconds}
                    (folder / "cache").mkdir()
                    environment = WORKER_ENV | place.environment
                    try:
                        measured = environments.child(pythons[loader], "benchmarks.loader", task, environment)
                    except environments.FailedError as e:
                        if loader in OURS:
                            raise
                        measured = {"note": f"failed: {e.line}"}
                    shutil.rmtree(folder / "cache")
                    rows.append(known | measured)
                    _say(f"{loader}, {encoding} {codec}, workers: {workers}: {_short(rows[-1])}")
    for row in rows:
        same = [r for r in rows if all(r[k] == row[k] for k in ("encoding", "workers")) and r["loader"] == OURS[0]]
        if same and "warm_per_core" in row:
            row["stream_to_this"] = same[0]["warm_per_core"] / row["warm_per_core"]
    packages = environments.versions("eiwtrain", "webdataset", "pillow", "imagecodecs", "torch", "numpy", "s3fs")
    about = {name: getattr(args, name) for name in ("place", "images", "resolution", "batch", "seconds")}
    about["source"] = str(args.source or "made")
    return {
        "rows": rows,
        "about": about,
        "machine": environments.machine(),
        "versions": packages | versions_of_peers(pythons),
    }


def _codecs(args: argparse.Namespace) -> list[tuple[str, str]]:
    return [(encoding, codec) for encoding, codec in CODECS if encoding in args.encoding and codec in args.codec]


def _short(row: Row) -> str:
    return row["note"] or f"{row['warm_per_core']:,.0f} images/s a core"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write(
    args: argparse.Namespace, folder: Path, pythons: dict[str, str], notes: dict[str, str]
) -> dict[tuple[str, str, str], Path]:
    """The data sets of all, by (loader, encoding, codec), and the file of what is to be expected of an epoch."""
    _say("making the images and the data sets")
    everything, source = folder / "everything", folder / "images"
    processes = os.cpu_count() or 1
    if args.source is None:
        images.make(everything, args.images, args.resolution, processes)
    else:
        images.take(args.source, everything, args.images)
    args.images = len(images.entries(everything)) // args.batch * args.batch
    if args.images == 0:
        sys.exit(f"fewer images than a batch of {args.batch}")
    images.limit(everything, source, args.images)
    shard_size = max(1, min(1000, args.images // 8))
    sets: dict[tuple[str, str, str], Path] = {}
    for encoding, codec in _codecs(args):
        if codec == "own":
            output = folder / f"{encoding}-eiwtrain"
            options = {"output": output, "resolution": args.resolution, "shard-size": shard_size, "encoding": encoding}
            words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
            command = ["-m", "data_prep", "folder", "--source", str(source), "--split", "all", "--workers", "1"]
            environments.run([sys.executable, *command, *words])
            sets |= {(loader, encoding, codec): output for loader in OURS}
        for peer in args.peers:
            if peer not in notes:
                output = folder / f"{encoding}-{codec}-{peer}"
                task = {"do": "write", "peer": peer, "source": str(source), "output": str(output)}
                task |= {"resolution": args.resolution, "processes": processes, "shard_size": shard_size}
                task |= {"encoding": encoding, "codec": codec}
                environments.child(pythons[peer], "benchmarks.data_peers", task)
                sets[peer, encoding, codec] = output
    (folder / "expected.json").write_text(json.dumps(expected_marks(source, args.resolution)))
    return sets


def expected_marks(source: Path, resolution: int) -> list[int]:
    """Return `mark` of every image, read with Pillow."""
    import numpy as np

    from benchmarks.data_peers import square

    found = []
    for name, label in images.entries(source):
        found.append(mark(np.asarray(square(str(source / name), resolution)).transpose(2, 0, 1), label))
    return found


def mark(image: Any, label: int) -> int:
    """Return a number for an image, uint8 (3, H, W), and its class; its mirror image has the same number."""
    import numpy as np

    one, other = (zlib.crc32(np.ascontiguousarray(a).data) for a in (image, image[:, :, ::-1]))
    return (one + other) * 1_000_003 + label


class _Place:
    """The place of the data sets. A context manager: the S3 server runs inside."""

    def __init__(self, kind: str, folder: Path, sets: dict[tuple[str, str, str], Path]) -> None:
        self.sets, self.environment = sets, dict[str, str]()
        self.server: Any = None
        if kind == "s3":
            from cluster.s3 import S3Server

            self.server = S3Server(folder / "server", "benchmark")

    def __enter__(self) -> _Place:
        if self.server is not None:
            self.server.__enter__()
            self.environment = self.server.env
            os.environ.update(self.environment)
            import fsspec

            fs = fsspec.filesystem("s3")
            for path in sorted(set(self.sets.values())):
                fs.put(f"{path}/", f"benchmark/{path.name}/", recursive=True)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.server is not None:
            self.server.__exit__(*exc)

    def url(self, loader: str, encoding: str, codec: str) -> str:
        """Return the URL of a data set."""
        path = self.sets[loader, encoding, codec]
        return str(path) if self.server is None else f"s3://benchmark/{path.name}"


def measure(
    loader: str,
    encoding: str,
    codec: str,
    workers: int,
    url: str,
    cache: str,
    batch: int,
    expected: str,
    seconds: float,
) -> Row:
    """Return the figures of a row. Runs in a process of its own."""
    cores = sorted(os.sched_getaffinity(0))
    own = [core for core in cores if core != cores[0]] or cores
    if workers == 1:
        os.sched_setaffinity(0, own[:1])  # the worker inherits it
    began = time.perf_counter()
    if loader in OURS:
        start = _our_epochs(loader, url, cache, batch, workers)
    else:
        start = epochs(loader, url, cache, encoding, codec, batch, workers)

    def first_batch() -> None:
        os.sched_setaffinity(0, cores[:1] if workers == 1 else cores)

    cold = _epoch(start, first_batch)
    warm: list[dict[str, float]] = []
    while not warm or sum(e["wall"] for e in warm) < seconds:
        warm.append(_epoch(start))
    total = {name: sum(e[name] for e in warm) for name in ("images", "wall", "below", "taker")}
    return {
        "first_seconds": cold["first"] - began,
        "cold_wall": cold["images"] / cold["wall"],
        "warm_wall": total["images"] / total["wall"],
        "warm_per_core": total["images"] / total["below"],
        "taker_us": 1e6 * total["taker"] / total["images"],
        "note": wrong_with(start, json.loads(Path(expected).read_text())),
    }


def _epoch(start: Callable[[], Iterable[Any]], first_batch: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Time an epoch from its first batch on: by the clock, the CPU of the processes below this one, and its own."""
    batches = iter(start())
    next(batches)
    first_batch()
    first, below, taker, count = time.perf_counter(), _cpu_below(), time.process_time(), 0
    for images_, _ in batches:
        count += len(images_)
    return {
        "first": first,
        "images": count,
        "wall": time.perf_counter() - first,
        "below": _cpu_below() - below,
        "taker": time.process_time() - taker,
    }


def _cpu_below() -> float:
    """Return the seconds of CPU time of all processes below this one."""
    tree = environments.cpu_of_tree(os.getpid())
    return sum(seconds for process, seconds in tree.items() if process != os.getpid())


def wrong_with(start: Callable[[], Iterable[Any]], expected: list[int]) -> str:
    """Return the errors of an epoch in a few words; empty for a right one."""
    found = Counter(
        mark(image, label)
        for pixels, labels in start()
        for image, label in zip(pixels.numpy(), labels.tolist(), strict=True)
    )
    wanted = Counter(expected)
    lost, more = (wanted - found).total(), found - wanted
    repeated = sum(n for which, n in more.items() if which in wanted)
    said = ((lost, "lost"), (repeated, "repeated"), (more.total() - repeated, "unknown"))
    return ", ".join(f"{n} of {len(expected)} {what}" for n, what in said if n)


def _our_epochs(loader: str, url: str, cache: str, batch: int, workers: int) -> Callable[[], Iterable[Any]]:
    from eiwtrain import data

    reader = data.ShardReader(url, data.load_manifest(url), "train", cache_dir=cache)
    steps = len(reader) // batch
    if loader != OURS[2]:
        stream = data.train_batches(
            reader, seed=0, start_step=0, global_batch=batch, micro_batch=batch, workers=workers, augment="flip"
        )

        def start() -> Iterable[Any]:
            for _ in range(steps):
                (found,) = next(stream)
                if loader == OURS[1]:
                    found.noise()
                    yield found.images.contiguous(), found.labels
                else:
                    yield found.images, found.labels

        return start

    from torch.utils.data import DataLoader

    dataset, numbers = _Batches(reader, batch), _Steps(steps)
    # As in `train_batches`: spawned, because remote file systems do not survive a fork, and not collated.
    pixels: Any = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        collate_fn=_same,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )
    return lambda: pixels


class _Batches:
    """A dataset for torch whose item i is step i of the stream without noise and augmentation."""

    def __init__(self, reader: Any, batch: int) -> None:
        from eiwtrain.data import SampleOrder

        self.reader, self.batch = reader, batch
        self.order = SampleOrder(reader.shard_sizes, reader.manifest.fingerprint, 0)

    def __getitem__(self, step: int) -> tuple[Any, Any]:
        import torch

        channels, height, width = self.reader.image_shape
        images = torch.empty((self.batch, height, width, channels), dtype=torch.uint8).share_memory_()
        _, indices = self.order.at(self.order.batch_positions(step, self.batch))
        labels = self.reader.read_into(images.numpy(), indices)
        return images.permute(0, 3, 1, 2), torch.from_numpy(labels)


class _Steps:
    """The numbers of an epoch's steps; each iteration gives those of the next epoch."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done = steps, 0

    def __iter__(self) -> Iterator[int]:
        first, self.done = self.done, self.done + self.steps
        return iter(range(first, self.done))

    def __len__(self) -> int:
        return self.steps


def _same(thing: Any) -> Any:
    return thing


def table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    about = report["about"]
    lines = [
        f"{about['images']:,} images of {about['source']} at {about['resolution']} pixels, "
        f"batches of {about['batch']}, {about['place']}",
        "",
        "| stored | loader | codec | workers | images/s a core, warm | stream to this | wall, warm | wall, cold "
        "| first s | taker us | counted |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [row["encoding"], row["loader"], row["codec"], str(row["workers"])]
        if "warm_wall" in row:
            cells += [f"{row['warm_per_core']:,.0f}", f"{row['stream_to_this']:.2f}", f"{row['warm_wall']:,.0f}"]
            cells += [f"{row['cold_wall']:,.0f}", f"{row['first_seconds']:.1f}", f"{row['taker_us']:.1f}"]
        else:
            cells += ["-"] * 6
        lines.append(f"| {' | '.join(cells)} | {row['note'] or 'each once'} |")
    return "\n".join([*lines, "", environments.describe(report["machine"], report["versions"])])


if __name__ == "__main__":
    main()
