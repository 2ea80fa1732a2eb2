"""What training changes, and nothing else: weights, their average, the optimizer, the step, what was skipped.

It begins new or from a checkpoint, and knows which tensors and numbers a checkpoint holds (`eiwtrain.checkpoints` knows
how they are stored). Every rank holds one; methods that are collective say so.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eiwtrain import checkpoints, flow
from eiwtrain.config import Config
from eiwtrain.data.manifest import Manifest
from eiwtrain.scoring.estimator import estimator_of
from eiwtrain.scoring.scores import Score
from eiwtrain.testing import timeline
from eiwtrain.train import restore
from eiwtrain.train.engine import Engine
from eiwtrain.train.report import kept_line


def flow_config(config: Config, channels: int) -> flow.FlowConfig:
    """The model that a config asks for, on square images of `channels` channels."""
    side = config.data.resolution
    precision = "bfloat16" if config.train.precision == "bf16" else "float32"
    fields = {"image_shape": (channels, side, side), "conditioner_dtype": precision}
    return flow.FlowConfig.from_dict(fields | config.model.to_flow())


def outline(config: Config, channels: int) -> flow.EIWFlow:
    """Return that model without its numbers, on torch's `meta` device: the names and shapes of its tensors."""
    with torch.device("meta"):
        return flow.EIWFlow(flow_config(config, channels))


class OtherRun(RuntimeError):
    """The newest checkpoint belongs to a run of another config or data set; the message is for the user."""


class TrainState:
    """State of training on one rank."""

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        device: torch.device,
        batching: tuple[int, int],
        first: Callable[[], tuple[Tensor, Tensor, Tensor | None]],
        note: Callable[[str], None],
        skip_to: int | None = None,
        memory_share: float = 1.0,
        there: checkpoints.Survey | None = None,
    ) -> None:
        """Restore the newest intact checkpoint, or begin a new run. Collective.

        Args:
            manifest: manifest of the data set.
            batching: rows of a micro-batch, micro-batches of a step.
            first: training images, uint8 (n, C, H, W), with the flow's noise and labels, the same on every rank: they
                initialise actnorm and give a restored optimizer its first, empty step.
            note: prints a line for the user.
            skip_to: step to continue with, on the newest weights that were not followed by a skipped step; None: the
                step of the newest checkpoint.
            memory_share: see `flow.EIWFlow.memory_share`.
            there: the run's checkpoints, the same on every rank; None: rank 0 looks.

        Raises:
            OtherRun: as it says; on every rank. A job before this one, which was cut off, may have committed that
                checkpoint after the driver had compared what was there.
        """
        self.config, self.manifest, self.device = config, manifest, device
        torch.manual_seed(config.train.seed)
        self.flow = flow.EIWFlow(flow_config(config, manifest.channels)).to(device)
        self.flow.memory_share = memory_share
        self._note = note
        self._kept: tuple[int, int] | None = None  # as last noted
        saved, tensors = restore.newest_intact(
            config.root, device, note, skip_to is not None, there, config.checkpoint.near
        )
        timeline.mark("checkpoint")
        if saved is not None and (problems := checkpoints.differences(saved, config, manifest.fingerprint)):
            raise OtherRun(problems[0])
        if saved is None:
            images, noise, _ = first()
            self.flow.initialize(images, noise)
        else:
            self.flow.load_state_dict(checkpoints.section(tensors, "weights"))
        timeline.mark("weights")
        self.averaged = copy.deepcopy(self.flow).eval().requires_grad_(False)
        self._orders = list(zip(self.averaged.orders(), self.flow.orders(), strict=True))
        self.engine = Engine(self.flow, config.train, *batching, dist.get_world_size())
        timeline.mark("DeepSpeed")
        self._average = self.engine.average_in(self.averaged)
        self.step = self.updates = 0
        """Steps made so far, and those of them that changed the weights."""
        self.skipped = self.skipped_in_row = 0
        """Steps that did not, because loss or gradient was not finite: in all, and in a row just before this step."""
        self.rollbacks = 0
        """How often the weights went back to those of an earlier step."""
        self.score: Score | None = None
        """Result of the evaluation at this very step; None if there was none."""
        self.newest = saved
        """The checkpoint that was last committed, as far as this rank knows, or restored."""
        if saved is not None:
            self.step, self.updates = saved.step, saved.state["updates"]
            self.skipped, self.skipped_in_row = saved.state["skipped"], saved.state["skipped_in_row"]
            self.rollbacks = saved.state["rollbacks"]
            self.score = _score_of(saved)
            self.averaged.load_state_dict(checkpoints.section(tensors, "ema"))
            batch = [t if t is None else t[: batching[0]] for t in first()]
            self.engine.load_moments(
                checkpoints.section(tensors, "moments"), self.updates, lambda module: module(*batch).log_prob.sum()
            )
            # Again, as that empty step has run the flow, which counts how often its order has changed.
            names = {name for name, _ in self.flow.named_buffers()}
            weights = checkpoints.section(tensors, "weights")
            self.flow.load_state_dict({name: t for name, t in weights.items() if name in names}, strict=False)
        timeline.mark("moments")
        if skip_to is not None and skip_to > self.step:
            note(f"step {skip_to:,} follows, with the weights of step {self.step:,}")
            self.skipped += skip_to - self.step
            self.step, self.score, self.rollbacks = skip_to, None, self.rollbacks + 1
            self.skipped_in_row = 0

    @property
    def samples_seen(self) -> int:
        """Position in the sample stream."""
        return self.step * self.config.train.global_batch

    def advance(
        self, losses: list[Callable[[nn.Module], Tensor]], lr: float, report: Callable[[], Tensor] | None = None
    ) -> tuple[float, bool]:
        """Make one optimizer step and update the average; return the gradient norm, and whether the step was applied.
        It is skipped if loss or gradient is not finite. Collective.

        `report` is as in `Engine.step`, whose `reported` then holds the sums.
        """
        norm, applied = self.engine.step(losses, lr, report)
        if self.flow.kept is not None and self.flow.kept != self._kept:
            self._kept = self.flow.kept
            self._note(kept_line(*self._kept, self.flow.memory_share))
        self.step += 1
        self.score = None
        if not applied:
            self.skipped, self.skipped_in_row = self.skipped + 1, self.skipped_in_row + 1
            return norm, False
        self.skipped_in_row = 0
        # a horizon that grows with the steps made, so that the average forgets the initial weights
        decay = min(self.config.train.ema, (1 + self.updates) / (10 + self.updates)) if self.config.train.ema else 0.0
        self._average(1.0 - decay)
        for average, trained in self._orders:
            average.latest.copy_(trained.latest)
        self.updates += 1
        return norm, True

    def orders(self) -> list[tuple[float, float]]:
        """Return the entropy of each learned order of the trained weights, in nats, and how often it has changed since
        the run began, by level; none without `shuffle: order`. Collective."""
        found = self.flow.orders()
        with self.engine.whole([p for order in found for p in order.parameters()]):
            numbers = [n for order in found for n in (order.entropy().double(), order.changes.double())]
            values = torch.stack(numbers).tolist() if numbers else []
        return list(zip(values[::2], values[1::2], strict=True))

    def to_json(self) -> dict[str, Any]:
        """Return what a checkpoint keeps in addition to tensors."""
        return {
            "config": self.config.model_dump(mode="json"),
            "flow": self.flow.config.to_dict(),
            "parameters": sum(p.numel() for p in self.averaged.parameters()),
            "data": self.manifest.title,
            "data_fingerprint": self.manifest.fingerprint,
            "class_names": list(self.manifest.classes) if self.config.model.classes else None,
            "updates": self.updates,
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "rollbacks": self.rollbacks,
            "score": asdict(self.score) if self.score else None,
            "estimator": asdict(estimator_of(self.flow.config)),
            "eval_bits_per_dim": self.score.bits_per_dim if self.score else None,
            "world_size": dist.get_world_size(),
            "saved_at": time.time(),
        }

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor) of all that a checkpoint keeps, in the same order on every rank. Collective."""
        for weights in self.engine.weights():
            yield from ((f"weights/{name}", t) for name, t in weights.items())
        parameters = dict(self.flow.named_parameters())
        yield from ((f"weights/{name}", t) for name, t in self.flow.state_dict().items() if name not in parameters)
        yield from ((f"ema/{name}", t) for name, t in self.averaged.state_dict().items())
        yield from ((f"moments/{name}", t) for name, t in self.engine.moments())


def _score_of(saved: checkpoints.Checkpoint) -> Score | None:
    """Return the score in a checkpoint, whose manifest has null for numbers that are not finite."""
    if not (score := saved.state["score"]):
        return None
    bits, error = (math.nan if score[name] is None else score[name] for name in ("bits_per_dim", "standard_error"))
    return Score(bits, error, score["images"])


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Return each value summed over ranks, in float64. Collective."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return [float(v) for v in tensor.tolist()]
