"""Pictures for people: titled panels of images in a grid. Not for drawing the images."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

MOST_TILES = 1024
"""The most images in a grid: more is a file for programs, not a picture for people."""
MOST_ABREAST = 64
"""The most images side by side, and one above the other."""
_COLUMNS = 8
_CLASS_COLUMNS = 16
_TILE = 64  # pixels an image is enlarged to at least, so that small ones can be seen
_GAP = 2
_TITLE = 20
_FONT = 14
_LONGEST = 24  # characters of a row's title that are shown
_BETWEEN = 14  # pixels between panels that stand side by side


def grid(
    panels: Sequence[tuple[str, Tensor]],
    columns: int | None = None,
    row_titles: Sequence[str] = (),
    side_by_side: bool = False,
) -> Image.Image:
    """Draw titled panels of uint8 images (n, 3, H, W), one above the other or side by side. Images keep their pixels:
    small ones are enlarged by a whole factor.

    Args:
        columns: images in a row; by default `columns_for`.
        row_titles: title of each row, on the left, the same for all panels.
    """
    font = ImageFont.load_default(_FONT)
    shown = [t if len(t) <= _LONGEST else t[: _LONGEST - 1] + "…" for t in row_titles]
    margin = math.ceil(max(font.getlength(t) for t in shown)) + 3 * _GAP if shown else 0
    tiles = [_tiles(images, columns or columns_for(len(images), side_by_side)) for _, images in panels]
    widths = [
        max(t.width, math.ceil(font.getlength(title)) + 3 * _GAP) for t, (title, _) in zip(tiles, panels, strict=True)
    ]
    heights = [_TITLE + t.height for t in tiles]
    if side_by_side:
        size = margin + sum(widths) + _BETWEEN * (len(panels) - 1), max(heights)
    else:
        size = margin + max(widths), sum(heights)
    picture = Image.new("RGB", size, "white")
    draw, x, y = ImageDraw.Draw(picture), margin, 0
    for (title, images), panel, width, height in zip(panels, tiles, widths, heights, strict=True):
        draw.text((x + _GAP, y + _TITLE // 2), title, fill="black", font=font, anchor="lm")
        picture.paste(panel, (x, y + _TITLE))
        if x == margin:
            step = _scale(images) * images.shape[2] + _GAP
            for row, text in enumerate(shown):
                middle = y + _TITLE + _GAP + row * step + step // 2
                draw.text((margin - 2 * _GAP, middle), text, fill="black", font=font, anchor="rm")
        x, y = (x + width + _BETWEEN, y) if side_by_side else (x, y + height)
    return picture


def columns_for(n: int, side_by_side: bool = False) -> int:
    """Return the images in a row of a panel of n: eight for up to 64 images; else, or beside other panels, a square."""
    square = math.ceil(math.sqrt(n))
    return square if side_by_side or n > _COLUMNS**2 else min(_COLUMNS, n)


def rows_by_class(n: int, classes: int) -> tuple[int, int]:
    """Return (columns, rows of a class) for n images with rows for each class: one row for up to 16 images."""
    each = -(-n // classes)
    rows = -(-each // _CLASS_COLUMNS)
    return -(-each // rows), rows


def by_class(images: Tensor, classes: int) -> Tensor:
    """Reorder images whose classes come in turn, (n, C, H, W), into rows of one class each; rows that a class does not
    fill get white images."""
    import torch

    columns, rows = rows_by_class(len(images), classes)
    panel = torch.full((classes, columns * rows, *images.shape[1:]), 255, dtype=torch.uint8)
    for number in range(classes):
        own = images[number::classes]
        panel[number, : len(own)] = own
    return panel.flatten(0, 1)


def check_size(columns: int, rows: int) -> None:
    """Raise ValueError for a grid that is too large to look at: see `MOST_TILES`, `MOST_ABREAST`."""
    if columns * rows > MOST_TILES or max(columns, rows) > MOST_ABREAST:
        raise ValueError(
            f"a grid {columns:,} images wide and {rows:,} high is too large to look at; it has at most {MOST_TILES:,}, "
            f"{MOST_ABREAST} a side"
        )


def png(image: Image.Image) -> bytes:
    """Return the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _tiles(images: Tensor, columns: int) -> Image.Image:
    n, _, height, width = images.shape
    scale = _scale(images)
    step_x, step_y = width * scale + _GAP, height * scale + _GAP
    tiles = Image.new("RGB", (columns * step_x + _GAP, -(-n // columns) * step_y + _GAP), "white")
    for i, image in enumerate(images.numpy()):
        tile = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        tile = tile.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        tiles.paste(tile, (_GAP + (i % columns) * step_x, _GAP + (i // columns) * step_y))
    return tiles


def _scale(images: Tensor) -> int:
    """Return the whole factor that enlarges the longer side to at least a tile's."""
    return -(-_TILE // max(images.shape[2:]))
