"""Uniform numbers from a counter-based generator, so that noise is an input and not a state.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
A draw is a pure function of (seed, step): it needs no stream to be kept, split or replayed, and any
backend can compute it in a few integer operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))
_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Ten rounds of Philox: `counter` (..., 4) and `key` (..., 2) give words (..., 4)."""
    c0, c1, c2, c3 = (counter[..., word].astype(np.uint64) for word in range(4))
    k0, k1 = key[..., 0].astype(np.uint32), key[..., 1].astype(np.uint32)
    for _ in range(_ROUNDS):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 32 x 32 -> 64 bits
        c0, c1, c2, c3 = (
            (right >> _HALF) ^ c1 ^ k0,
            right & _WORD,
            (left >> _HALF) ^ c3 ^ k1,
            left & _WORD,
        )
        with np.errstate(over="ignore"):  # the key schedule wraps around at 32 bits
            k0, k1 = k0 + _KEY_STEPS[0], k1 + _KEY_STEPS[1]
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def check_noise(noise: NDArray[np.float64], shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `noise` is float64 of `shape` with values 0 <= u < 1."""
    if noise.dtype != np.float64 or noise.shape != shape:
        raise ValueError(
            f"noise is {noise.dtype} of shape {noise.shape}; it must be float64 of {shape}"
        )
    if not (noise.min() >= 0 and noise.max() < 1):  # a NaN is neither
        raise ValueError("noise has values outside of 0 <= u < 1")


def uniforms(seeds: Sequence[int], steps: int) -> NDArray[np.float64]:
    """The number u(seed, step) in (0, 1) for every seed and every step below `steps`.

    Key: the 64-bit seed (low word, high word). Counter: (step, 0, 0, 0). Of the four words the
    first is used: u = (word + 0.5) / 2^32. Returns (len(seeds), steps).
    """
    seed = np.asarray(seeds, np.uint64)[:, None]  # (N, 1)
    key = np.stack([seed & _WORD, seed >> _HALF], axis=-1).astype(np.uint32)  # (N, 1, 2)
    counter = np.zeros((1, steps, 4), np.uint32)
    counter[0, :, 0] = np.arange(steps)
    words = philox4x32(counter, key)  # (N, steps, 4)
    return (words[..., 0].astype(np.float64) + 0.5) / 2.0**32
