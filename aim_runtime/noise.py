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
_KEY_STEPS = np.outer(np.arange(10), [0x9E3779B9, 0xBB67AE85]).astype(np.uint32)  # a round's


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Ten rounds of Philox: `counter` (..., 4) and `key` (..., 2) give words (..., 4)."""
    words = np.empty((4, *np.broadcast_shapes(counter.shape[:-1], key.shape[:-1])), np.uint32)
    words[:] = np.moveaxis(counter, -1, 0)
    words[::2], words[1::2] = _rounds(words[::2], words[1::2], np.moveaxis(key, -1, 0))
    return np.moveaxis(words, 0, -1)


def _rounds(
    even: NDArray[np.uint32], odd: NDArray[np.uint32], keys: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """What ten rounds make of words c0 and c2, `even`, and c1 and c3, `odd`: each is (2, ...).

    `keys` (2, ...) are the first round's; it and `odd` may have axes of length 1 in places.
    """
    others = (1,) * (even.ndim - 1)
    multipliers = _MULTIPLIERS.reshape(2, *others)
    # 32 x 32 -> 64 bits, of two rounds by turns. A product's halves are each for the other pair.
    products = np.empty((2, *even.shape), "<u8")
    halves = products.view("<u4").reshape(*products.shape, 2)[:, ::-1]
    low, high = halves[..., 0], halves[..., 1]
    even = even.copy()
    for index, key in enumerate(_KEY_STEPS.reshape(-1, 2, *others) + keys):
        turn = index % 2
        np.multiply(even, multipliers, out=products[turn])
        np.bitwise_xor(high[turn], odd, out=even)
        even ^= key
        odd = low[turn]
    return even, odd


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
    keys = np.array(seeds, "<u8").view("<u4").reshape(-1, 2).T[:, :, None]  # (2, N, 1)
    even, odd = np.zeros((2, len(seeds), steps), np.uint32), np.zeros((2, 1, 1), np.uint32)
    even[0] = np.arange(steps)
    (first, _), _ = _rounds(even, odd, keys)  # words c0, (N, steps)
    return (first + 0.5) / 2.0**32
