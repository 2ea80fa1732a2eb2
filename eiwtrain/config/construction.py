"""Describes in words how a flow is built, for model cards and the pages of runs.

Not for its formulas, which are in docs/flow.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eiwtrain.flow import FlowConfig

_SHUFFLES = {
    "none": "no shuffle before a split",
    "fixed": "a fixed random permutation of the channels before each split (shuffle `fixed`)",
    "hard": "channels sorted for each image before each split, eiwtrain's own construction (shuffle `hard`)",
    "soft": "channels rotated for each image before each split, eiwtrain's own construction (shuffle `soft`)",
    "order": "EIW-Flow's learned order of the channels before each split, the same for every image (shuffle `order`)",
}


def construction(config: FlowConfig) -> list[str]:
    """Return the facts about a flow's construction, a phrase each: backbone, couplings and their networks, what happens
    before splits."""
    bins = f", {config.bins} bins" if config.coupling == "spline" else ""
    return [backbone(config), f"{config.coupling} couplings{bins}", _network(config), _shuffle(config)]


def backbone(config: FlowConfig) -> str:
    """Return the backbone and its depth: `Glow's backbone: 3 levels of 8 steps`."""
    levels = _count(config.levels, "level")
    if config.backbone == "glow":
        return f"Glow's backbone: {levels} of {_counts(config.steps_of_levels, 'step')}"
    units, steps = _counts(config.units_of_levels, "unit"), _counts(config.steps_of_levels, "step")
    said = f"DenseFlow's backbone: {levels} of {units}, a unit of {steps}"
    if max(config.units_of_levels) > 1:
        said += f"; {_count(config.noise_channels, 'channel')} of noise join before each unit but a level's first"
    return said


def _network(config: FlowConfig) -> str:
    c = config.conditioner
    said = f"{c.kind} conditioners, {c.hidden} channels, depth {c.depth}"
    if c.kind == "transformer":
        said += f", {c.heads} heads, patches of {c.patch}"
    if c.kind == "dense":
        said += f", growth {c.growth}, " + ("attention between places" if c.attention == "places" else "no attention")
    return said


def _shuffle(config: FlowConfig) -> str:
    if config.levels == 1:
        return "no split"
    said = _SHUFFLES[config.shuffle]
    if config.shuffle == "soft" and config.shuffle_block:
        said += f", in blocks of {config.shuffle_block}"
    if config.shuffle == "order":
        constant = "the number of channels" if config.order_input == "channels" else "1"
        rule = "as its program computes it" if config.kl == "as-published" else "the true KL divergence"
        said += f", from the constant {constant}; regulariser: {rule}"
    return said


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _counts(numbers: Sequence[int], what: str) -> str:
    """Return the number on each level: one if all are the same, else a list."""
    if len(set(numbers)) == 1:
        return _count(numbers[0], what)
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]} {what}s"
