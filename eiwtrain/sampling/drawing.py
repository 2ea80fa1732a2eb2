"""Images from a flow: samples, reconstructions, and one picture of both. Not for how pictures look (`pictures`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from eiwtrain import data, flow
from eiwtrain.sampling import pictures
from eiwtrain.sampling.series import Series, decode, encode, render, samples


def sample(model: flow.EIWFlow, n: int, temperature: float, seed: int) -> Tensor:
    """Draw n images of a seed, uint8 (n, C, H, W).

    The first ones are the same whatever n is, and their latents are the same on every device. A model of classes gives
    its classes in turn."""
    return torch.cat(list(render(model, samples(model, n, seed), temperature)))


def reconstruct(model: flow.EIWFlow, batch: data.Batch) -> Tensor:
    """Return the images of a batch after the way through the flow and back, uint8 (n, C, H, W)."""
    return decode(model, *encode(model, batch))


def overview(model: flow.EIWFlow, batch: data.Batch, n: int, temperatures: Sequence[float], seed: int) -> Image.Image:
    """Draw one picture: n samples at each temperature, then held-out images and their reconstructions."""
    panels = [(f"samples, temperature {t:g}", sample(model, n, t, seed)) for t in temperatures]
    shift = 8 - model.config.n_bits
    panels.append(("held-out images", (batch.images >> shift) << shift))
    panels.append(("their reconstructions", reconstruct(model, batch)))
    return pictures.grid(panels)


def rows_between(panels: Sequence[tuple[str, Tensor]], series: Series, steps: int, names: Sequence[str]) -> Image.Image:
    """Return a picture of a series of rows from one image to another, of `steps` images each.

    Args:
        panels: title and images, uint8 (n, 3, H, W), at each temperature.
        names: of the model's classes.
    """
    rows = [] if series.labels is None else [names[number] for number in series.labels[::steps].tolist()]
    return pictures.grid(panels, steps, rows, side_by_side=True)


def rows_of_classes(panels: Sequence[tuple[str, Tensor]], columns: int, classes: Sequence[str]) -> Image.Image:
    """Return a picture of samples, with rows of their own for each class.

    Args:
        panels: title and images, uint8 (n, 3, H, W), at each temperature; classes come in turn.
        classes: names of the classes of the images; empty: rows are filled as images come.
    """
    if not classes:
        return pictures.grid(panels, columns, side_by_side=True)
    spare = [""] * (pictures.rows_by_class(len(panels[0][1]), len(classes))[1] - 1)
    titles = [title for name in classes for title in (name, *spare)]
    arranged = [(title, pictures.by_class(images, len(classes))) for title, images in panels]
    return pictures.grid(arranged, columns, titles, side_by_side=True)
