from __future__ import annotations

import numpy as np
import pytest

from aim_runtime.noise import philox4x32, uniforms

# Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
ONES = 0xFFFFFFFF
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    found = philox4x32(np.array(counter, np.uint32), np.array(key, np.uint32))
    assert found.dtype == np.uint32
    assert found.tolist() == words


def test_philox_is_the_same_for_many_at_once() -> None:
    counters = np.array([item[0] for item in KNOWN], np.uint32)
    keys = np.array([item[1] for item in KNOWN], np.uint32)
    assert philox4x32(counters, keys).tolist() == [item[2] for item in KNOWN]


def test_uniforms_use_the_documented_key_and_counter() -> None:
    seed = (0x299F31D0 << 32) | 0xA4093822
    found = uniforms([0, seed], 5)
    assert found.shape == (2, 5)
    assert found[0, 0] == (0x6627E8D5 + 0.5) / 2**32
    expected = philox4x32(
        np.array([4, 0, 0, 0], np.uint32), np.array([0xA4093822, 0x299F31D0], np.uint32)
    )
    assert found[1, 4] == (int(expected[0]) + 0.5) / 2**32


def test_uniforms_take_the_largest_seed_and_stay_inside() -> None:
    found = uniforms([2**64 - 1, 2**32 - 1, 2**32], 1000)
    assert ((found > 0) & (found < 1)).all()
    assert len(np.unique(found)) == found.size
    assert abs(found.mean() - 0.5) < 0.02


def test_uniforms_of_many_seeds_and_steps_are_those_of_each() -> None:
    seeds = [0, 5, 2**32 - 1, 2**32, 2**63 + 1, 2**64 - 1]
    counters = np.zeros((300, 4), np.uint32)
    counters[:, 0] = np.arange(300)
    keys = np.array([[seed % 2**32, seed >> 32] for seed in seeds], np.uint32)
    words = philox4x32(counters[None], keys[:, None])[..., 0]  # (N, 300)
    assert np.array_equal(uniforms(seeds, 300), (words + 0.5) / 2**32)
    for seed, row in zip(seeds, uniforms(seeds, 300), strict=True):
        assert np.array_equal(uniforms([seed], 300)[0], row)
