"""The held-out split during training: scores, pictures and drift of the averaged weights. Not for other data sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
import torch.distributed as dist
from PIL.Image import Image
from torch import Tensor

from eiwtrain import data
from eiwtrain.config import Config
from eiwtrain.sampling import drawing, pictures, plots
from eiwtrain.scoring import yardsticks
from eiwtrain.scoring.scores import Score, score
from eiwtrain.tracking import Tracker, curves
from eiwtrain.train import report
from eiwtrain.train.state import TrainState

_SEED = 0  # of noise and samples: the same for every run, so that runs can be compared
_ENTROPY_IMAGES = 64
_YARDSTICK_PIXELS = 512 * 32 * 32  # WebP takes about 12 s of one core for these


class HeldOut:
    """Measures and draws on one rank. Only `score` is collective.

    Args:
        reader: reader of the held-out split.
        micro_batch: rows of a batch.
    """

    def __init__(
        self, config: Config, state: TrainState, reader: data.ShardReader, device: torch.device, micro_batch: int
    ) -> None:
        self.config, self.state, self.reader, self.device = config, state, reader, device
        self.micro_batch = micro_batch

    def score(self, stopped: Callable[[], bool]) -> Score | None:
        """Return the score at this step; None if stopped meanwhile. Collective."""
        batches = data.eval_batches(
            self.reader,
            images=self.config.eval.images,
            seed=_SEED,
            micro_batch=self.micro_batch,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
        )
        return score(self.state.averaged, batches, stopped)

    def show(
        self,
        score: Score,
        tracker: Tracker,
        note: Callable[[str], None],
        may_continue: Callable[[str], bool],
    ) -> None:
        """Log an evaluation, with the yardsticks each time, as lines to compare with; then draw.

        Args:
            note: prints a line for the user.
            may_continue: returns whether to continue; called before each picture, with a name of what comes next.
        """
        state = self.state
        values = {curves.HELD_OUT_BITS_PER_DIM: score.bits_per_dim, curves.HELD_OUT_ERROR: score.standard_error}
        values |= {curves.CODER_BITS_PER_DIM[coder]: bits for coder, bits in self.yardsticks.items()}
        values |= {curves.DRIFT: self.drift()}
        tracker.metrics(state.step, {curve: value for curve, value in values.items() if math.isfinite(value)})
        if warning := report.drift_warning(values[curves.DRIFT], self.config):
            note(warning)
        undrawn = self.pictures()
        while may_continue(f"drawing at step {state.step}"):
            if (drawn := next(undrawn, None)) is None:
                return
            tracker.image(state.step, *drawn)
        note(f"step {state.step:,}: not all of its pictures are drawn, as the job ends")

    def drift(self) -> float:
        """Return the relative error of images through the flow and back."""
        images, noise, labels = self._inputs(self.config.eval.samples)
        model = self.state.averaged
        with torch.no_grad():
            x, _ = model.dequantize(images, noise)
        return model.drift(x, labels)

    def entropy(self) -> Tensor:
        """Return the entropy proxy of what leaves and of what stays at each level: (levels, 2), nats per dimension.

        It is NaN where nothing stays. The first 64 images are used, so that the steps of a run can be compared.
        """
        with torch.no_grad():
            return self.state.averaged(*self._inputs(_ENTROPY_IMAGES)).entropy.cpu()

    def pictures(self) -> Iterator[tuple[str, Image]]:
        """Yield (name, image), each drawn from the averaged weights when it is requested: samples at both temperatures;
        images above their reconstructions; the entropies by level."""
        e, model, title = self.config.eval, self.state.averaged, f"step {self.state.step:,}"
        panels = [(f"samples, temperature {t:g}", drawing.sample(model, e.samples, t, _SEED)) for t in e.temperatures]
        yield "samples", pictures.grid(panels)
        batch, shift = self._first(e.samples), 8 - model.config.n_bits
        panels = [("held-out images", (batch.images >> shift) << shift)]
        yield "reconstructions", pictures.grid([*panels, ("their reconstructions", drawing.reconstruct(model, batch))])
        title = f"entropy of what leaves and what stays, held-out images, {title}"
        yield "entropy_by_level", plots.entropy_by_level(self.entropy(), title)

    def overview(self) -> Image:
        """Return a picture of samples, and of images with their reconstructions."""
        e = self.config.eval
        return drawing.overview(self.state.averaged, self._first(e.samples), e.samples, e.temperatures, _SEED)

    @property
    def yardstick_images(self) -> int:
        """Number of images for the yardsticks: the first of the scored images, at most 2^19 pixels together (512 of
        32x32), as training waits for the coders."""
        most = max(1, _YARDSTICK_PIXELS // self.config.data.resolution**2)
        return min(len(self.reader), self.config.eval.images, most)

    @cached_property
    def yardsticks(self) -> dict[str, float]:
        """Bits/dim of each lossless coder on the first `yardstick_images`."""
        images = (self.reader[i] for i in range(self.yardstick_images))
        return yardsticks.bits_per_dim(images, self.config.model.n_bits)

    def _inputs(self, images: int) -> tuple[Tensor, Tensor, Tensor | None]:
        return data.flow_inputs(self._first(images), self.state.averaged.config, self.device)

    def _first(self, images: int) -> data.Batch:
        return data.first_batch(self.reader, images, _SEED)
