"""Make random numbers that belong to a sample: functions of (seed, stream, epoch, sample index), not of time or place.

This is a counter-based generator: a sample has a key, and each of its numbers is a hash of the key and of its place.
It uses integer arithmetic only, so that CPUs and GPUs give the same bits, and only the key travels with an image.

The hash is the finalizer of SplitMix64 in its variant 13: Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014; D. Stafford, "Better bit mixing", 2011.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

_GAMMA = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: keeps the keys of small numbers apart
_MULTIPLIERS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SHIFTS = 30, 27, 31
_COIN = 0xD1B54A32D192ED03  # any odd number; makes coins independent of noise
_WORD = 1 << 64

Keys = npt.NDArray[np.uint64]


def sample_keys(seed: int, stream: int, epochs: npt.NDArray[np.int64], indices: npt.NDArray[np.int64]) -> Keys:
    """Return a key for each sample, (n,), from its epoch and its index, (n,) each."""
    keys = np.full(len(indices), seed % _WORD, np.uint64)
    for word in (np.uint64(stream), epochs.astype(np.uint64), indices.astype(np.uint64)):
        keys = _mix(keys + np.uint64(_GAMMA)) ^ word
    return _mix(keys + np.uint64(_GAMMA))


def coins(keys: Keys) -> npt.NDArray[np.bool_]:
    """Return a coin toss for each sample, (n,)."""
    return (_mix(keys + np.uint64(_COIN)) >> np.uint64(63)).astype(bool)


def fractions(keys: Keys, number: int) -> npt.NDArray[np.float64]:
    """Return a number in [0, 1) for each sample, (n,), independent of its coin, its noise and its other numbers."""
    return (_mix(keys + np.uint64((number + 2) * _COIN % _WORD)) >> np.uint64(11)) * 2.0**-53


def uniform(keys: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return numbers in [0, 1), multiples of 2^-24, for each sample: float32 (n, *shape), on the device of the keys.

    Args:
        keys: int64 (n,), the bits of `sample_keys`.
        shape: of one sample's numbers.
    """
    hashed = keys[:, None] + _places(math.prod(shape), keys.device)
    spare = torch.empty_like(hashed)
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, None), strict=True):
        torch.bitwise_right_shift(hashed, shift, out=spare)
        hashed ^= spare.bitwise_and_((1 << (64 - shift)) - 1)  # shifting a signed word copies its sign
        if multiplier is not None:
            hashed *= multiplier - _WORD
    return ((hashed >> 40).bitwise_and_((1 << 24) - 1).float() * 2**-24).reshape(len(keys), *shape)


def _mix(words: Keys) -> Keys:
    """Map 64-bit words one to one; each bit of the input flips about half of the output's bits."""
    for shift, multiplier in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(multiplier)
    return words


@lru_cache(maxsize=16)
def _places(count: int, device: torch.device) -> torch.Tensor:
    """Return a word for each place in a sample, int64 (count,)."""
    return torch.from_numpy(_mix(np.arange(count, dtype=np.uint64) * np.uint64(_GAMMA)).view(np.int64)).to(device)
