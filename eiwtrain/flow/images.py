"""Conversion between 8-bit images and the reals that a flow models, and the unit of its result.

Not for reading images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dequantize(images: Tensor, noise: Tensor, n_bits: int = 8) -> Tensor:
    """Dequantize uniformly: return (v + u) / 2^n - 1/2 in [-1/2, 1/2), of the dtype of the noise.

    v is the image's value with all but its `n_bits` highest bits dropped. The average of log p(x) over the noise, with
    the scale that `bits_per_dim` applies, is a lower bound of log P(v) (arXiv 1511.01844, section 3.1).

    Args:
        images: uint8, any shape.
        noise: u, uniform in [0, 1), same shape, float32 or float64.

    Raises:
        ValueError: for images that are not uint8, or noise of another shape.
    """
    check_pixels(images, noise)
    v = (images >> (8 - n_bits)).to(noise.dtype)
    upper = (v + 1) / 2**n_bits - 0.5
    # Rounding may carry v + u into the next value; to give the pixel back, x stays below.
    below = torch.nextafter(upper, torch.full_like(upper, -1.0))
    return torch.minimum((v + noise) / 2**n_bits - 0.5, below)


def check_pixels(images: Tensor, noise: Tensor) -> None:
    """Raise ValueError unless the images are uint8, and the noise is of the same shape."""
    if images.dtype != torch.uint8:
        raise ValueError(f"dequantize takes uint8 images, not {images.dtype}")
    if images.shape != noise.shape:
        raise ValueError(f"noise of shape {tuple(noise.shape)} for images of shape {tuple(images.shape)}")


def quantize(x: Tensor, n_bits: int = 8) -> Tensor:
    """Invert `dequantize`: reals to uint8, clamped; the low 8 - `n_bits` bits are zero. NaN is black."""
    # Scaled before the half is added, which is exact in floating point; the other way round is not.
    v = torch.nan_to_num(x * 2**n_bits, nan=-math.inf).floor() + 2 ** (n_bits - 1)
    return v.clamp(0, 2**n_bits - 1).to(torch.uint8) << (8 - n_bits)


def bits_per_dim(log_prob: Tensor, dims: int, n_bits: int = 8) -> Tensor:
    """Return bits per dimension of dequantized images: n - log p(x) / (D ln 2).

    Args:
        log_prob: log p(x) of `dequantize`d images, in nats, any shape.
        dims: D = C * H * W.
    """
    return n_bits - log_prob / (dims * math.log(2))
