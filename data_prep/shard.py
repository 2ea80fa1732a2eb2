"""Writes one shard, which is the task of a worker: load its items, crop and resize, write the tar and its sidecar."""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_prep.decode import NotRead, Undecodable, load
from data_prep.items import Item, Loaded
from data_prep.pixels import Preprocess, digest, encode, fit_image
from eiwtrain import storage
from eiwtrain.data.manifest import DataError, Sidecar, read_sidecar, sidecar_from_json, sidecar_to_json
from eiwtrain.data.shards import Shard, sidecar_name

_LOADING = 16  # items of a remote source that are loaded side by side
_HELD = 1 << 28  # bytes of items that are loaded ahead; a larger item is loaded alone
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class ShardTask:
    """All that a worker needs to write a shard: which items go into it, fixed before any work.

    Attributes:
        numbered: (number of the item within its split, item).
        drop: keys of duplicates to leave out, each with the reason; None accepts a shard that is there as it is.
        sidecar_sha256: of the sidecar, if a manifest of this plan records it.
    """

    output: str
    split: str
    name: str
    plan: str
    preprocess: Preprocess
    numbered: tuple[tuple[int, Item], ...]
    remote: bool = False
    drop: Mapping[str, str] | None = None
    sidecar_sha256: str | None = None


@dataclass(frozen=True)
class ShardDone:
    """A shard that is there, with the checksum of its sidecar; `skipped` if it was there before."""

    sidecar: Sidecar
    sidecar_sha256: str
    skipped: bool


def run_task(task: ShardTask) -> ShardDone:
    """Write the shard of `task`, unless it is there with the right plan and the right bytes.

    The tar is written first and the sidecar after it, each atomically: a shard without a matching sidecar is rewritten.

    Raises:
        DataError, StorageError: an item cannot be read, or the shard cannot be written.
    """
    if (found := _find_intact(task)) is not None:
        return found
    with tempfile.TemporaryDirectory(prefix="data-prep-") as folder:
        local = Path(folder) / task.name
        sidecar = _write_tar(task, local)
        storage.put_file(local, storage.join(task.output, task.name))
    text = sidecar_to_json(sidecar)
    storage.write_bytes(storage.join(task.output, sidecar_name(task.name)), text)
    return ShardDone(sidecar, storage.sha256_bytes(text), skipped=False)


def item_key(number: int) -> str:
    """Return the WebDataset key of an item by its number within the split."""
    return f"{number:08d}"


def _find_intact(task: ShardTask) -> ShardDone | None:
    """Return the shard as it is, or None if it has to be written."""
    try:
        text = read_sidecar(task.output, task.name)
        sha256 = storage.sha256_bytes(text)
        if task.sidecar_sha256 not in (None, sha256):
            return None
        sidecar = sidecar_from_json(text, task.name)
    except DataError:
        return None
    if sidecar.plan != task.plan or sidecar.shard.name != task.name:
        return None
    if task.drop is not None and task.drop != {d["key"]: d["reason"] for d in sidecar.dropped}:
        return None
    url = storage.join(task.output, task.name)
    try:
        if storage.is_local(url):
            found = storage.sha256_file(storage.absolute(url))
        else:
            with tempfile.TemporaryDirectory(prefix="data-prep-") as folder:
                local = Path(folder) / task.name
                storage.get_file(url, local)
                found = storage.sha256_file(local)
    except FileNotFoundError:
        return None
    return ShardDone(sidecar, sha256, skipped=True) if found == sidecar.shard.sha256 else None


def _write_tar(task: ShardTask, path: Path) -> Sidecar:
    """Write the tar at the local `path`; the bytes are the same on any machine with the same codecs."""
    encoding = task.preprocess.encoding
    rows: list[tuple[str, int, int, int, str]] = []
    rejects: list[dict[str, str]] = []
    dropped: list[dict[str, str]] = []
    changed: Counter[str] = Counter()
    with open(path, "wb") as tar:
        for number, item, loaded in _load(task):
            key = item_key(number)
            try:
                pixels, changes = fit_image(loaded, item.source, task.preprocess)
            except Undecodable as e:
                rejects.append({"key": key, "source": item.source, "reason": str(e)})
                continue
            same = digest(pixels)
            if task.drop is not None and key in task.drop:
                dropped.append({"key": key, "source": item.source, "digest": same, "reason": task.drop[key]})
                continue
            changed.update(changes)
            image = encode(pixels, encoding)
            rows.append((key, item.label, tar.tell() + _BLOCK, len(image), same))
            about = json.dumps({"label": item.label, "source": item.source}, sort_keys=True).encode()
            tar.write(_member(f"{key}.{encoding}", image) + _member(f"{key}.json", about))
        tar.write(bytes(-(tar.tell() + 2 * _BLOCK) % tarfile.RECORDSIZE + 2 * _BLOCK))
    keys, labels, offsets, sizes, digests = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    shard = Shard(task.name, len(keys), path.stat().st_size, storage.sha256_file(path))
    index = (keys, labels, offsets, sizes, digests)
    return Sidecar(shard, task.plan, tuple(rejects), *index, tuple(dropped), dict(sorted(changed.items())))


def _load(task: ShardTask) -> Iterator[tuple[int, Item, Loaded | NotRead]]:
    """Yield every item with what it loads, in order; items of a remote source are loaded ahead."""
    if not task.remote:
        for number, item in task.numbered:
            yield number, item, load(item)
        return
    pool = ThreadPoolExecutor(_LOADING)
    coming: deque[Future[Loaded | NotRead]] = deque()
    held = 0  # bytes of those that are coming
    try:
        for ahead, (number, item) in enumerate(task.numbered):
            while len(coming) < 2 * _LOADING and ahead + len(coming) < len(task.numbered):
                following = task.numbered[ahead + len(coming)][1]
                if coming and held + following.size > _HELD:
                    break
                held += following.size
                coming.append(pool.submit(load, following))
            yield number, item, coming.popleft().result()
            held -= item.size
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a stop does not wait for storage


# A ustar header with the fields that are the same for every member: mode 0644, and no owner or time.
_HEADER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)


def _member(name: str, data: bytes) -> bytes:
    """Make a member of a tar with header and padding; `tarfile` itself takes longer than encoding an image."""
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode("ascii")
    header[124:136] = b"%011o\0" % len(data)
    header[148:156] = b" " * 8  # the checksum counts itself as spaces
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % _BLOCK)
