"""From a source to a data set: plan all shards, write them (by several processes), and the manifest last."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from data_prep.items import Source
from data_prep.progress import Progress
from data_prep.shard import PNG_LEVEL, RESAMPLING, ShardDone, ShardTask, run_task
from eiwtrain import storage
from eiwtrain.data.manifest import (
    MANIFEST_NAME,
    DataError,
    Manifest,
    Sidecar,
    Split,
    canonical_json,
    fingerprint,
    load_manifest,
    load_sidecar,
    manifest_to_json,
    shard_name,
)

PREPROCESSING_VERSION = 1  # raise it when the same source would give other pixels
_SHUFFLE_SEED = 20240704  # order of items in the shards; any number, the same for ever
_IN_FLIGHT = 2  # tasks handed out per worker
_POLL = 0.5  # seconds between two looks at the workers' count of images
_OWN_FILES = re.compile(r"(manifest\.json|.+-\d{6}\.(tar|json))")

_ticks: Any = None  # the count of images that workers share with their parent


@dataclass(frozen=True)
class Plan:
    """What is to be written: fixed before any work, so that the bytes do not depend on who does it."""

    source: Source
    output: str
    resolution: int
    resample: str
    shard_size: int
    preprocessing: dict[str, Any]
    digest: str
    orders: dict[str, list[int]]  # per split, item numbers in the order in which they fill the shards

    @property
    def total(self) -> int:
        """Items over all splits."""
        return sum(len(order) for order in self.orders.values())

    def shards(self) -> dict[str, int]:
        """Number of shards of each split."""
        return {split: -(-len(order) // self.shard_size) for split, order in self.orders.items()}

    def tasks(self) -> Iterator[tuple[str, ShardTask]]:
        """(split, task) of every shard, made when it is asked for."""
        for split, order in self.orders.items():
            items = self.source.splits[split]
            for number, start in enumerate(range(0, len(order), self.shard_size)):
                chosen = tuple((i, items[i]) for i in order[start : start + self.shard_size])
                name = shard_name(split, number)
                yield split, ShardTask(self.output, name, self.digest, self.resolution, self.resample, chosen)


@dataclass(frozen=True)
class Outcome:
    """What a run of the writer did."""

    manifest: Manifest
    written: int
    skipped: int
    rejects: tuple[dict[str, str], ...]


def make_plan(source: Source, output: str, resolution: int, shard_size: int, resample: str) -> Plan:
    """Fix which item goes into which shard. The items of every split are shuffled by a fixed seed, so that no
    shard is all of one class and the first n samples of a split are a fair choice.

    Raises:
        DataError: an argument is wrong.
    """
    if resample not in RESAMPLING:
        raise DataError(f"resample must be one of {', '.join(RESAMPLING)}, not '{resample}'")
    if shard_size < 1:
        raise DataError(f"shard size must be at least 1, not {shard_size}")
    preprocessing = {
        "name": "center-crop-resize",
        "version": PREPROCESSING_VERSION,
        "params": {
            "resolution": resolution,
            "resample": resample,
            "png_level": PNG_LEVEL,
            "source": {"name": source.name, **source.params},
        },
    }
    orders = {}
    digest = hashlib.sha256(
        canonical_json({"preprocessing": preprocessing, "shard_size": shard_size, "classes": source.classes})
    )
    for split, items in source.splits.items():
        digest.update(canonical_json([split, len(items)]))
        for item in items:
            digest.update(canonical_json([item.label, item.source, item.size]))
        orders[split] = list(range(len(items)))
        random.Random(_SHUFFLE_SEED).shuffle(orders[split])
    return Plan(
        source,
        storage.absolute(output),
        resolution,
        resample,
        shard_size,
        preprocessing,
        digest.hexdigest(),
        orders,
    )


def find_other(plan: Plan) -> str | None:
    """What the output holds of another data set, in a few words; None where nothing stands in the way."""
    names = storage.listdir(plan.output)
    if MANIFEST_NAME in names:
        try:
            manifest = load_manifest(plan.output)
        except DataError as e:
            return f"a {MANIFEST_NAME} that cannot be read ({e})"
        if manifest.plan != plan.digest:
            what = f"'{manifest.name}', {manifest.resolution} pixels"
            return f"another data set ({what}, made from another source or with other settings)"
    for name in names:
        if name.endswith(".json") and _OWN_FILES.fullmatch(name) and name != MANIFEST_NAME:
            with suppress(DataError):  # a damaged sidecar is rewritten with its shard
                if load_sidecar(plan.output, name.removesuffix(".json") + ".tar").plan != plan.digest:
                    return "unfinished shards of another data set"
                return None  # one attempt's sidecars all have one plan: no need to read thousands
    return None


def write_shards(
    source: Source,
    output: str,
    resolution: int,
    *,
    shard_size: int = 1000,
    workers: int = 1,
    max_rejects: float = 0.01,
    resample: str = "box",
    overwrite: bool = False,
    name: str | None = None,
    quiet: bool = True,
) -> Manifest:
    """Write the data set of `source` at `output`, going on where an earlier run ended; returns its manifest.

    Args:
        source: the items.
        output: folder of the data set; a path or any fsspec URL.
        resolution: height and width of the images, in pixels.
        shard_size: images a shard.
        workers: processes; the bytes are the same at any number. With 1 all is done in this process.
        max_rejects: share of all images that may turn out not to be decodable.
        resample: filter for resizing: box, lanczos or bilinear.
        overwrite: replace another data set at `output`.
        name: of the data set; by default the last part of `output`.
        quiet: show no progress.

    Raises:
        DataError: the output holds another data set, or too many images were rejected.
        StorageError: the output cannot be reached or written.
    """
    plan = make_plan(source, output, resolution, shard_size, resample)
    return run_plan(plan, workers, max_rejects, overwrite, name, quiet).manifest


def run_plan(
    plan: Plan,
    workers: int = 1,
    max_rejects: float = 0.01,
    overwrite: bool = False,
    name: str | None = None,
    quiet: bool = True,
) -> Outcome:
    """Write what `plan` says; arguments and errors as `write_shards`."""
    if workers < 1:
        raise DataError(f"workers must be at least 1, not {workers}")
    if not 0 <= max_rejects <= 1:
        raise DataError(f"max rejects is a share from 0 to 1, not {max_rejects}")
    other = find_other(plan)
    if other is not None and not overwrite:
        raise DataError(f"{plan.output} holds {other}; choose another output or pass --overwrite")
    storage.check_writable(plan.output)
    if other is not None:
        _clear(plan.output)
    sidecars: dict[str, list[Sidecar]] = {split: [] for split in plan.orders}
    rejects: list[dict[str, str]] = []
    written = skipped = 0
    with Progress(plan.total, quiet=quiet) as progress:
        for split, done in _run_tasks(plan, workers, progress):
            sidecars[split].append(done.sidecar)
            rejects += done.sidecar.rejects
            written, skipped = written + (not done.skipped), skipped + done.skipped
            if len(rejects) > max_rejects * plan.total:
                first = rejects[0]
                raise DataError(
                    f"{len(rejects)} of {plan.total} images cannot be decoded, more than "
                    f"--max-rejects {max_rejects:g} allows; the first: {first['source']} ({first['reason']})"
                )
    manifest = _make_manifest(plan, sidecars, name)
    if not _stands(manifest, plan.output):
        storage.write_bytes(storage.join(plan.output, MANIFEST_NAME), manifest_to_json(manifest))
    return Outcome(manifest, written, skipped, tuple(rejects))


def _make_manifest(plan: Plan, sidecars: dict[str, list[Sidecar]], name: str | None) -> Manifest:
    splits = {}
    for split, found in sidecars.items():
        shards = tuple(sorted((s.shard for s in found), key=lambda shard: shard.name))
        splits[split] = Split(split, sum(s.samples for s in shards), shards)
    return Manifest(
        name=name if name is not None else plan.output.rstrip("/").rsplit("/", 1)[-1],
        resolution=plan.resolution,
        channels=3,
        preprocessing=plan.preprocessing,
        splits=splits,
        fingerprint=fingerprint(splits, plan.preprocessing),
        classes=plan.source.classes,
        plan=plan.digest,
    )


def _stands(manifest: Manifest, output: str) -> bool:
    """Whether exactly this manifest is there already: then its file is left alone."""
    try:
        return load_manifest(output) == manifest
    except DataError:
        return False


def _clear(output: str) -> None:
    """Remove the data set at `output`, nothing else; manifest first: what remains when killed is no data set."""
    for name in sorted(storage.listdir(output), key=lambda n: n != MANIFEST_NAME):
        if _OWN_FILES.fullmatch(name):
            storage.delete(storage.join(output, name))


def _run_tasks(plan: Plan, workers: int, progress: Progress) -> Iterator[tuple[str, ShardDone]]:
    """Every task's split and result, in the order in which they are done."""

    def count(task: ShardTask, done: ShardDone) -> None:
        if done.skipped:
            progress.skip(len(task.numbered))

    if workers == 1:
        for split, task in plan.tasks():
            done = run_task(task, progress.update)
            count(task, done)
            yield split, done
        return

    context = multiprocessing.get_context("spawn")
    ticks = context.Value("q", 0)
    tasks = plan.tasks()
    running: dict[Future[ShardDone], tuple[str, ShardTask]] = {}
    pool = ProcessPoolExecutor(workers, context, _start_worker, (ticks,))
    try:
        while True:
            while len(running) < workers * _IN_FLIGHT and (upcoming := next(tasks, None)) is not None:
                running[pool.submit(_run_in_worker, upcoming[1])] = upcoming
            if not running:
                return
            finished, _ = wait(running, timeout=_POLL, return_when=FIRST_COMPLETED)
            progress.update(ticks.value - progress.made)
            for future in finished:
                split, task = running.pop(future)
                done = future.result()
                count(task, done)
                yield split, done
    except BrokenProcessPool:
        raise storage.StorageError("a worker process died (out of memory?); run again to go on") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_in_worker(task: ShardTask) -> ShardDone:
    def tick(n: int) -> None:
        with _ticks.get_lock():
            _ticks.value += n

    return run_task(task, tick)


def _start_worker(ticks: Any) -> None:
    """Share the count, leave Ctrl-C to the parent, and end when the parent is killed."""
    global _ticks
    _ticks = ticks
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
