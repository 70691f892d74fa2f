"""Uniform numbers from a counter-based generator, so that noise is an input and not a state.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
A draw is a pure function of (seed, step): it needs no stream to be kept, split or replayed, and any
backend can compute it in a few integer operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Of the pairs of words c0, c2 and c1, c3, which have an axis of their own: of few numbers it is the
# calls that take time.
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_KEY_STEPS = np.outer(np.arange(10), [0x9E3779B9, 0xBB67AE85]).astype(np.uint64)  # a round's
_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Ten rounds of Philox: `counter` (..., 4) and `key` (..., 2) give words (..., 4)."""
    words = np.empty((4, *np.broadcast_shapes(counter.shape[:-1], key.shape[:-1])), np.uint64)
    words[:] = np.moveaxis(counter, -1, 0)
    _rounds(words[::2], words[1::2], np.moveaxis(key, -1, 0).astype(np.uint64))
    return np.moveaxis(words, 0, -1).astype(np.uint32)


def _rounds(even: NDArray[np.uint64], odd: NDArray[np.uint64], keys: NDArray[np.uint64]) -> None:
    """`philox4x32` in place of words c0 and c2, and c1 and c3, (2, ...), with both `keys`."""
    others = (1,) * (even.ndim - 1)
    multipliers = _MULTIPLIERS.reshape(2, *others)
    products = np.empty_like(even)  # 32 x 32 -> 64 bits, each for the other pair
    for key in (_KEY_STEPS.reshape(-1, 2, *others) + keys) & _WORD:
        np.multiply(even, multipliers, out=products)
        np.right_shift(products[::-1], _HALF, out=even)
        even ^= odd
        even ^= key
        np.bitwise_and(products[::-1], _WORD, out=odd)


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
    even, odd = np.zeros((2, 2, len(seed), steps), np.uint64)
    even[0] = np.arange(steps)
    _rounds(even, odd, np.stack([seed & _WORD, seed >> _HALF]))
    return (even[0].astype(np.float64) + 0.5) / 2.0**32  # the first word
