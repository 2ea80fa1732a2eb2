"""Flows by published size: the fields of `FlowConfig` for a model like one of the papers'.

"Like": our parts at those depths and widths, not the papers' code; docs/flow.md says what differs. Not for training
settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Glow on CIFAR-10 (arXiv 1807.03039, table 3): K = 32, L = 3, 512 channels, 44M parameters.
    "glow": {
        "levels": 3,
        "steps": 32,
        "conditioner": {"kind": "conv", "hidden": 512, "depth": 1, "activation": "relu"},
        "shuffle": "none",
    },
    # EIW-Flow as its authors' program builds it by default, on DenseFlow-74-10 (arXiv 2106.04627): 130.9M parameters at
    # 32x32.
    "eiw": {
        "backbone": "dense",
        "levels": 3,
        "units": (6, 4, 1),
        "steps": (5, 6, 20),
        "noise_channels": 10,
        "conditioner": {"kind": "dense", "hidden": 48, "depth": 7, "growth": 64, "activation": "relu"},
        "shuffle": "order",
        "dequantization": "variational",
        "dequantizer": {"couplings": 4, "hidden": 64, "depth": 4, "growth": 64},
    },
    # Ours: the same construction for an afternoon on one GPU, ...
    "eiw-small": {
        "backbone": "dense",
        "levels": 3,
        "units": (3, 2, 1),
        "steps": (4, 4, 8),
        "noise_channels": 6,
        "conditioner": {"kind": "dense", "hidden": 32, "depth": 3, "growth": 32, "activation": "relu"},
        "shuffle": "order",
        "dequantization": "variational",
        "dequantizer": {"couplings": 2, "hidden": 32, "depth": 2, "growth": 32},
    },
    # ... and for CPUs, with Glow's networks and uniform dequantization, which learn sooner (benchmarks/RESULTS.md).
    "eiw-tiny": {
        "backbone": "dense",
        "levels": 3,
        "units": (2, 2, 1),
        "steps": (2, 2, 4),
        "noise_channels": 4,
        "conditioner": {"kind": "conv", "hidden": 64, "depth": 1},
        "shuffle": "order",
    },
    # Jet, the smaller of its ImageNet-64 models (arXiv 2412.15129): 32 couplings, each a transformer of 2 blocks, 512
    # wide, 8 heads, on patches of 4x4 pixels (here 2x2 of squeezed ones), no levels to split at.
    "jet": {
        "levels": 1,
        "steps": 32,
        "conditioner": {"kind": "transformer", "hidden": 512, "depth": 2, "heads": 8, "patch": 2},
        "shuffle": "none",
    },
}


def preset(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a preset with changes applied; those of `conditioner` and `dequantizer` one by one.

        FlowConfig.from_dict(preset("glow", {"image_shape": [3, 32, 32], "conditioner": {"hidden": 128}}))

    Raises:
        ValueError: for an unknown name, or a conditioner or dequantizer that is not a mapping.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: {name!r} is not one of {', '.join(PRESETS)}")
    fields = {**PRESETS[name], **changes}
    for part in ("conditioner", "dequantizer"):
        changed = changes.get(part, {})
        if not isinstance(changed, Mapping):
            raise ValueError(f"{part}: {changed!r} is not a mapping")
        if part in fields:
            fields[part] = {**PRESETS[name].get(part, {}), **changed}
    return fields
