"""Read a whole data set back and list everything that is wrong with it.

Not for repairing it: the command that wrote it does that.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from data_prep.duplicates import find_duplicates
from data_prep.progress import Progress
from data_prep.shard_check import Problems, ShardCheck, ShardFound, verify_shard
from eiwtrain import storage
from eiwtrain.data.manifest import (
    MANIFEST_NAME,
    DataError,
    Manifest,
    Sidecar,
    fingerprint_for,
    manifest_from_json,
    read_manifest,
)
from eiwtrain.data.shards import Shard, Split, is_shard_file, sidecar_name

_PARTIAL = re.compile(r"\..+\.[0-9a-f]{32}\.tmp|\.probe-[0-9a-f]{32}")  # files that a killed write of `storage` leaves

Run = Callable[[Callable[[ShardCheck], ShardFound], Iterable[ShardCheck]], Iterable[ShardFound]]


def verify(url: str, *, run: Run = map, quiet: bool = True) -> list[str]:
    """Read back all of the data set at `url`: the manifest, every sidecar, every tar and every image in it.

    Each tar is read by the webdataset library and compared with its index; each image is decoded and the digest of its
    pixels compared. A remote tar is copied to this machine while it is read.

    Args:
        run: like `map`, but free to yield in any order: for workers elsewhere.
        quiet: show no progress.

    Returns:
        The problems, one line each, in the order of the manifest; empty for a sound data set. Problems of one kind in
        one shard are one line: the first of them, and the number of the others.

    Raises:
        DataError: there is no data set.
        StorageError: it cannot be reached.
    """
    url = storage.absolute(url)
    manifest, problems = _read_manifest(url)
    if manifest is None:
        return problems
    found: dict[tuple[str, int], ShardFound] = {}
    with Progress(sum(split.samples for split in manifest.splits.values()), quiet=quiet) as progress:
        for done in run(verify_shard, list(_checks(url, manifest))):
            found[done.check.split, done.check.number] = done
            progress.update(done.check.shard.samples)
    in_order = [found[split.name, n] for split in manifest.splits.values() for n in range(len(split.shards))]
    problems += [line for done in in_order for line in done.problems]
    problems += _across_shards(manifest, in_order)
    return problems + _strays(manifest, storage.listdir(url))


def _read_manifest(url: str) -> tuple[Manifest | None, list[str]]:
    """Return the manifest and its problems; wrong totals are corrected, so that the shards can still be checked."""
    text = read_manifest(url)
    try:
        return manifest_from_json(text, MANIFEST_NAME), []
    except DataError as e:
        problem = str(e)
    problems = []
    try:
        content = json.loads(text)
        for name, split in content["splits"].items():
            samples = sum(shard["samples"] for shard in split["shards"])
            if split["samples"] != samples:
                said = f"{split['samples']} images, its shards {samples}"
                problems.append(f"{MANIFEST_NAME}: split '{name}' has {said}")
            split["samples"] = samples
        splits = {n: Split(n, 0, tuple(Shard(**s) for s in split["shards"])) for n, split in content["splits"].items()}
        right = fingerprint_for(content["format"], splits, content["preprocessing"], content["classes"])
        if content["fingerprint"] != right:
            problems.append(f"{MANIFEST_NAME}: the fingerprint is not that of shards, sidecars, classes, preprocessing")
        content["fingerprint"] = right
        return manifest_from_json(json.dumps(content).encode(), MANIFEST_NAME), problems
    except (
        DataError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ):  # more than the totals is wrong
        return None, [problem]


def _checks(url: str, manifest: Manifest) -> Iterator[ShardCheck]:
    about = (manifest.plan, manifest.resolution, manifest.encoding, len(manifest.classes))
    for split in manifest.splits.values():
        for number, shard in enumerate(split.shards):
            yield ShardCheck(url, split.name, number, shard, *about)


def _across_shards(manifest: Manifest, found: list[ShardFound]) -> list[str]:
    """Return keys that come twice and wrong counts of duplicates, as far as the sidecars show them."""
    sidecars: dict[str, list[Sidecar]] = {split: [] for split in manifest.splits}
    problems = Problems()
    seen: dict[tuple[str, str], str] = {}
    for done in found:
        if done.sidecar is None:
            continue
        split, name = done.check.split, done.check.shard.name
        sidecars[split].append(done.sidecar)
        left_out = (*done.sidecar.rejects, *done.sidecar.dropped)
        for key in (*done.sidecar.keys, *(entry["key"] for entry in left_out)):
            if (split, key) in seen:
                where = f"also in {seen[split, key]}" if seen[split, key] != name else "twice"
                problems.add(sidecar_name(name), f"key {key} is there {where}", where)
            seen[split, key] = name
    if all(done.sidecar is not None for done in found):
        counts = Counter(duplicate.split for duplicate in find_duplicates(sidecars))
        for split in sorted({*manifest.splits, *manifest.duplicates}):
            said = manifest.duplicates.get(split)
            if said != counts[split]:
                problems.add(MANIFEST_NAME, f"split '{split}' has {counts[split]} duplicates, the manifest says {said}")
    return problems.lines()


def _strays(manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Return the files that only `data_prep` writes and that belong to no shard. Other files are ignored."""
    shards = {shard.name for split in manifest.splits.values() for shard in split.shards}
    own = {MANIFEST_NAME, *shards, *map(sidecar_name, shards)}
    strays = []
    for name in sorted(set(names) - own):
        if _PARTIAL.fullmatch(name):
            strays.append(f"{name}: left over from a write that was cut short; it can be deleted")
        elif is_shard_file(name, manifest.splits):
            strays.append(f"{name}: belongs to no shard of the manifest")
    return strays
