"""An exported flow as MLflow calls it: uint8 images to bits per dimension. Travels with the model, beside a copy of
`eiwtrain.flow`, so that neither loading nor serving needs eiwtrain.

Not for the other direction: samples come of `eiwtrain.sample`, or of the flow itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..flow import EIWFlow, bits_per_dim, load

_BATCH = 64  # images at once


@contextlib.contextmanager
def _exact_float32() -> Iterator[None]:
    """Keep cuDNN from rounding float32 to TensorFloat-32, its default, and leave the program's setting as it was."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class Scorer:
    """What `mlflow.pyfunc.load_model` wraps."""

    def __init__(self, flow: EIWFlow) -> None:
        self.flow = flow

    @torch.no_grad()
    @_exact_float32()
    def predict(self, images: Any, params: dict[str, Any] | None = None) -> npt.NDArray[np.float32]:
        """Bits per dimension of each image, float32 (n,): what the model needs to code it, lower is likelier.

        The dequantization noise of an image comes of `seed` and its own pixels, so that it scores the same, up to
        rounding, at any place of any batch.

        Args:
            images: uint8 (n, H, W, C).
            params: `draws` of noise an image (1; more give the tighter importance-weighted bound), the `seed` of the
                noise (0), and of a class-conditional model `labels`, a class for each image.

        Raises:
            ValueError: for images of another type or shape, no draws, labels that are missing or out of range.
        """
        pixels, params = self._checked(images), params or {}
        draws, seed = int(params.get("draws", 1)), int(params.get("seed", 0))
        if draws < 1:
            raise ValueError(f"draws: {draws}; give at least 1")
        labels = self._labels(params.get("labels"), len(pixels))
        config, device = self.flow.config, next(self.flow.parameters()).device
        scores = [np.empty(0, np.float32)]
        for start in range(0, len(pixels), _BATCH):
            some = pixels[start : start + _BATCH]
            batch = torch.from_numpy(np.ascontiguousarray(some.transpose(0, 3, 1, 2))).to(device)
            of_batch = None if labels is None else labels[start : start + _BATCH].to(device)
            bound = self.flow.iwbo(batch, _noises(some, draws, seed, device), of_batch)
            scores.append(bits_per_dim(bound, config.dims, config.n_bits).float().cpu().numpy())
        return np.concatenate(scores)

    def _checked(self, images: Any) -> npt.NDArray[np.uint8]:
        channels, height, width = self.flow.config.image_shape
        array = np.asarray(images)
        if array.dtype != np.uint8 or array.shape[1:] != (height, width, channels):
            raise ValueError(
                f"images of type {array.dtype} and shape {array.shape}; the model takes uint8 "
                f"(n, {height}, {width}, {channels})"
            )
        return array

    def _labels(self, given: Any, n: int) -> Tensor | None:
        classes = self.flow.config.classes
        if not classes:
            return None
        labels = torch.as_tensor([] if given is None else given, dtype=torch.int64)
        if labels.shape != (n,) or bool(((labels < 0) | (labels >= classes)).any()):
            raise ValueError(f"labels: the model takes a class from 0 to {classes - 1} for each of {n} images")
        return labels


def _load_pyfunc(path: str) -> Scorer:
    """Called by MLflow with the model's folder."""
    device = os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    return Scorer(load(path).to(device))


def _noises(images: npt.NDArray[np.uint8], draws: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """`draws` times uniform noise in [0, 1) for images (n, H, W, C): float32 (n, C, H, W)."""
    n, height, width, channels = images.shape
    digests = [hashlib.sha256(np.ascontiguousarray(image).data) for image in images]
    generator = torch.Generator()
    for draw in range(draws):
        noise = torch.empty(n, channels, height, width)
        for row, digest in zip(noise, digests, strict=True):
            own = digest.copy()
            own.update(f"{seed} {draw}".encode())
            generator.manual_seed(int.from_bytes(own.digest()[:8], "big", signed=True))
            torch.rand(row.shape, generator=generator, out=row)
        yield noise.to(device)
