"""What a source hands to the writer: items, and how their bytes or pixels are loaded.

Everything here is plain and picklable: items are sent to worker processes, pixels are not. Not for how bytes become
pixels of the data set: that is in `data_prep.pixels`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt
from PIL import Image

from eiwtrain.data.image_formats import image_formats, image_suffixes
from eiwtrain.data.left_out import LeftOut

IMAGE_SUFFIXES = image_suffixes()

Loaded = bytes | Image.Image | npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]


class Loader(Protocol):
    """Loads an item: the bytes of an image file, or pixels, as an image or as uint8 (H, W, 3).

    Raises:
        DataError, StorageError: it cannot be read, which stops the job. An item that can be read but not decoded is
            a reject.
    """

    def __call__(self) -> Loaded: ...


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source.

    Attributes:
        label: index into the source's classes; -1 for none.
        source: where it comes from; a name that does not depend on the machine.
        size: bytes of its encoded form. Names and sizes show whether the source has changed (if all items have one
            size, the plan also reads some of them).
        load: loads it.
        flaw: why it is a reject without being loaded; "" for an image that is tried.
    """

    label: int
    source: str
    size: int
    load: Loader
    flaw: str = ""


@dataclass(frozen=True)
class Source:
    """All images of a source, by split, in an order that does not depend on the machine.

    Attributes:
        name: of the kind of source.
        splits: items by split. Any sequence: a large source can make its items when they are asked for.
        classes: class names, to which labels are indices.
        protocol: a few words that distinguish figures on this data set from figures on others of its name; shown
            beside every bits/dim. Empty if there is nothing to distinguish.
        box: (left, top, right, bottom) of the part of each image that is used, in its pixels.
        remote: whether loading crosses a network; if so, workers load ahead.
        params: what else the source does, for the manifest's preprocessing.
        notes: what the user should know of these images, a line each: printed, and not stored.
        left_out: files that are no images of the source, for the manifest.
    """

    name: str
    splits: Mapping[str, Sequence[Item]]
    classes: tuple[str, ...] = ()
    protocol: str = ""
    box: Box | None = None
    remote: bool = False
    params: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


class LazyItems(Sequence[Item]):
    """Items that are made when they are asked for, so that millions of them take no memory.

    Args:
        make: makes the item of a number.
        numbers: of the items in this sequence, in its order.
    """

    def __init__(self, make: Callable[[int], Item], numbers: Sequence[int] | npt.NDArray[np.int64]) -> None:
        self._make, self._numbers = make, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> LazyItems: ...
    def __getitem__(self, index: int | slice) -> Item | LazyItems:
        if isinstance(index, slice):
            return LazyItems(self._make, self._numbers[index])
        return self._make(int(self._numbers[index]))


def join_items(parts: Sequence[Sequence[Item]]) -> LazyItems:
    """Return the items of several sequences, one after the other."""
    ends = list(accumulate(len(part) for part in parts))
    return LazyItems(partial(_item_of, parts, ends), range(ends[-1] if ends else 0))


def _item_of(parts: Sequence[Sequence[Item]], ends: Sequence[int], number: int) -> Item:
    part = bisect_right(ends, number)
    return parts[part][number - ends[part]]  # counted from the end of that part


@dataclass(frozen=True, slots=True)
class Patch:
    """Loads a square of a photograph, which is first halved with a box filter if `halve`."""

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
    """Load a photograph as RGB, halved with a box filter if `halve` (an odd last row or column is left out)."""
    with Image.open(path, formats=image_formats()) as image:
        rgb = image.convert("RGB")
    if not halve:
        return rgb
    width, height = rgb.width // 2, rgb.height // 2
    return rgb.crop((0, 0, 2 * width, 2 * height)).reduce(2)
