"""Augmentation: whole pixels, a function of the key alone, distributed as the published program's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eiwtrain.data import ShardReader, augment, load_manifest, train_batches
from eiwtrain.data.augment import shifts, vary
from eiwtrain.data.noise import coins, fractions, sample_keys

HOW = pytest.mark.parametrize("how", ["none", "flip", "eta"])


def keys_of(n: int, epoch: int = 0, seed: int = 0) -> np.ndarray:
    return sample_keys(seed, 0, np.full(n, epoch), np.arange(n))


def images(n: int, side: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, side, side, 3), np.uint8)


def varied(pixels: np.ndarray, keys: np.ndarray, how: str) -> np.ndarray:
    pixels = pixels.copy()
    vary(pixels, keys, how)
    return pixels


@given(side=st.integers(1, 70), seed=st.integers(0, 2**40))
def test_eta_is_a_flip_a_padding_a_shift_and_a_central_crop(side: int, seed: int) -> None:
    before, keys = images(6, side), keys_of(6, seed=seed)
    after = varied(before, keys, "eta")
    pad = math.ceil(0.04 * side)
    down, right = shifts(keys, side, 0), shifts(keys, side, 1)
    assert max(abs(down).max(), abs(right).max()) <= pad
    for i, image in enumerate(before):
        flipped = image[:, ::-1] if coins(keys)[i] else image
        padded = np.pad(flipped, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
        shifted = np.roll(padded, (down[i], right[i]), (0, 1))
        assert np.array_equal(after[i], shifted[pad : pad + side, pad : pad + side])


@HOW
def test_a_sample_varies_the_same_in_any_batch(how: str) -> None:
    before, keys = images(40, 32), keys_of(40)
    after = varied(before, keys, how)
    chosen = np.array([17, 3, 30, 3])
    assert np.array_equal(varied(before[chosen], keys[chosen], how), after[chosen])
    assert after.dtype == np.uint8


@HOW
def test_no_pixel_gets_a_new_colour(how: str) -> None:
    before = images(40, 32)
    for old, new in zip(before, varied(before, keys_of(40), how), strict=True):
        assert {*map(tuple, new.reshape(-1, 3).tolist())} <= {*map(tuple, old.reshape(-1, 3).tolist())}


def test_an_image_varies_anew_in_each_epoch() -> None:
    before = np.repeat(images(1, 32), 60, axis=0)
    keys = np.concatenate([keys_of(1, epoch) for epoch in range(60)])
    seen = {how: len({image.tobytes() for image in varied(before, keys, how)}) for how in ("none", "flip", "eta")}
    assert seen["none"] == 1
    assert seen["flip"] == 2
    assert 14 <= seen["eta"] <= 18  # of 2 x 3 x 3


@pytest.mark.parametrize(("side", "most"), [(32, 0.04 * 36), (64, 0.04 * 70), (8, 0.04 * 10)])
def test_shifts_are_rounded_uniform_numbers(side: int, most: float) -> None:
    n = 40_000
    found = shifts(keys_of(n), side, 0)
    for shift in range(-4, 5):
        expected = max(0.0, min(most, shift + 0.5) - max(-most, shift - 0.5)) / (2 * most)
        assert abs((found == shift).mean() - expected) <= 5 * math.sqrt(expected * (1 - expected) / n)


def test_flips_and_shifts_are_independent() -> None:
    keys = np.concatenate([keys_of(2000, epoch) for epoch in range(10)])
    columns = np.stack([coins(keys), shifts(keys, 32, 0), shifts(keys, 32, 1), fractions(keys, 2)])
    assert np.abs(np.corrcoef(columns) - np.eye(4)).max() < 5 / math.sqrt(len(keys))


def test_augmentation_does_not_change_with_versions() -> None:
    """A checkpoint of an older version resumes with the same images."""
    found = np.stack([coins(keys_of(20)), shifts(keys_of(20), 64, 0), shifts(keys_of(20), 64, 1)]).astype(int)
    assert found.tolist() == [
        [0, 1, 0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 1],
        [-2, -1, 1, 2, -2, 0, -1, -2, -1, -2, 2, 0, 2, -1, -1, -3, 0, 1, -2, -1],
        [2, 2, 2, -1, -2, 1, -1, 2, -2, 2, -2, 2, 0, -1, -2, 1, 0, -2, 0, 0],
    ]


def test_the_stream_varies_images_by_their_keys(
    data_set: Path, tmp_path: Path, image_of: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(augment, "_SHARE", 0.2)  # images of 8 pixels are too small to be shifted by 4 %
    reader = ShardReader(str(data_set), load_manifest(str(data_set)), "train", tmp_path)
    stream = train_batches(reader, seed=3, start_step=0, global_batch=50, micro_batch=50, augment="eta")
    for epoch in range(2):
        (batch,) = next(stream)
        indices = batch.indices.numpy()
        true = np.stack([image_of("train", i) for i in indices])
        expected = varied(true, sample_keys(3, 0, np.full(50, epoch), indices), "eta")
        assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), expected)
        assert (expected != true).any()
