"""Bits/dim of common lossless coders: the yardsticks that are printed beside every bits/dim of a model.

Not for coding images with a flow.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

CODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {"optimize": True}),
    "webp": ("WEBP", {"lossless": True, "quality": 100, "method": 6}),
}
"""Pillow's format and its options for the smallest lossless file."""
TITLES = {"png": "PNG", "webp": "WebP"}

_AT_A_TIME = 256  # images in memory


@dataclass(frozen=True)
class Yardsticks:
    """Bits/dim that lossless coders need for the first images of a split."""

    images: int
    bits_per_dim: dict[str, float]
    """Mean over the images, by coder."""


def bits(image: np.ndarray, coder: str, n_bits: int = 8) -> int:
    """Return the bits of the file of one image; its header counts, as it is part of what an image costs.

    Args:
        image: uint8 (3, H, W).
        coder: one of `CODERS`.
        n_bits: bits per channel that are kept before encoding, as the model sees them.
    """
    form, options = CODERS[coder]
    file = io.BytesIO()
    kept = np.ascontiguousarray((image >> (8 - n_bits)).transpose(1, 2, 0))
    Image.fromarray(kept).save(file, form, **options)
    return 8 * file.tell()


def image_bits_per_dim(images: Sequence[np.ndarray], n_bits: int = 8) -> dict[str, npt.NDArray[np.float64]]:
    """Return bits per dimension of the file of each image, (n,), by coder."""
    with ThreadPoolExecutor() as pool:  # WebP takes some 30 ms an image of 32x32, outside the interpreter's lock
        files = {c: pool.map(lambda image, c=c: bits(image, c, n_bits) / image.size, images) for c in CODERS}
        return {coder: np.array(list(sizes)) for coder, sizes in files.items()}


def bits_per_dim(images: Iterable[np.ndarray], n_bits: int = 8) -> dict[str, float]:
    """Return mean bits per dimension of the files of single images, all of one size, by coder."""
    parts = [image_bits_per_dim(some, n_bits) for some in _in_parts(iter(images))]
    return {coder: float(np.concatenate([part[coder] for part in parts]).mean()) for coder in CODERS}


def _in_parts(images: Iterator[np.ndarray]) -> Iterator[list[np.ndarray]]:
    while some := list(islice(images, _AT_A_TIME)):
        yield some
