"""A small trained flow and small data sets, for the tests of scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data_prep
from eiwtrain import data, flow

SIZE = 8


def smooth(n: int, seed: int = 0, size: int = SIZE) -> np.ndarray:
    """Return n images of soft colours, uint8 (n, size, size, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 2, 2, 3), dtype=np.uint8)
    wide = (size, size)
    return np.stack([np.asarray(Image.fromarray(x).resize(wide, Image.Resampling.BILINEAR)) for x in coarse])


def noise(n: int, seed: int = 0) -> np.ndarray:
    """Return n images of noise, uint8 (n, SIZE, SIZE, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)


def flat(n: int, seed: int = 0) -> np.ndarray:
    """Return n images of one colour each, uint8 (n, SIZE, SIZE, 3)."""
    return np.random.default_rng(seed).integers(64, 192, (n, 1, 1, 3), dtype=np.uint8).repeat(SIZE, 1).repeat(SIZE, 2)


def write_set(folder: Path, images: np.ndarray, classes: tuple[str, ...] = ()) -> str:
    """Write a data set whose split `test` holds these images, and `train` the first one; return its folder."""
    source = folder / "images"
    for i, image in enumerate([images[0], *images]):
        split, name = ("train", "first") if i == 0 else ("test", f"{i - 1:04d}")
        path = source / split / (classes[(i - 1) % len(classes)] if classes else "") / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    output = folder / folder.name
    data_prep.prepare("folder", str(output), images.shape[1], path=str(source), shard_size=7, workers=1)
    return str(output)


def reader(url: str) -> data.ShardReader:
    """Open the split `test` of a data set."""
    return data.ShardReader(url, data.load_manifest(url), "test")


def trained_flow(steps: int = 60, **config: object) -> flow.EIWFlow:
    """Train a flow on smooth images for a second: it needs fewer bits for them than for noise."""
    torch.manual_seed(0)
    small = {"levels": 2, "steps": 2, "conditioner": {"hidden": 16}, "conditioner_dtype": "float32"}
    model = flow.EIWFlow.from_config({"image_shape": [3, SIZE, SIZE], **small, **config})
    images = torch.from_numpy(smooth(256, seed=1)).permute(0, 3, 1, 2).contiguous()
    labels = torch.arange(256) % model.config.classes if model.config.classes else None
    model.initialize(flow.dequantize(images, torch.rand(images.shape), model.config.n_bits))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (-model.log_prob(images, torch.rand(images.shape), labels).mean() / model.dims).backward()
        optimizer.step()
    return model.eval()
