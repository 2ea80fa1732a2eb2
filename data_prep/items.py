"""What a source hands to the writer: items, and the ways in which their bytes or pixels are loaded.

Everything here is plain and picklable: items travel to worker processes, pixels do not. How bytes become pixels of
the data set is the business of `data_prep.pixels`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from eiwtrain import storage
from eiwtrain.data.manifest import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")

Loaded = bytes | Image.Image | npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]


class Loader(Protocol):
    """Loads an item: the bytes of an image file, or pixels, as an image or as uint8 (H, W, 3).

    Raises:
        DataError, StorageError: it cannot be read, which ends the job. What can be read and not decoded is a reject.
    """

    def __call__(self) -> Loaded: ...


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source.

    Attributes:
        label: index into the source's classes; -1 for none.
        source: where it comes from, in a name that does not depend on the machine.
        size: bytes of its encoded form: with the name it tells one state of the source from another (where all have one
            size, the plan looks at some of them).
        load: how to load it.
    """

    label: int
    source: str
    size: int
    load: Loader


@dataclass(frozen=True)
class Source:
    """All images of a source, by split, in an order that does not depend on the machine.

    Attributes:
        name: of the kind of source.
        splits: items by split. Any sequence: a large source can make its items when they are asked for.
        classes: class names, to which labels are indices.
        protocol: what tells figures on this data set from figures on others of its name, in a few words; shown
            beside every bits/dim. Empty where nothing needs to be told apart.
        box: (left, top, right, bottom) of the part of each image that is used at all, in its pixels.
        remote: whether loading crosses a network: then workers load ahead.
        params: what else the source does, for the manifest's preprocessing.
        notes: what the user should know of these images, a line each: printed, and not stored.
    """

    name: str
    splits: Mapping[str, Sequence[Item]]
    classes: tuple[str, ...] = ()
    protocol: str = ""
    box: Box | None = None
    remote: bool = False
    params: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FileImage:
    """An image file at any URL."""

    url: str

    def __call__(self) -> bytes:
        try:
            return storage.read_bytes(self.url)
        except (OSError, storage.StorageError) as e:
            raise _unreadable(self.url, e) from None


@dataclass(frozen=True, slots=True)
class RangeImage:
    """An image that lies uncompressed inside another file at any URL, as in a tar: read by its offset."""

    url: str
    offset: int
    size: int

    def __call__(self) -> bytes:
        try:
            return storage.read_range(self.url, self.offset, self.size)
        except (OSError, storage.StorageError) as e:
            raise _unreadable(self.url, e) from None


@dataclass(frozen=True, slots=True)
class Patch:
    """A square of a photograph, which is halved with a box filter first when `halve`."""

    path: str
    halve: bool
    left: int
    top: int
    side: int

    def __call__(self) -> Image.Image:
        return photograph(self.path, self.halve).crop(
            (self.left, self.top, self.left + self.side, self.top + self.side)
        )


@lru_cache(maxsize=8)
def photograph(path: str, halve: bool) -> Image.Image:
    """A photograph as RGB, halved with a box filter when `halve` (an odd last row or column is left out)."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    if not halve:
        return rgb
    width, height = rgb.width // 2, rgb.height // 2
    return rgb.crop((0, 0, 2 * width, 2 * height)).reduce(2)


def _unreadable(url: str, e: Exception) -> DataError:
    """A source that changes or breaks while it is read must not become rejects: another run would differ."""
    cause = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
    return DataError(f"source {url} cannot be read: {cause}")
