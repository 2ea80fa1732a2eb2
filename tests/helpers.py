"""Helpers of several tests: a free port, a gloo group, small data sets, small configs."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from PIL import Image

DENSE = {
    "preset": "eiw-tiny",
    "levels": 2,
    "units": [2, 1],
    "steps": 1,
    "noise_channels": 2,
    "conditioner": {"kind": "dense", "hidden": 4, "depth": 1, "growth": 2},
    "dequantization": "variational",
    "dequantizer": {"couplings": 1, "hidden": 4, "depth": 1, "growth": 2},
}
"""Fields of the model of a small EIW-Flow: noise joins on the way through it, and it learns an order."""


def free_port() -> int:
    """Return a TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def lone_group(folder: Path) -> Iterator[None]:
    """Start a gloo group of this process alone, and end it with the block."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def write_images(folder: Path, n: int, resolution: int = 8, seed: int = 0) -> None:
    """Write n smooth random PNGs, in two class folders."""
    generator = np.random.default_rng(seed)
    for i in range(n):
        coarse = generator.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((resolution, resolution), Image.Resampling.BILINEAR)
        path = folder / f"class{i % 2}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def write_shards(output: Path, n: int = 60, resolution: int = 8) -> None:
    """Write a small data set with splits train and test."""
    import data_prep

    images = output.with_name(output.name + "-images")
    write_images(images, n, resolution)
    split = {"split": "hash:0.2"}
    data_prep.prepare("folder", str(output), resolution, path=str(images), of_source=split, shard_size=16)


def tiny_config(folder: Path, **overrides: Any) -> dict[str, Any]:
    """Return a config that trains in a second, as YAML would give it; `overrides` update whole sections."""
    raw: dict[str, Any] = {
        "run": {"name": "tiny", "storage": str(folder / "runs")},
        "data": {"path": str(folder / "data"), "resolution": 8, "lanes": 4, "shuffle_block": 16},
        "model": {"levels": 2, "steps": 2, "conditioner": {"hidden": 8}},
        "train": {"global_batch": 8, "micro_batch": 4, "max_steps": 12, "warmup_steps": 2, "log_every_seconds": 0.2},
        "workers": {"min": 2},
        "checkpoint": {"every": 5},
        "tracking": {"log_every": 1},
        "eval": {"every": 6, "images": 8, "samples": 4},
    }
    for section, fields in overrides.items():
        raw[section] = raw[section] | fields
    return raw
