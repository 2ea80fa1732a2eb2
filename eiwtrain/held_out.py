"""The held-out split during training: the score of the averaged weights, and pictures of what they make of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from PIL.Image import Image

from eiwtrain import data, evaluate, flow, sample, yardsticks
from eiwtrain.config import Config
from eiwtrain.state import TrainState

_SEED = 0  # of noise and of samples: the same for every run, so that runs compare


class HeldOut:
    """What is measured and drawn on one rank. Only `score` is collective.

    Args:
        reader: of the held-out split.
        micro_batch: rows of a batch.
    """

    def __init__(
        self, config: Config, state: TrainState, reader: data.ShardReader, device: torch.device, micro_batch: int
    ) -> None:
        self.config, self.state, self.reader, self.device = config, state, reader, device
        self.micro_batch = micro_batch

    def score(self, stopped: Callable[[], bool]) -> evaluate.Score | None:
        """Bits/dim at this step; None if stopped meanwhile. Collective."""
        batches = data.eval_batches(
            self.reader,
            images=self.config.eval.images,
            seed=_SEED,
            micro_batch=self.micro_batch,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
        )
        return evaluate.score(self.state.averaged, batches, stopped)

    def drift(self) -> float:
        """Relative error of images through the flow and back."""
        images, noise, labels = data.flow_inputs(self._first(), self.config.model.classes, self.device)
        x = flow.dequantize(images, noise, self.config.model.n_bits)
        return self.state.averaged.drift(x, labels)

    def overview(self) -> Image:
        """Samples, and images with their reconstructions."""
        e = self.config.eval
        return sample.overview(self.state.averaged, self._first(), e.samples, e.temperatures, _SEED)

    def yardsticks(self, images: int) -> dict[str, float]:
        """What lossless coders need for the first so many images, bits/dim."""
        return yardsticks.bits_per_dim((self.reader[i] for i in range(images)), self.config.model.n_bits)

    def _first(self) -> data.Batch:
        return data.first_batch(self.reader, self.config.eval.samples, _SEED)
