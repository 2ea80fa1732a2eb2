"""A small data set of noise images, written without `data_prep`: the reader needs only the format."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eiwtrain import storage
from eiwtrain.data.fingerprint import fingerprint, image_digest
from eiwtrain.data.manifest import MANIFEST_NAME, Manifest, Sidecar, manifest_to_json, sidecar_to_json
from eiwtrain.data.shards import Shard, Split, shard_name, sidecar_name

SIDE = 8


def pixels(split: str, index: int) -> np.ndarray:
    """Return image `index` of the split, (H, W, C)."""
    rng = np.random.default_rng([sum(map(ord, split)), index])
    return rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def write_data_set(url: str, sizes: dict[str, list[int]]) -> Manifest:
    """Write shards of the given sizes per split at `url`."""
    preprocessing = {"name": "noise", "version": 1, "params": {}}
    splits = {}
    for split, counts in sizes.items():
        shards, index = [], 0
        for number, count in enumerate(counts):
            buffer, offsets, lengths, keys = io.BytesIO(), [], [], []
            with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for _ in range(count):
                    png = io.BytesIO()
                    Image.fromarray(pixels(split, index)).save(png, "PNG")
                    about = json.dumps({"label": index % 3}).encode()
                    for suffix, data in (("png", png.getvalue()), ("json", about)):
                        info = tarfile.TarInfo(f"{index:08d}.{suffix}")
                        info.size = len(data)
                        if suffix == "png":
                            offsets.append(buffer.tell() + 512)
                            lengths.append(len(data))
                        tar.addfile(info, io.BytesIO(data))
                    keys.append(f"{index:08d}")
                    index += 1
            data = buffer.getvalue()
            shard = Shard(shard_name(split, number), count, len(data), storage.sha256_bytes(data))
            labels = tuple(i % 3 for i in range(index - count, index))
            digests = tuple(image_digest(pixels(split, i)).hex() for i in range(index - count, index))
            sidecar = Sidecar(shard, "plan", (), tuple(keys), labels, tuple(offsets), tuple(lengths), digests)
            text = sidecar_to_json(sidecar)
            storage.write_bytes(storage.join(url, shard.name), data)
            storage.write_bytes(storage.join(url, sidecar_name(shard.name)), text)
            shards.append(replace(shard, sidecar_sha256=storage.sha256_bytes(text)))
        splits[split] = Split(split, sum(counts), tuple(shards))
    manifest = Manifest(
        "noise", SIDE, 3, preprocessing, splits, fingerprint(splits, preprocessing, "abc"), ("a", "b", "c"), "plan"
    )
    storage.write_bytes(storage.join(url, MANIFEST_NAME), manifest_to_json(manifest))
    return manifest


@pytest.fixture(scope="session")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with 50 samples for training in uneven shards (one of them empty) and 23 for testing. Read only."""
    path = tmp_path_factory.mktemp("data") / "noise"
    write_data_set(str(path), {"train": [20, 0, 13, 17], "test": [10, 13]})
    return path


@pytest.fixture
def new_data_set(tmp_path: Path) -> Callable[..., Manifest]:
    """A function that writes data sets, which a test may damage."""
    return write_data_set


@pytest.fixture
def image_of() -> Callable[[str, int], np.ndarray]:
    """A function that returns the true pixels of a sample."""
    return pixels
