"""Writes the data set of a source: plan all shards, have workers write them, and write the manifest last."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from data_prep.duplicates import Duplicate, find_duplicates
from data_prep.items import Loaded, Source
from data_prep.parallel import check_workers, run_tasks
from data_prep.pixels import Preprocess
from data_prep.progress import Progress
from data_prep.shard import ShardDone, ShardTask, item_key, run_task
from data_prep.splits import TRAIN, notes_on_labels
from eiwtrain import storage
from eiwtrain.data.fingerprint import canonical_json, fingerprint, first_fingerprint
from eiwtrain.data.manifest import (
    MANIFEST_NAME,
    DataError,
    Manifest,
    load_manifest,
    load_sidecar,
    manifest_to_json,
    read_manifest,
)
from eiwtrain.data.shards import Split, is_shard_file, shard_name, sidecar_name

_SHUFFLE_SEED = 20240704  # order of items in the shards; any number, but the same forever
_MOST_SHARDS = 1_000_000  # of a split: names have six digits, and their order is that of the numbers
_PROBED = 16  # items of a split that the plan reads if all have one size


@dataclass(frozen=True)
class Plan:
    """Which item goes into which shard, fixed before any work, so that the bytes do not depend on the workers."""

    source: Source
    output: str
    preprocess: Preprocess
    shard_size: int
    drop_duplicates: bool
    preprocessing: dict[str, Any]
    digest: str
    orders: dict[str, list[int]]  # per split, item numbers in the order in which they fill the shards
    notes: tuple[str, ...] = ()  # what the user should know of these images, the source's notes first
    flawed: tuple[int, str] = (0, "")  # how many items are known to be rejects, and the first of them

    @property
    def total(self) -> int:
        """Return the number of items of all splits."""
        return sum(len(order) for order in self.orders.values())

    def shards(self) -> dict[str, int]:
        """Return the number of shards of each split."""
        return {split: -(-len(order) // self.shard_size) for split, order in self.orders.items()}

    def numbers(self, split: str, shard: int) -> list[int]:
        """Return the numbers, within the split, of the items of a shard."""
        return self.orders[split][shard * self.shard_size : (shard + 1) * self.shard_size]

    def task(self, split: str, shard: int) -> ShardTask:
        """Return the task of one shard."""
        items = self.source.splits[split]
        chosen = tuple((i, items[i]) for i in self.numbers(split, shard))
        name = shard_name(split, shard)
        return ShardTask(self.output, split, name, self.digest, self.preprocess, chosen, self.source.remote)

    def tasks(self, sidecar_sha256: Mapping[str, str]) -> Iterator[ShardTask]:
        """Yield the task of every shard, with the checksum of its sidecar if that is known."""
        for split, shards in self.shards().items():
            for number in range(shards):
                task = self.task(split, number)
                yield replace(task, sidecar_sha256=sidecar_sha256.get(task.name))


@dataclass(frozen=True)
class Written:
    """What a run of the writer did."""

    manifest: Manifest
    written: int
    skipped: int
    rejects: tuple[dict[str, str], ...]
    duplicates: tuple[Duplicate, ...]
    dropped: int


def make_plan(
    source: Source, output: str, preprocess: Preprocess, shard_size: int = 1000, drop_duplicates: bool = False
) -> Plan:
    """Decide which item goes into which shard.

    The items of every split are shuffled by a fixed seed, so that no shard is all of one class and the first n samples
    of a split are a fair choice.

    Args:
        source: the items.
        output: folder of the data set; a path or any fsspec URL.
        preprocess: what is done to the pixels; its box is replaced by the source's.
        shard_size: images a shard.
        drop_duplicates: leave out images for training that equal another one (see `find_duplicates`).

    Raises:
        DataError: an argument is wrong.
    """
    if shard_size < 1:
        raise DataError(f"shard size must be at least 1, not {shard_size}")
    preprocess = replace(preprocess, box=source.box)
    preprocessing = preprocess.describe()
    about = {"name": source.name} | ({"protocol": source.protocol} if source.protocol else {})
    preprocessing["params"]["source"] = about | source.params
    if drop_duplicates:
        preprocessing["params"]["drop_duplicates"] = True
    orders = {}
    labels: dict[str, Counter[int]] = {}
    unlabelled: dict[str, str] = {}
    flawed: list[str] = []
    digest = hashlib.sha256(
        canonical_json({"preprocessing": preprocessing, "shard_size": shard_size, "classes": source.classes})
    )
    for split, items in source.splits.items():
        if len(items) > _MOST_SHARDS * shard_size:
            raise DataError(f"split '{split}' would have more than {_MOST_SHARDS:,} shards; use a larger --shard-size")
        digest.update(canonical_json([split, len(items)]))
        sizes = set()
        labels[split] = Counter()
        for item in items:
            digest.update(canonical_json([item.label, item.source, item.size, *([item.flaw] if item.flaw else [])]))
            sizes.add(item.size)
            labels[split][item.label] += 1
            if item.label < 0:
                unlabelled.setdefault(split, item.source)
            if item.flaw:
                flawed.append(f"{item.source} ({item.flaw})")
        if len(sizes) == 1:  # rows of batches, say: names and sizes do not show whether the source has changed
            for number in range(0, len(items), -(-len(items) // _PROBED)):
                digest.update(b"" if items[number].flaw else _bytes_of(items[number].load()))
        orders[split] = list(range(len(items)))
        random.Random(_SHUFFLE_SEED).shuffle(orders[split])
    where = storage.absolute(output)
    return Plan(
        source,
        where,
        preprocess,
        shard_size,
        drop_duplicates,
        preprocessing,
        digest.hexdigest(),
        orders,
        notes=(*source.notes, *notes_on_labels(labels, source.classes, unlabelled)),
        flawed=(len(flawed), flawed[0] if flawed else ""),
    )


def _bytes_of(loaded: Loaded) -> bytes:
    return loaded if isinstance(loaded, bytes) else loaded.tobytes()


def find_other(plan: Plan) -> str | None:
    """Describe in a few words another data set that the output holds; return None if there is none."""
    names = storage.listdir(plan.output)
    if MANIFEST_NAME in names or storage.exists(storage.join(plan.output, MANIFEST_NAME)):  # a listing may be late
        try:
            manifest = load_manifest(plan.output)
        except DataError as e:
            return f"a {MANIFEST_NAME} that cannot be read ({e})"
        if manifest.plan != plan.digest:
            what = f"'{manifest.name}', {manifest.resolution} pixels"
            return f"another data set ({what}, made from another source or with other settings)"
    for name in names:
        if name.endswith(".json") and is_shard_file(name, plan.orders):
            with suppress(DataError):  # a damaged sidecar is written again with its shard
                if load_sidecar(plan.output, name.removesuffix(".json") + ".tar").plan != plan.digest:
                    return "unfinished shards of another data set"
                return None  # all sidecars of an attempt have one plan, so one is read instead of thousands
    return None


def run_plan(
    plan: Plan,
    *,
    workers: int | None = 1,
    max_rejects: float = 0.01,
    overwrite: bool = False,
    name: str | None = None,
    quiet: bool = True,
) -> Written:
    """Write the data set of `plan`; resume where an earlier run stopped.

    Args:
        workers: processes, None for all CPUs; the bytes are the same at any number. One is this process, more are
            workers of Ray.
        max_rejects: share of all images that may turn out not to be decodable.
        overwrite: replace another data set at the output.
        name: of the data set; by default the last part of the output.
        quiet: show no progress.

    Raises:
        DataError: the output holds another data set, an item cannot be read, or too many images were rejected.
        StorageError: the output cannot be reached or written.
    """
    check_workers(workers)
    if not 0 <= max_rejects <= 1:
        raise DataError(f"max rejects is a share from 0 to 1, not {max_rejects}")
    _check_rejects(plan, max_rejects, *plan.flawed)
    other = find_other(plan)
    if other is not None and not overwrite:
        raise DataError(f"{plan.output} holds {other}; choose another output or pass --overwrite")
    storage.check_writable(plan.output)
    if other is not None:
        there = _manifest_at(plan.output)
        _clear(plan.output, {*plan.orders, *(there.splits if there else ())})
    finished: dict[str, dict[str, ShardDone]] = {split: {} for split in plan.orders}
    written: set[str] = set()
    rejects: list[dict[str, str]] = []

    def write(tasks: Iterator[ShardTask]) -> None:
        for task, done in run_tasks(run_task, tasks, workers):
            if task.drop is None:
                rejects.extend(done.sidecar.rejects)
            if not done.skipped:
                written.add(task.name)
            finished[task.split][task.name] = done
            progress.update(len(task.numbered), done.skipped)
            if rejects:
                first = f"{rejects[0]['source']} ({rejects[0]['reason']})"
                _check_rejects(plan, max_rejects, len(rejects), first)

    with Progress(plan.total, quiet=quiet) as progress:
        write(plan.tasks(_known_sidecars(plan)))
        duplicates = find_duplicates({split: [d.sidecar for d in done.values()] for split, done in finished.items()})
        if plan.drop_duplicates:
            write(_without_duplicates(plan, duplicates, finished, progress))
    manifest = _make_manifest(plan, finished, duplicates, name)
    shards = [shard.name for split in manifest.splits.values() for shard in split.shards]
    own = {MANIFEST_NAME, *shards, *map(sidecar_name, shards)}
    _clear(plan.output, plan.orders, keep=own)  # files that an attempt with other settings has left
    there = _manifest_at(plan.output)
    if there is not None and (there.splits, there.classes) == (manifest.splits, manifest.classes):
        first = first_fingerprint(manifest.splits, manifest.preprocessing)
        if there.fingerprint == first:  # written by an earlier version, and runs know it
            manifest = replace(manifest, fingerprint=first)
    if there != manifest:  # otherwise its file is left alone
        text = manifest_to_json(manifest)
        storage.write_bytes(storage.join(plan.output, MANIFEST_NAME), text)
        if read_manifest(plan.output) != text:
            raise storage.StorageError(f"{plan.output}: {MANIFEST_NAME} is not there as it was written")
    dropped = sum(len(d.sidecar.dropped) for done in finished.values() for d in done.values())
    total = sum(plan.shards().values())
    return Written(manifest, len(written), total - len(written), tuple(rejects), tuple(duplicates), dropped)


def _check_rejects(plan: Plan, allowed: float, rejects: int, first: str) -> None:
    if rejects > allowed * plan.total:
        raise DataError(
            f"{rejects} of {plan.total} images cannot be decoded, more than --max-rejects {allowed:g} allows; "
            f"the first: {first}"
        )


def _known_sidecars(plan: Plan) -> dict[str, str]:
    """Return the checksums of the sidecars by name of the shard, if there is a manifest of this plan."""
    manifest = _manifest_at(plan.output)
    if manifest is None or manifest.plan != plan.digest:
        return {}
    return {shard.name: shard.sidecar_sha256 for split in manifest.splits.values() for shard in split.shards}


def _without_duplicates(
    plan: Plan, duplicates: list[Duplicate], finished: dict[str, dict[str, ShardDone]], progress: Progress
) -> Iterator[ShardTask]:
    """Yield the shards for training that have to be written again to leave out their duplicates, and no others."""
    reasons = {d.key: f"same pixels as {d.first}" for d in duplicates if d.split == TRAIN}
    for number in range(plan.shards().get(TRAIN, 0)):
        drop = {key: reasons[key] for key in map(item_key, plan.numbers(TRAIN, number)) if key in reasons}
        if drop != {d["key"]: d["reason"] for d in finished[TRAIN][shard_name(TRAIN, number)].sidecar.dropped}:
            task = replace(plan.task(TRAIN, number), drop=drop)
            progress.expect(len(task.numbered))
            yield task


def _make_manifest(
    plan: Plan, finished: dict[str, dict[str, ShardDone]], duplicates: list[Duplicate], name: str | None
) -> Manifest:
    splits = {}
    for split, done in finished.items():
        shards = tuple(replace(d.sidecar.shard, sidecar_sha256=d.sidecar_sha256) for _, d in sorted(done.items()))
        splits[split] = Split(split, sum(s.samples for s in shards), shards)
    return Manifest(
        name=name if name is not None else plan.output.rstrip("/").rsplit("/", 1)[-1],
        resolution=plan.preprocess.resolution,
        channels=3,
        preprocessing=plan.preprocessing,
        splits=splits,
        fingerprint=fingerprint(splits, plan.preprocessing, plan.source.classes),
        classes=plan.source.classes,
        plan=plan.digest,
        duplicates={split: sum(d.split == split for d in duplicates) for split in splits},
        left_out=plan.source.left_out,
    )


def _manifest_at(output: str) -> Manifest | None:
    """Return the manifest at the output, if there is one that can be read."""
    try:
        return load_manifest(output)
    except DataError:
        return None


def _clear(output: str, splits: Iterable[str], keep: Collection[str] = ()) -> None:
    """Remove the files of a data set of these splits, except those in `keep`.

    The manifest is removed first, so that what remains after a kill is not a data set.
    """
    for name in sorted(storage.listdir(output), key=lambda n: n != MANIFEST_NAME):
        if name not in keep and (name == MANIFEST_NAME or is_shard_file(name, splits)):
            storage.delete(storage.join(output, name))
