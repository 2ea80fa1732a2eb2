"""Flows by published size: the fields of `FlowConfig` for a model like one of the papers'.

"Like": our couplings, shuffles and priors at those depths and widths, not the papers' code. Not for training settings.
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
    # Only the abstract of EIW-Flow (arXiv 2407.04958) was available, without sizes: Glow's sizes, with our shuffle.
    "eiw": {
        "levels": 3,
        "steps": 32,
        "conditioner": {"kind": "conv", "hidden": 512, "depth": 1},
        "shuffle": "soft",
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
    """Return the fields of a preset with changes applied; those of `conditioner` one by one.

        FlowConfig.from_dict(preset("glow", {"image_shape": [3, 32, 32], "conditioner": {"hidden": 128}}))

    Raises:
        ValueError: for an unknown name, or a conditioner that is not a mapping.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: {name!r} is not one of {', '.join(PRESETS)}")
    fields, conditioner = PRESETS[name], changes.get("conditioner", {})
    if not isinstance(conditioner, Mapping):
        raise ValueError(f"conditioner: {conditioner!r} is not a mapping")
    return {**fields, **changes, "conditioner": {**fields["conditioner"], **conditioner}}
