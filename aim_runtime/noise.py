"""Uniform numbers from a counter-based generator, so that noise is an input and not a state.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
A draw is a pure function of (seed, step): it needs no stream to be kept, split or replayed, and any
backend can compute it in a few integer operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_Words = NDArray[np.uint64]

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Ten rounds of Philox: `counter` (..., 4) and `key` (..., 2) give words (..., 4)."""
    words = (counter[..., word].astype(np.uint64) for word in range(4))
    keys = (key[..., word].astype(np.uint64) for word in range(2))
    return np.stack(_rounds(*words, *keys), axis=-1).astype(np.uint32)


def _rounds(
    c0: _Words, c1: _Words, c2: _Words, c3: _Words, k0: _Words, k1: _Words
) -> tuple[_Words, _Words, _Words, _Words]:
    """`philox4x32` of words apart, each in 64 bits."""
    for _ in range(_ROUNDS):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 32 x 32 -> 64 bits
        c0, c1, c2, c3 = (
            (right >> _HALF) ^ c1 ^ k0,
            right & _WORD,
            (left >> _HALF) ^ c3 ^ k1,
            left & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


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
    counter, zero = np.arange(steps, dtype=np.uint64)[None], np.zeros((1, 1), np.uint64)
    word, *_ = _rounds(counter, zero, zero, zero, seed & _WORD, seed >> _HALF)  # (N, steps)
    return (word.astype(np.float64) + 0.5) / 2.0**32
