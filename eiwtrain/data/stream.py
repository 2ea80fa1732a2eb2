"""Read images by index: which shard, which bytes, decoded and checked. Not for order, ranks or batches."""

from __future__ import annotations

import io
import logging
import os
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt

from eiwtrain import storage
from eiwtrain.data.cache import DEFAULT_CACHE_BYTES, ShardCache, default_cache_dir, touch
from eiwtrain.data.fingerprint import DIGEST_BYTES, image_digest
from eiwtrain.data.manifest import DataError, Manifest

Pixels = npt.NDArray[np.uint8]

_OPEN_SHARDS = 256  # at a time: each holds a file descriptor, and a common limit is 1,024 a process
_TOUCH_EVERY = 30.0  # seconds between two marks of use on a cached shard

_log = logging.getLogger(__name__)


class _Index(NamedTuple):
    """The places of the bytes of a shard's images, their classes, and the digests of their pixels one after another
    (none for a data set that another program wrote)."""

    offsets: array[int]
    sizes: array[int]
    labels: array[int]
    digests: bytes


@dataclass
class _Open:
    """An open shard with its index. The index is dropped with it: at 36 bytes an image, indices of all shards would
    fill a loader's memory. The file is not mapped: a mapped file that is cut short kills the process."""

    path: Path
    file: BinaryIO
    index: _Index
    touched: float


class ShardReader:
    """The images of one split.

    It can be pickled and opens shards lazily, so it can be sent to loader workers as it is. Local shards are read in
    place; remote ones are downloaded to `cache_dir`, verified, and kept within `cache_bytes`. Each image is compared
    with its digest in the sidecar whenever it is read: if they differ, a shard on local disk is fetched again.

    Args:
        url: of the data set: a path or any fsspec URL.
        manifest: of that data set.
        split: name of the split.
        cache_dir: a folder on local disk, shared by the processes of a node; by default in the temporary folder.
        cache_bytes: bound for remote shards on local disk.

    Raises:
        DataError: there is no such split, or it has no samples.
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
        sizes = np.array(self.shard_sizes, np.int64)
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        channels, height, width = self.image_shape
        npy = manifest.encoding == "npy"
        self._decode = _DecodeNpy(_npy_header((height, width, channels))) if npy else _decode_png
        self._open: OrderedDict[int, _Open] = OrderedDict()

    @property
    def is_local(self) -> bool:
        """Whether shards are read in place, and none is fetched."""
        return storage.is_local(self.url)

    @property
    def shard_sizes(self) -> list[int]:
        """The number of samples of each shard, in manifest order."""
        return [s.samples for s in self.split.shards]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of every image."""
        return self.manifest.channels, self.manifest.resolution, self.manifest.resolution

    def __len__(self) -> int:
        return self.split.samples

    def __getitem__(self, index: int) -> Pixels:
        """Return image `index` of the split: uint8 (C, H, W).

        Raises:
            IndexError: the split has fewer images.
            DataError: its shard is missing or damaged; the message names it.
            StorageError: storage cannot be reached.
        """
        return self.read([index])[0]

    def read(self, indices: Iterable[int]) -> Pixels:
        """Return the images of the indices: uint8 (n, C, H, W). Raises as `reader[index]`."""
        wanted = np.fromiter(indices, np.int64)
        channels, height, width = self.image_shape
        pixels = np.empty((len(wanted), height, width, channels), np.uint8)
        self.read_into(pixels, wanted)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))

    def read_into(self, out: Pixels, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Read the images of the indices, (n,), into `out`, (n, H, W, C); return their classes, (n,), -1 for none.

        Raises as `reader[index]`.
        """
        numbers, rows = self.place(indices)
        labels = np.empty(len(indices), np.int64)
        for i, (number, row) in enumerate(zip(numbers.tolist(), rows.tolist(), strict=True)):
            shard = self._opened(number)
            if problem := self._read_image(shard, row, out[i]):
                shard = self._reopened(number, f"image {row} {problem}")
                if problem := self._read_image(shard, row, out[i]):
                    where = "" if self.is_local else f", in {shard.path}, which was fetched again"
                    raise DataError(f"shard {self.split.shards[number].name}: image {row} {problem}{where}")
            labels[i] = shard.index.labels[row]
        return labels

    def _read_image(self, shard: _Open, row: int, out: Pixels) -> str:
        """Read an image into `out`, (H, W, C), and check it; return what is wrong, or nothing."""
        index = shard.index
        try:
            self._decode(os.pread(shard.file.fileno(), index.sizes[row], index.offsets[row]), out)
        except OSError as e:
            return f"cannot be read ({e.strerror})"
        except (ValueError, RuntimeError) as e:  # PngError is a RuntimeError
            return f"cannot be decoded ({next(iter(str(e).splitlines()), type(e).__name__)})"
        if index.digests and image_digest(out) != index.digests[DIGEST_BYTES * row : DIGEST_BYTES * (row + 1)]:
            return "is not the one that was written"
        return ""

    def _reopened(self, number: int, problem: str) -> _Open:
        """Open shard `number` once more, of which an image was not as it should be.

        Raises:
            DataError: it is read in place, and its checksum is not the manifest's.
        """
        shard = self.split.shards[number]
        self._open.pop(number).file.close()
        if self.is_local:
            self.cache.forget(shard)
        else:
            self.cache.drop_damaged(shard)
        found = self._opened(number)
        _log.warning("shard %s: %s; it is read again", shard.name, problem)
        storage.count_faults(1)
        return found

    def place(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the numbers of the images' shards, and the images' numbers inside them; (n,) each.

        Raises:
            IndexError: the split has fewer images.
        """
        if outside := [i for i in indices.tolist() if not 0 <= i < len(self)]:
            raise IndexError(f"sample {outside[0]} of split '{self.split.name}', which has {len(self)}")
        numbers = np.searchsorted(self._ends, indices, side="right").astype(np.int64)
        return numbers, indices - self._starts[numbers]

    def has(self, number: int) -> bool:
        """Return whether shard `number` can be read without remote storage."""
        return self.is_local or self.cache.has(self.split.shards[number])

    def fetch(self, number: int) -> None:
        """Bring shard `number` and its sidecar to this machine; safe in any thread. Raises as `reader[index]`."""
        if not self.is_local:
            self.cache.sidecar(self.url, self.split.shards[number])
            self.cache.fetch(self.url, self.split.shards[number])

    def close(self) -> None:
        """Close all shards; the next read opens them again."""
        while self._open:
            self._open.popitem()[1].file.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _opened(self, number: int) -> _Open:
        """Return shard `number`, which is opened unless it is open."""
        remote = not self.is_local
        if number in self._open:
            self._open.move_to_end(number)
            found = self._open[number]
            if remote and time.monotonic() - found.touched > _TOUCH_EVERY:
                found.touched = time.monotonic()
                touch(found.path)
            return found
        index = self._read_index(number)
        for attempt in range(3):  # another process may evict the shard between fetch and open
            path = self._local_path(number)
            try:
                file = open(path, "rb", buffering=0)  # noqa: SIM115  # kept open
                break
            except OSError as e:
                if attempt == 2 or not isinstance(e, FileNotFoundError):
                    raise storage.StorageError(f"{path} cannot be opened: {e.strerror}") from None
        self._open[number] = _Open(path, file, index, time.monotonic())
        if remote:  # close evicted shards: only that frees their disk space
            for other in [n for n, o in self._open.items() if n != number and not o.path.exists()]:
                self._open.pop(other).file.close()
        while len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)[1].file.close()
        return self._open[number]

    def _local_path(self, number: int) -> Path:
        shard = self.split.shards[number]
        if not self.is_local:
            return self.cache.fetch(self.url, shard)
        path = Path(storage.join(self.url, shard.name))
        self.cache.verify_local(path, shard)
        return path

    def _read_index(self, number: int) -> _Index:
        shard = self.split.shards[number]
        sidecar = self.cache.sidecar(self.url, shard)
        if replace(sidecar.shard, sidecar_sha256=shard.sidecar_sha256) != shard:
            raise DataError(f"shard {shard.name}: its sidecar describes other bytes than the manifest")
        classes = len(self.manifest.classes)
        if wrong := [label for label in sidecar.labels if not -1 <= label < classes]:
            raise DataError(f"shard {shard.name}: its sidecar has label {wrong[0]}, but there are {classes} classes")
        try:
            digests = bytes.fromhex("".join(sidecar.digests))
        except ValueError:
            digests = b"-"
        if len(digests) not in (0, DIGEST_BYTES * len(sidecar.digests)):
            raise DataError(f"shard {shard.name}: its sidecar has digests of another kind")
        offsets, sizes, labels = (array("q", c) for c in (sidecar.offsets, sidecar.sizes, sidecar.labels))
        return _Index(offsets, sizes, labels, digests)


def _decode_png(data: bytes, out: Pixels) -> None:
    """Decode a PNG into `out`, (H, W, C)."""
    imagecodecs.png_decode(data, out=out)


@dataclass(frozen=True)
class _DecodeNpy:
    """Copy the pixels of a .npy file with that header into `out`, (H, W, C)."""

    header: bytes

    def __call__(self, data: bytes, out: Pixels) -> None:
        if not data.startswith(self.header) or len(data) != len(self.header) + out.size:
            raise ValueError(f"not a .npy file of uint8 {out.shape}")
        out.reshape(-1)[:] = np.frombuffer(data, np.uint8, offset=len(self.header))


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """Return the header that NumPy writes before a uint8 array of that shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()
