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

SEARCH: dict[str, Fields] = {}
"""Recipes of equal budget, each with one change to the first."""

GROUPS = {"ablation": list(ABLATION), "search": list(SEARCH)}
VARIANTS = {**ABLATION, **SEARCH}
