"""One shard: decode its items, crop and resize, write the tar and its sidecar. The task that workers run."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from data_prep.items import Item
from eiwtrain import storage
from eiwtrain.data.manifest import (
    DataError,
    Shard,
    Sidecar,
    load_sidecar,
    sidecar_name,
    sidecar_to_json,
)

RESAMPLING = {
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
}
PNG_LEVEL = 6  # zlib: 1 saves a fifth of the encoding time and costs 3 % of size
_DEEP_MODES = ("I", "F")  # more than 8 bits a channel: converting would clip, so they are rejected
_TICK = 32  # images between two reports of progress


@dataclass(frozen=True)
class ShardTask:
    """All that a worker needs: which items go into which shard of which data set, fixed before any work."""

    output: str
    name: str
    plan: str
    resolution: int
    resample: str
    numbered: tuple[tuple[int, Item], ...]  # (number of the item within its split, item)


@dataclass(frozen=True)
class ShardDone:
    """A shard that stands, and whether it stood before."""

    sidecar: Sidecar
    skipped: bool


def run_task(task: ShardTask, tick: Callable[[int], None]) -> ShardDone:
    """Write the shard of `task`, unless it is there with the right plan and the right bytes.

    Bytes go first and the sidecar after them, each atomically: a shard without a sidecar that matches is rewritten.
    """
    found = find_intact(task)
    if found is not None:
        return ShardDone(found, skipped=True)
    with tempfile.TemporaryDirectory(prefix="data-prep-") as folder:
        local = Path(folder) / task.name
        sidecar = _write_tar(task, local, tick)
        storage.put_file(local, storage.join(task.output, task.name))
    storage.write_bytes(storage.join(task.output, sidecar_name(task.name)), sidecar_to_json(sidecar))
    return ShardDone(sidecar, skipped=False)


def find_intact(task: ShardTask) -> Sidecar | None:
    """The sidecar of the shard as it stands, or None where it has to be written."""
    try:
        sidecar = load_sidecar(task.output, task.name)
    except DataError:
        return None
    if sidecar.plan != task.plan or sidecar.shard.name != task.name:
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
    return sidecar if found == sidecar.shard.sha256 else None


def _write_tar(task: ShardTask, path: Path, tick: Callable[[int], None]) -> Sidecar:
    """Write the tar at the local `path`: the same bytes for the same items on any machine of one Pillow version."""
    keys: list[str] = []
    labels: list[int] = []
    offsets: list[int] = []
    sizes: list[int] = []
    rejects: list[dict[str, str]] = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (number, item) in enumerate(task.numbered, start=1):
            key = f"{number:08d}"
            try:
                png = encode(item, task.resolution, task.resample)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
                reason = " ".join(str(e).replace(str(getattr(item.load, "path", "")), "").split())
                rejects.append({"key": key, "source": item.source, "reason": f"{type(e).__name__}: {reason[:200]}"})
            else:
                keys.append(key)
                labels.append(item.label)
                offsets.append(_add(tar, f"{key}.png", png))
                sizes.append(len(png))
                about = json.dumps({"label": item.label, "source": item.source}, sort_keys=True)
                _add(tar, f"{key}.json", about.encode())
            if i % _TICK == 0 or i == len(task.numbered):
                tick((i - 1) % _TICK + 1)
    shard = Shard(task.name, len(keys), path.stat().st_size, storage.sha256_file(path))
    return Sidecar(shard, task.plan, tuple(rejects), tuple(keys), tuple(labels), tuple(offsets), tuple(sizes))


def encode(item: Item, resolution: int, resample: str) -> bytes:
    """The item as a PNG of `resolution` x `resolution` RGB pixels: upright, the central square, resized.

    Raises:
        OSError, ValueError, SyntaxError: it cannot be decoded.
    """
    with item.load() as opened:
        if opened.mode.split(";")[0] in _DEEP_MODES:
            raise ValueError(f"mode {opened.mode}: more than 8 bits a channel")
        image = ImageOps.exif_transpose(opened).convert("RGB")
    if image.size != (resolution, resolution):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((resolution, resolution), RESAMPLING[resample], box=box)
    image.info.clear()  # or colour profiles and comments would go along
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a member with nothing of this machine or moment in its header; where its data starts."""
    info = tarfile.TarInfo(name)  # mtime, uid and gid 0, mode 0644
    info.size = len(data)
    start = tar.fileobj.tell() + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return start
