"""Figures of numbers, as images. Not for grids of images (`eiwtrain.sampling.pictures`).

Drawn by matplotlib's objects, never by pyplot, whose global state has no place in a library.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 120


def entropy_by_level(entropy: Tensor, title: str) -> Image.Image:
    """Plot, level by level, the entropy of what leaves the flow and of what stays; the shuffle is to separate the two.

    Args:
        entropy: (levels, 2), nats per dimension, as `EIWFlow` returns it; NaN where nothing stays.
        title: title of the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    levels = range(len(entropy))
    for column, name, marker in ((0, "leaves", "o"), (1, "stays", "s")):
        axes.plot(levels, entropy[:, column].tolist(), marker=marker, label=name, markersize=7)
    for level, pair in enumerate(entropy.tolist()):
        for value, other in (pair, pair[::-1]):
            below = value < other
            if math.isfinite(value):
                axes.annotate(
                    f"{value:.2f}", (level, value), (0, -14 if below else 7), textcoords="offset points", ha="center"
                )
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("level (0: nearest to the image)")
    axes.set_ylabel("entropy proxy, nats per dimension")
    axes.set_xticks(list(levels))
    axes.margins(x=0.12, y=0.2)
    axes.grid(alpha=0.3)
    axes.legend()
    return to_image(figure)


def to_image(figure: Figure) -> Image.Image:
    """Return a figure as an RGB image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
