"""Images by index: which shard, which bytes, decoded. Knows nothing of order, ranks or batches."""

from __future__ import annotations

import io
import mmap
import os
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from eiwtrain import storage
from eiwtrain.data.cache import DEFAULT_CACHE_BYTES, ShardCache, default_cache_dir, touch
from eiwtrain.data.manifest import DataError, Manifest, load_sidecar

Pixels = npt.NDArray[np.uint8]

_OPEN_SHARDS = 256  # mapped at a time: each holds a file descriptor, and 1,024 a process is a common limit
_TOUCH_EVERY = 30.0  # seconds between two marks of use on a cached shard


@dataclass
class _Open:
    """A mapped shard."""

    path: Path
    data: mmap.mmap
    touched: float


class _Index(NamedTuple):
    """Of a shard's images: where their bytes are, and their classes."""

    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]


class ShardReader:
    """The images of one split.

    Picklable, and opened lazily in each process that reads: send it to loader workers as it is.
    Local shards are mapped in place; remote ones are downloaded to `cache_dir`, verified, and kept within
    `cache_bytes`.

    Args:
        url: the data set; a path or any fsspec URL.
        manifest: of that data set.
        split: name of the split.
        cache_dir: a folder on local disk, shared by the processes of a node; by default in the temporary folder.
        cache_bytes: bound for remote shards on local disk.

    Raises:
        DataError: no such split, or it has no samples.
    """

    def __init__(
        self,
        url: str,
        manifest: Manifest,
        split: str,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.url = storage.absolute(url)
        self.manifest = manifest
        self.split = manifest.split(split)
        self.cache = ShardCache(Path(cache_dir) if cache_dir is not None else default_cache_dir(), cache_bytes)
        self._ends = np.cumsum(self.shard_sizes)
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._index: dict[int, _Index] = {}

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard, in manifest order."""
        return [s.samples for s in self.split.shards]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self.manifest.channels, self.manifest.resolution, self.manifest.resolution

    def __len__(self) -> int:
        return self.split.samples

    def __getitem__(self, index: int) -> Pixels:
        """Image `index` of the split: uint8 (C, H, W).

        Raises:
            IndexError: there are fewer.
            DataError: its shard is missing or damaged; the message names it.
            StorageError: storage cannot be reached.
        """
        return self.read([index])[0]

    def read(self, indices: Iterable[int]) -> Pixels:
        """The images of the indices: uint8 (n, C, H, W). Raises as `reader[index]`."""
        wanted = np.fromiter((int(i) for i in indices), np.int64)
        channels, height, width = self.image_shape
        pixels = np.empty((len(wanted), height, width, channels), np.uint8)
        for row, index in enumerate(wanted.tolist()):
            pixels[row] = self._decode(*self._place(index))
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))

    def labels(self, indices: Iterable[int]) -> npt.NDArray[np.int64]:
        """The classes of the images, (n,), -1 for an image of none. Raises as `reader[index]`."""
        found = []
        for index in indices:
            number, local = self._place(int(index))
            self._load_index(number)
            found.append(self._index[number].labels[local])
        return np.array(found, np.int64)

    def close(self) -> None:
        """Unmap all shards; the next read maps anew."""
        while self._open:
            self._open.popitem()[1].data.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_index": {}}

    def _place(self, index: int) -> tuple[int, int]:
        """Which shard image `index` is in, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of split '{self.split.name}', which has {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number]) + self.split.shards[number].samples

    def _decode(self, number: int, local: int) -> Pixels:
        data = self._map(number)
        index = self._index[number]
        start = int(index.offsets[local])
        shard = self.split.shards[number]
        try:
            with Image.open(io.BytesIO(data[start : start + int(index.sizes[local])])) as image:
                pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as e:
            raise DataError(f"shard {shard.name}: image {local} cannot be decoded ({e})") from None
        expected = (*self.image_shape[1:], self.image_shape[0])
        if pixels.shape != expected:
            raise DataError(f"shard {shard.name}: image {local} has shape {pixels.shape}, not {expected}")
        return pixels

    def _map(self, number: int) -> mmap.mmap:
        """The bytes of shard `number`, mapped now if they were not."""
        remote = not storage.is_local(self.url)
        if number in self._open:
            self._open.move_to_end(number)
            found = self._open[number]
            if remote and time.monotonic() - found.touched > _TOUCH_EVERY:
                found.touched = time.monotonic()
                touch(found.path)
            return found.data
        self._load_index(number)
        for attempt in range(3):  # another process may evict the shard between fetch and open
            path = self._local_path(number)
            try:
                with open(path, "rb") as f:
                    data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
                break
            except FileNotFoundError:
                if attempt == 2:
                    raise
        self._open[number] = _Open(path, data, time.monotonic())
        if remote:  # let go of what has been evicted: its disk space is freed only then
            for other in [n for n, o in self._open.items() if n != number and not o.path.exists()]:
                self._open.pop(other).data.close()
        while len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)[1].data.close()
        return data

    def _local_path(self, number: int) -> Path:
        shard = self.split.shards[number]
        if not storage.is_local(self.url):
            return self.cache.fetch(self.url, shard)
        path = Path(storage.join(self.url, shard.name))
        self.cache.verify_local(path, shard)
        return path

    def _load_index(self, number: int) -> None:
        if number in self._index:
            return
        shard = self.split.shards[number]
        sidecar = load_sidecar(self.url, shard.name)
        if sidecar.shard != shard:
            raise DataError(f"shard {shard.name}: its sidecar is of other bytes than the manifest")
        self._index[number] = _Index(
            np.array(sidecar.offsets, np.int64), np.array(sidecar.sizes, np.int32), np.array(sidecar.labels, np.int32)
        )
