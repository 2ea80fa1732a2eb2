"""What lossless coders that everybody has need for images: the yardsticks beside every bits/dim of a model."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

CODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {"optimize": True}),
    "webp": ("WEBP", {"lossless": True, "quality": 100, "method": 6}),
}
"""Pillow's format and its options for the smallest lossless file."""


def bits(image: np.ndarray, coder: str, n_bits: int = 8) -> int:
    """Bits of the file of one image; its header counts, as it is part of what an image costs.

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


def bits_per_dim(images: Iterable[np.ndarray], n_bits: int = 8) -> dict[str, float]:
    """Bits per dimension of the files of single images, by coder, over all images."""
    total, dims = dict.fromkeys(CODERS, 0), 0
    for image in images:
        dims += image.size
        for coder in CODERS:
            total[coder] += bits(image, coder, n_bits)
    return {coder: n / dims for coder, n in total.items()}
