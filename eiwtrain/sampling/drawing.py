"""Images from a flow: samples, reconstructions, and one picture of both. Not for how pictures look (`pictures`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from eiwtrain import data, flow
from eiwtrain.sampling import pictures
from eiwtrain.sampling.series import decode, encode, render, samples


def sample(model: flow.EIWFlow, n: int, temperature: float, seed: int) -> Tensor:
    """n images, uint8 (n, C, H, W), of a seed: the first ones are the same whatever n, and their latents the same on
    every device. A model of classes gives them in turn."""
    return torch.cat(list(render(model, samples(model, n, seed), temperature)))


def reconstruct(model: flow.EIWFlow, batch: data.Batch) -> Tensor:
    """The images of a batch through the flow and back, uint8 (n, C, H, W)."""
    return decode(model, *encode(model, batch))


def overview(model: flow.EIWFlow, batch: data.Batch, n: int, temperatures: Sequence[float], seed: int) -> Image.Image:
    """One picture: n samples at each temperature, then held-out images and their reconstructions."""
    panels = [(f"samples, temperature {t:g}", sample(model, n, t, seed)) for t in temperatures]
    shift = 8 - model.config.n_bits
    panels.append(("held-out images", (batch.images >> shift) << shift))
    panels.append(("their reconstructions", reconstruct(model, batch)))
    return pictures.grid(panels)
