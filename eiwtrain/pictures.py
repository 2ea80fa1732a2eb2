"""Pictures for people: titled panels of images in a grid. Not for making the images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

_COLUMNS = 8
_TILE = 64  # pixels an image is enlarged to at least, so that small ones can be seen
_GAP = 2
_TITLE = 18


def grid(panels: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Titled panels of uint8 images (n, C, H, W), eight a row, one above the other."""
    rows = [(title, _tiles(images)) for title, images in panels]
    width = max(tiles.width for _, tiles in rows)
    height = sum(_TITLE + tiles.height for _, tiles in rows)
    picture = Image.new("RGB", (width, height), "white")
    draw, y = ImageDraw.Draw(picture), 0
    for title, tiles in rows:
        draw.text((_GAP + 2, y + 3), title, fill="black")
        picture.paste(tiles, (0, y + _TITLE))
        y += _TITLE + tiles.height
    return picture


def _tiles(images: Tensor) -> Image.Image:
    n, _, height, width = images.shape
    scale = max(1, _TILE // max(height, width))
    columns = min(_COLUMNS, n)
    step_x, step_y = width * scale + _GAP, height * scale + _GAP
    tiles = Image.new("RGB", (columns * step_x + _GAP, -(-n // columns) * step_y + _GAP), "white")
    for i, image in enumerate(images.numpy()):
        tile = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        tile = tile.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        tiles.paste(tile, (_GAP + (i % columns) * step_x, _GAP + (i // columns) * step_y))
    return tiles
