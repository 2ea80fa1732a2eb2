"""What `benchmarks.backprop` and `benchmarks.step` measure: a flow in one mode of backpropagation, its loss and batch.

Not for measuring it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from eiwtrain import flow
from eiwtrain.flow.config import BACKPROP_MODES

NETWORKS = "checkpointed nets"
METHODS = {"glow": BACKPROP_MODES, "eiw": ("stored", NETWORKS, *BACKPROP_MODES[1:])}
"""The modes that are measured of each model, "stored" first, "auto" after it."""

EIW_STEPS = {13: (1, 1, 3), 34: (2, 3, 10), 74: (5, 6, 20)}
"""Steps of each level's units, by how many couplings that makes in the units of the preset `eiw`: 6, 4 and 1."""


@dataclass(frozen=True)
class Setting:
    """One measurement."""

    model: str
    mode: str
    depth: int
    budget: float | None
    budget_bytes: int | None
    """Found by `backprop.count`."""
    hidden: int
    batch: int
    resolution: int
    dtype: str
    device: str
    repeat: int


def subject_of(setting: Setting) -> Subject:
    """Return what a setting measures; gives this process one thread."""
    torch.set_num_threads(1)
    config = replace(
        _CONFIGS[setting.model](setting),
        memory_budget=setting.budget_bytes,
        conditioner_dtype=cast(Any, setting.dtype),
    )
    return Subject(config, setting.mode, setting.batch, torch.device(setting.device))


class Subject:
    """A flow in a mode of backpropagation, its loss, and the batch that the loss takes.

    Args:
        mode: one of `BACKPROP_MODES`, or `NETWORKS`.
        batch: images in the batch.
    """

    def __init__(self, config: flow.FlowConfig, mode: str, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        config = replace(config, backprop=cast(Any, mode if mode in BACKPROP_MODES else "stored"))
        self.model = flow.EIWFlow(config).to(device)
        for name, p in self.model.named_parameters():
            if name.endswith("conditioner.last.weight"):
                torch.nn.init.normal_(p, std=0.02)  # at zero, as it starts, layers before it would get no gradient
        self.batch = _batch(config, batch, device)
        self.model.initialize(*(t[:2] for t in self.batch))
        self.networks = networks_of(self.model)
        if mode == NETWORKS:
            for network in self.networks:
                again = partial(checkpoint, network.forward, use_reentrant=False, preserve_rng_state=False)
                cast(Any, network).forward = again

    def loss(self, *batch: Tensor) -> Tensor:
        """Return the mean of -log p(x), in nats, and of the penalty."""
        out: flow.FlowOutput = self.model(*batch)
        return (out.penalty - out.log_prob).mean()


def networks_of(model: flow.EIWFlow) -> list[flow.Conditioner]:
    """Return the networks of the couplings; not those of priors, of noise that joins, or of the dequantizer."""
    bijections = [b for level in model.levels for b in cast(flow.Level, level).bijections()]
    couplings = [m for b in bijections for m in b.modules() if isinstance(m, flow.NetworkCoupling)]
    return [cast(flow.Conditioner, coupling.conditioner) for coupling in couplings]


def _glow(setting: Setting) -> flow.FlowConfig:
    """One level of Glow steps under a standard normal prior."""
    return flow.FlowConfig(
        image_shape=(3, setting.resolution, setting.resolution),
        levels=1,
        steps=setting.depth,
        conditioner=flow.ConditionerConfig(hidden=setting.hidden),
    )


def _eiw(setting: Setting) -> flow.FlowConfig:
    """The preset `eiw`, with fewer steps in each unit; with another `hidden`, its other widths in proportion."""
    published = flow.PRESETS["eiw"]
    share = setting.hidden / published["conditioner"]["hidden"]

    def scaled(part: str, *widths: str) -> dict[str, int]:
        return {width: max(1, round(share * published[part][width])) for width in widths}

    changes = {
        "image_shape": [3, setting.resolution, setting.resolution],
        "steps": EIW_STEPS[setting.depth],
        "conditioner": scaled("conditioner", "hidden", "growth"),
        "dequantizer": scaled("dequantizer", "hidden", "growth"),
    }
    return flow.FlowConfig.from_dict(flow.preset("eiw", changes))


_CONFIGS: dict[str, Callable[[Setting], flow.FlowConfig]] = {"glow": _glow, "eiw": _eiw}


def _batch(config: flow.FlowConfig, size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return reals, or pixels and noise if the flow's density needs noise."""
    x = torch.rand(size, *config.image_shape, device=device)
    if config.backbone == "glow":
        return (x - 0.5,)
    return (256 * x).to(torch.uint8), torch.rand(size, *config.noise_shape, device=device)
