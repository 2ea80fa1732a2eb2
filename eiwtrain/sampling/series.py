"""Series of images to decode: samples of a seed, and ways from one image to another, each image by its number.

Not for pictures or files of the images (`eiwtrain.sampling.drawing`, `image_sets`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eiwtrain import data, flow
from eiwtrain.sampling import BATCH, latents


@dataclass(frozen=True)
class Series:
    """Images to decode, each by its number.

    Attributes:
        n: number of images.
        latents: function of numbers, int64 (b,), that returns their latents, (b, D), at temperature 1.
        labels: int64 (n,), if the model has classes.
    """

    n: int
    latents: Callable[[Tensor], Tensor]
    labels: Tensor | None = None


def samples(model: flow.EIWFlow, n: int, seed: int, classes: Sequence[int] = ()) -> Series:
    """Return samples number 0 to n - 1 of a seed, which do not depend on n.

    Args:
        classes: of a model that has classes: the ones to draw, in turn; by default all.
    """
    return Series(
        n,
        lambda numbers: latents.draw(seed, numbers, latents.dims_of(model.latent_shapes)),
        _in_turn(model, n, classes),
    )


def between_samples(model: flow.EIWFlow, rows: int, steps: int, seed: int, classes: Sequence[int] = ()) -> Series:
    """Return rows of `steps` images each, on the arc (`latents.slerp`) from sample 2 r of a seed to sample 2 r + 1.

    Both ends of a row have one class, since nothing lies between two labels; rows take classes in turn.
    """

    def along(numbers: Tensor) -> Tensor:
        row, t = _places(numbers, steps)
        a, b = (latents.draw(seed, 2 * row + end, latents.dims_of(model.latent_shapes)) for end in (0, 1))
        return latents.slerp(a, b, t)

    labels = _in_turn(model, rows, classes)
    return Series(rows * steps, along, labels if labels is None else labels.repeat_interleave(steps))


def between_images(model: flow.EIWFlow, pairs: data.Batch, steps: int, batch: int = BATCH) -> Series:
    """Return rows of `steps` images each, on the arc from image 2 r of `pairs` to image 2 r + 1. The ends of a row are
    reconstructions of the images."""
    begins = range(0, len(pairs.images), batch)
    of_ends = torch.cat([encode(model, data.Batch(*(t[i : i + batch] for t in pairs)))[0].cpu() for i in begins])

    def along(numbers: Tensor) -> Tensor:
        row, t = _places(numbers, steps)
        return latents.slerp(of_ends[2 * row], of_ends[2 * row + 1], t)

    labels = pairs.labels[::2].repeat_interleave(steps) if model.config.classes else None
    return Series(len(pairs.images) // 2 * steps, along, labels)


def pairs_of(reader: data.ShardReader, n: int, classes: int, seed: int) -> data.Batch:
    """Return the first n pairs of images of a split, (2 n) rows with their noise; for a model of classes, both images
    of a pair have one class.

    Raises:
        ValueError: there are fewer pairs.
    """
    rows: list[list[Tensor]] = []
    waiting: dict[int, list[Tensor]] = {}
    for batch in data.eval_batches(reader, images=len(reader), seed=seed, micro_batch=min(BATCH, len(reader))):
        for row in map(list, zip(*batch, strict=True)):
            image = data.Batch(*row)
            if image.indices < 0:
                continue
            label = int(image.labels) if classes else 0
            if label not in waiting:
                waiting[label] = row
                continue
            rows += [waiting.pop(label), row]
            if len(rows) == 2 * n:
                return data.Batch(*map(torch.stack, zip(*rows, strict=True)))
    alike = " of one class each" if classes else ""
    raise ValueError(f"--n: {n} pairs of images{alike} to go between, and the split has {len(rows) // 2}")


def render(model: flow.EIWFlow, series: Series, temperature: float = 1.0, batch: int = BATCH) -> Iterator[Tensor]:
    """Decode the images of a series, in batches: uint8 (b, C, H, W), on the CPU.

    Another batch size changes them by rounding only, since matrix products of another size round differently: by one
    level, at rare pixels.
    """
    for begin in range(0, series.n, batch):
        numbers = torch.arange(begin, min(begin + batch, series.n))
        labels = None if series.labels is None else series.labels[numbers]
        yield decode(model, series.latents(numbers) * temperature, labels)


@torch.no_grad()
def encode(model: flow.EIWFlow, batch: data.Batch) -> tuple[Tensor, Tensor | None]:
    """Return the latents of a batch's images, (n, D), and their labels if the model has classes, on its device."""
    images, noise, labels = data.flow_inputs(batch, model.config, next(model.parameters()).device)
    x, _ = model.dequantize(images, noise)
    return latents.join(model.encode(x, labels)[0]), labels


@torch.no_grad()
def decode(model: flow.EIWFlow, z: Tensor, labels: Tensor | None) -> Tensor:
    """Return the images of latents, uint8 (n, C, H, W), on the CPU; the inverse of `encode`."""
    device = next(model.parameters()).device
    labels = labels if labels is None else labels.to(device)
    return model.to_images(model.decode(latents.split(z.to(device), model.latent_shapes), labels)).cpu()


def _in_turn(model: flow.EIWFlow, n: int, classes: Sequence[int]) -> Tensor | None:
    """Return the labels of n images, int64 (n,), or None for a model without classes."""
    if not model.config.classes:
        return None
    chosen = torch.tensor(classes or range(model.config.classes))
    return chosen[torch.arange(n) % len(chosen)]


def _places(numbers: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the row of images that are numbered along rows, and the place in it, 0 to 1."""
    return numbers // steps, numbers % steps / (steps - 1)
