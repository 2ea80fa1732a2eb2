"""Turn shards into batches: what a data set is (manifest), the order of its samples, and how they are read.

Not for making shards: that is `data_prep`, which needs the manifest only. Names are imported on first use, so that it
does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eiwtrain.data.loader import (
        Batch,
        eval_batches,
        first_batch,
        flow_inputs,
        labels_for,
        new_faults,
        redraw,
        train_batches,
    )
    from eiwtrain.data.manifest import DataError, Manifest, load_manifest
    from eiwtrain.data.order import SampleOrder
    from eiwtrain.data.shards import Shard, Split
    from eiwtrain.data.stream import ShardReader

_HOME = {
    "Batch": "loader",
    "DataError": "manifest",
    "Manifest": "manifest",
    "SampleOrder": "order",
    "Shard": "shards",
    "ShardReader": "stream",
    "Split": "shards",
    "eval_batches": "loader",
    "first_batch": "loader",
    "flow_inputs": "loader",
    "labels_for": "loader",
    "load_manifest": "manifest",
    "new_faults": "loader",
    "redraw": "loader",
    "train_batches": "loader",
}

__all__ = [
    "Batch",
    "DataError",
    "Manifest",
    "SampleOrder",
    "Shard",
    "ShardReader",
    "Split",
    "eval_batches",
    "first_batch",
    "flow_inputs",
    "labels_for",
    "load_manifest",
    "new_faults",
    "redraw",
    "train_batches",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
