"""The variants of `benchmarks.density` by name: fields of `FlowConfig` and of `density_subject.Recipe`.

To add one, write a line in `ABLATION` or `SEARCH`. Not for how they are trained.
"""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]

TINY: Fields = {"preset": "eiw-tiny", "lr": 5e-3}
DENSE: Fields = {
    **TINY,
    "conditioner": {"kind": "dense", "hidden": 24, "depth": 1, "growth": 24, "activation": "relu"},
}
GLOW: Fields = {"levels": 3, "steps": 4, "conditioner": {"kind": "conv", "hidden": 64}}
ABLATION: dict[str, Fields] = {
    "order": TINY,
    "none": {**TINY, "shuffle": "none"},
    "fixed": {**TINY, "shuffle": "fixed"},
    "soft": {**TINY, "shuffle": "soft"},
    "glow, soft": {**GLOW, "shuffle": "soft"},
    "glow, order": {**GLOW, "shuffle": "order"},
    "normflows": {**GLOW, "peer": "normflows"},
    "input 1": {**TINY, "order_input": "one"},
    "true KL": {**TINY, "kl": "true"},
    "variational": {
        **TINY,
        "dequantization": "variational",
        "dequantizer": {"couplings": 2, "hidden": 16, "growth": 16},
    },
    "dense networks": DENSE,
    "dense networks, attention as published": {**DENSE, "published": ["attention"]},
    "dense networks, batch normalisation": {**DENSE, "published": ["norm"]},
    "dense networks, no attention": {**DENSE, "conditioner": {**DENSE["conditioner"], "attention": "none"}},
}
"""EIW-Flow of small size with one part exchanged."""

WINNER: Fields = {
    **TINY,
    "shuffle": "soft",
    "optimizer": "muon",
    "lr": 1e-2,
    "options": {"betas": [0.9, 0.99]},
}


def _with(**changes: Any) -> Fields:
    """Return the winner's fields with changes."""
    return {**WINNER, **changes}


def _net(**changes: Any) -> Fields:
    return _with(conditioner=changes)


SEARCH: dict[str, Fields] = {
    "winner": WINNER,
    "adamw": _with(optimizer="adamw", lr=5e-3),
    "adamw, beta2 0.999": _with(optimizer="adamw", lr=5e-3, options={}),
    "adamax": _with(optimizer="adamax"),
    "lr 5e-3": _with(lr=5e-3),
    "lr 2e-2": _with(lr=2e-2),
    "batch 16": _with(batch=16),
    "batch 64": _with(batch=64),
    "hidden 32": _net(hidden=32),
    "hidden 48": _net(hidden=48),
    "hidden 96": _net(hidden=96),
    "depth 0": _net(depth=0),
    "relu": _net(activation="relu"),
    "few fine steps": _with(units=[1, 2, 2], steps=[2, 3, 6]),
    "more steps": _with(steps=[3, 3, 8]),
    "two levels": _with(levels=2, units=[2, 2], steps=[2, 4]),
    "one unit": _with(units=1, steps=[4, 4, 4]),
    "noise 8": _with(noise_channels=8),
    "no shuffle": _with(shuffle="none"),
    "learned order": _with(shuffle="order"),
    "whole images": _with(shuffle_block=0),
    "glow": {**GLOW, "shuffle": "soft", "optimizer": "muon", "lr": 1e-2, "options": WINNER["options"]},
    "residual": _net(kind="residual", hidden=48),
    "dense": _net(kind="dense", hidden=24, growth=24, activation="relu", attention="none"),
    "transformer": _with(lr=5e-3, conditioner={"kind": "transformer", "hidden": 64, "patch": 2}),
    "spline": _with(coupling="spline"),
    "variational": _with(dequantization="variational", dequantizer={"couplings": 2, "hidden": 16, "growth": 16}),
    "clip 5": _with(clip=5),
    "no augmentation": _with(augment="none"),
    "average 0.98": _with(ema=0.98),
    "constant rate": _with(schedule="constant"),
}
"""Recipes, each with one change to the first."""

GROUPS = {"ablation": list(ABLATION), "search": list(SEARCH)}
VARIANTS = {**ABLATION, **SEARCH}
