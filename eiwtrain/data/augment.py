"""Vary training images: mirror and shift them by amounts that belong to each sample's key, so anew in each epoch.

Not for held-out images, which stay as they are.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from eiwtrain.data.noise import Keys, coins, fractions

_SHARE = 0.04  # of the side: DenseFlow's padding, and of the padded side its greatest shift


def vary(pixels: npt.NDArray[np.uint8], keys: Keys, how: str) -> None:
    """Vary images in place, as the config's `data.augment` says.

    `eta` is the augmentation of DenseFlow's program (arXiv 2106.04627): mirror with probability 1/2, pad by copies of
    the edge, shift the padded image by whole pixels, and cut out the centre. No pixel gets a new colour, as
    interpolation would give it: a density model would learn that.

    Args:
        pixels: images, (n, H, W, C).
        keys: of their samples, (n,).
        how: none, flip or eta.
    """
    if how == "none":
        return
    turned = np.flatnonzero(coins(keys))
    pixels[turned] = pixels[turned, :, ::-1]
    if how == "eta":
        _, height, width, _ = pixels.shape
        down, right = shifts(keys, height, 0), shifts(keys, width, 1)
        for shift in {*zip(down.tolist(), right.tolist(), strict=True)} - {(0, 0)}:
            moved = np.flatnonzero((down == shift[0]) & (right == shift[1]))
            # what lies beyond the edge is the edge: the same as padding and cutting
            rows, columns = (np.clip(np.arange(n) - s, 0, n - 1) for n, s in zip((height, width), shift, strict=True))
            pixels[moved] = pixels[moved].take(rows, 1).take(columns, 2)


def shifts(keys: Keys, side: int, axis: int) -> npt.NDArray[np.int64]:
    """Return by how many pixels `eta` moves each image along an axis, (n,).

    As in DenseFlow's program it is a uniform number between minus and plus 4 % of the padded side, rounded: for 32
    pixels, -1, 0 or 1.
    """
    most = _SHARE * (side + 2 * math.ceil(_SHARE * side))
    return np.floor((2 * fractions(keys, axis) - 1) * most + 0.5).astype(np.int64)
