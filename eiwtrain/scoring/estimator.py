"""The name of the estimator behind a figure of bits/dim. Not for computing it (`eiwtrain.scoring.scores`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eiwtrain.flow import FlowConfig


@dataclass(frozen=True)
class Estimator:
    """What a figure of bits/dim is: a bound over all noise that the flow adds to an image, so never its exact value.

    One draw gives the evidence lower bound of the log-likelihood (ELBO), also where the noise is uniform (arXiv
    1511.01844, section 3.1); k draws the importance-weighted one (arXiv 1509.00519), which is tighter.

    Attributes:
        name: "ELBO" or "IWBO(k)".
        draws: k, the draws of all noise for each image.
        noise: which noise is drawn.
    """

    name: str
    draws: int
    noise: str

    def __str__(self) -> str:
        draws = "one draw" if self.draws == 1 else f"{self.draws:,} draws"
        return f"{self.name}, {draws} of {self.noise}"


def estimator_of(config: FlowConfig, draws: int = 1) -> Estimator:
    """Return what a flow of this config computes for pixels from `draws` draws of its noise."""
    noise = f"{config.dequantization} dequantization noise"
    if math.prod(config.noise_shape) > config.dims:
        noise += " and noise that joins on the way"
    return Estimator("ELBO" if draws == 1 else f"IWBO({draws})", draws, noise)
