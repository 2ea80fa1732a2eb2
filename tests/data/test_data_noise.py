"""Noise of a sample: uniform, independent, a function of the key alone, the same bits everywhere."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from eiwtrain.data.noise import _mix, coins, sample_keys, uniform

WORDS = st.integers(0, 2**64 - 1)
SMALL = st.integers(0, 2**40)


def _keys(seed: int, stream: int, epoch: int, n: int) -> np.ndarray:
    return sample_keys(seed, stream, np.full(n, epoch), np.arange(n))


def _noise(keys: np.ndarray, shape: tuple[int, ...] = (3, 8, 8)) -> torch.Tensor:
    return uniform(torch.from_numpy(keys.view(np.int64)), shape)


@given(st.lists(WORDS, min_size=1, max_size=5), st.integers(1, 40))
def test_noise_equals_plain_arithmetic(words: list[int], count: int) -> None:
    """The reference uses Python integers, which neither overflow nor have a sign bit."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    places = [mix(i * 0x9E3779B97F4A7C15 % 2**64) for i in range(count)]
    expected = [[(mix((word + place) % 2**64) >> 40) / 2**24 for place in places] for word in words]
    assert _noise(np.array(words, np.uint64), (count,)).tolist() == expected


@given(st.lists(WORDS, min_size=1, unique=True))
def test_the_hash_is_a_bijection(words: list[int]) -> None:
    assert len(np.unique(_mix(np.array(words, np.uint64)))) == len(words)


@given(st.tuples(SMALL, st.integers(0, 1), SMALL, SMALL), st.tuples(SMALL, st.integers(0, 1), SMALL, SMALL))
def test_different_words_give_different_keys(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    keys = [sample_keys(s, stream, np.array([epoch]), np.array([index]))[0] for s, stream, epoch, index in (a, b)]
    assert (keys[0] == keys[1]) == (a == b)


def test_a_sample_has_the_same_noise_in_any_batch() -> None:
    keys = _keys(7, 0, 3, 20)
    assert torch.equal(_noise(keys)[5:9], _noise(keys[5:9]))
    assert np.array_equal(sample_keys(7, 0, np.full(4, 3), np.arange(5, 9)), keys[5:9])


def test_noise_does_not_change_with_versions() -> None:
    """A checkpoint of an older version resumes with the same noise."""
    found = hashlib.sha256(_noise(_keys(1, 0, 2, 4)).numpy().tobytes() + coins(_keys(1, 0, 2, 64)).tobytes())
    assert found.hexdigest()[:16] == "35089d86125bfb88"


def test_noise_is_uniform_in_each_bit_and_uncorrelated() -> None:
    """500 samples of neighbouring indices, where a weak hash would show."""
    noise = _noise(_keys(0, 0, 0, 500)).reshape(500, -1).double().numpy()  # 96,000 numbers
    assert 0 <= noise.min() < 1e-4
    assert 1 - 1e-4 < noise.max() < 1
    bits = (noise * 2**24).astype(np.int64)[..., None] >> np.arange(24) & 1
    assert np.abs(bits.mean((0, 1)) - 0.5).max() < 5 * 0.5 / np.sqrt(noise.size)
    assert np.abs(np.histogram(noise, 64, (0, 1))[0] / noise.size * 64 - 1).max() < 5 * np.sqrt(64 / noise.size)
    centred = noise - 0.5
    for pairs in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):  # next sample, next place
        assert abs(pairs.mean()) < 5 / 12 / np.sqrt(pairs.size)


def test_coins_are_fair_and_independent_of_the_noise() -> None:
    keys = np.concatenate([_keys(0, 0, epoch, 1000) for epoch in range(10)])
    tossed = coins(keys)
    assert abs(tossed.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(keys))
    first = _noise(keys, (4,)).numpy()
    assert np.abs(first[tossed].mean(0) - first[~tossed].mean(0)).max() < 5 * np.sqrt(1 / 12 / (len(keys) / 4))
