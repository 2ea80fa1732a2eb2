"""What a source hands to the writer: items, and the ways in which the pixels of an item are loaded.

Everything here is plain and picklable: items travel to worker processes, pixels do not.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, BinaryIO, Protocol

from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")


class Loader(Protocol):
    """Loads the pixels of one item; raises OSError or ValueError where they cannot be decoded."""

    def __call__(self) -> Image.Image: ...


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source.

    Attributes:
        label: index into the source's classes; -1 for none.
        source: where it comes from, in a name that does not depend on the machine.
        size: bytes of its encoded form: with the name it tells one state of the source from another.
        load: how to load the pixels.
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
        params: what the source does to pixels, for the manifest's preprocessing.
    """

    name: str
    splits: Mapping[str, Sequence[Item]]
    classes: tuple[str, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FileImage:
    """An image file."""

    path: str

    def __call__(self) -> Image.Image:
        return Image.open(self.path)


@dataclass(frozen=True, slots=True)
class TarImage:
    """An image inside an uncompressed tar, read by its offset."""

    path: str
    offset: int
    size: int

    def __call__(self) -> Image.Image:
        tar = _opened(self.path)
        tar.seek(self.offset)
        return Image.open(io.BytesIO(tar.read(self.size)))


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


@lru_cache(maxsize=4)
def _opened(path: str) -> BinaryIO:
    return open(path, "rb")
