"""Reports training: what rank 0 measures, as a line for people and as curves for MLflow, and two warnings.

Not for where the time of the whole run goes: that is `eiwtrain.train.goodput`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from torch import Tensor

from eiwtrain.config import Config, Train
from eiwtrain.terminal.console import TrainingLine
from eiwtrain.terminal.lines import one_line
from eiwtrain.tracking import curves as names


def drift_warning(drift: float, config: Config) -> str | None:
    """Return a warning where a flow has drifted too far for gradients to come from its inversion, or else None.

    Args:
        drift: relative error of images through the flow and back (`EIWFlow.drift`).
    """
    m, limit = config.model, config.eval.drift_warning
    if m.backprop not in ("invertible", "auto") or drift <= limit:  # a NaN is above any limit
        return None
    if m.anchor_every and drift < 1:
        return None  # drift is measured without anchors, and they bound it where gradients come from
    remedies = [] if m.anchor_every or not drift < 1 else ["model.anchor_every=8"]  # beyond 1 it alone may not suffice
    remedies += [] if m.trunk_dtype == "float64" else ["model.trunk_dtype=float64"]
    remedies += ["model.backprop=checkpointed"]
    return (
        f"warning: drift {drift:.1e} is above eval.drift_warning = {limit:g}: inverted activations, and gradients with "
        f"them, lose precision. {' or '.join(remedies)} fixes it (docs/precision.md)"
    )


def out_of_memory(error: Exception, config: Config) -> str:
    """Return one line for a user whose worker has run out of GPU memory, with what lowers the need."""
    m, rows = config.model, config.train.micro_batch
    remedies = [f"a train.micro_batch below {rows}"] if rows > 1 else []
    if m.backprop == "auto":
        remedies.append("a lower model.memory_budget" if m.memory_budget else "a model.memory_budget (bytes)")
    remedies += [] if m.backprop == "invertible" else ["model.backprop=invertible"]
    what = ". ".join(one_line(error, limit=None).split(". ")[:3])[:120].rstrip(".")  # the rest is of the allocator
    return (
        f"out of GPU memory: {what}; use {' or '.join(remedies or ['a smaller model'])}, or, if it was an evaluation, "
        "fewer eval.samples"
    )


def kept_line(kept: int, of: int, share: float) -> str:
    """Return one line about what `model.backprop: auto` has found to fit into memory.

    Args:
        kept, of: how many bijections keep their activations, and how many there are.
        share: `flow.EIWFlow.memory_share`.
    """
    others = "" if kept == of else ", the others are inverted"
    line = f"model.backprop=auto: {kept} of {of} bijections keep their activations{others}"
    return line + (f"; they may take {share:.0%} of what was measured, as memory was short before" if share < 1 else "")


class Meter:
    """Means over the steps since this meter was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._finite = self._images = self.faults = 0
        self._bits = self._waited = self._worked = 0.0

    def add(self, images: int, bits_per_dim: float, waited: float, worked: float, faults: int = 0) -> None:
        """Count one step.

        Args:
            waited: seconds for which the step waited for its data.
            worked: seconds that it then took.
            faults: storage failures during it that were retried with success.
        """
        self._images += images
        if math.isfinite(bits_per_dim):  # else the step was skipped
            self._bits += bits_per_dim
            self._finite += 1
        self._waited += waited
        self._worked += worked
        self.faults += faults

    @property
    def seconds(self) -> float:
        """Wall time since this meter was made."""
        return time.perf_counter() - self._began

    @property
    def bits_per_dim(self) -> float:
        """Mean bits/dim over the steps that were not skipped."""
        return self._bits / max(1, self._finite)

    @property
    def images_per_second(self) -> float:
        """Images a second over all ranks, in the time of the steps: what lies between them, say an evaluation, does not
        count."""
        return max(1, self._images) / max(1e-9, self._waited + self._worked)

    def eta(self, step: int, train: Train) -> float:
        """Return the seconds from this step to the last one, at this speed."""
        return (train.max_steps - step) * train.global_batch / self.images_per_second

    @property
    def data_wait(self) -> float:
        """Share of the time of the steps that was spent waiting for data, 0..1."""
        return self._waited / max(1e-9, self._waited + self._worked)


def curves(
    meter: Meter,
    bits_per_dim: float,
    penalty: float,
    norm: float,
    lr: float,
    entropy: Tensor,
    orders: Sequence[tuple[float, float]],
    faults: int,
    epoch: float,
) -> dict[str, float]:
    """Return one point of every training curve, grouped as the MLflow UI groups names: by what stands before the slash.

    All but the times and the faults describe the step itself, so a step that is run again after a resume gives the same
    point.

    Args:
        entropy: (levels, 2), entropy proxy of what leaves and of what stays; NaN where nothing stays.
        orders: entropy of each learned order, in nats, and how often it has changed.
        faults: storage failures that all workers have retried with success since they were started.
        epoch: how often each training image has been seen.
    """
    values = {
        names.BITS_PER_DIM: bits_per_dim,
        names.GRAD_NORM: norm,
        names.LR: lr,
        names.EPOCH: epoch,
        names.SHUFFLE_PENALTY: penalty,
        names.IMAGES_PER_SECOND: meter.images_per_second,
        names.DATA_WAIT: meter.data_wait,
        names.STORAGE_FAULTS: float(faults),
    }
    for level, (leaves, stays) in enumerate(entropy.tolist()):
        values |= {names.ENTROPY_LEAVES.format(level=level): leaves, names.ENTROPY_STAYS.format(level=level): stays}
    for level, (spread, changes) in enumerate(orders):
        values |= {names.ORDER_ENTROPY.format(level=level): spread, names.ORDER_CHANGES.format(level=level): changes}
    return {k: v for k, v in values.items() if math.isfinite(v)}  # else there is no such point


def progress(meter: Meter, step: int, train: Train, goodput: float) -> TrainingLine:
    """Return the training line, without costs."""
    return TrainingLine(
        step=step,
        max_steps=train.max_steps,
        images=step * train.global_batch,
        bits_per_dim=meter.bits_per_dim,
        images_per_second=meter.images_per_second,
        data_wait=meter.data_wait,
        faults=meter.faults,
        goodput=goodput,
        eta=meter.eta(step, train),
    )
