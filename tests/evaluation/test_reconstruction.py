"""What a tokenizer loses and uses, on inputs whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aim_evaluation.distances import Moments, frechet_distance
from aim_evaluation.reconstruction import Reconstruction, code_use, psnr, squared_errors, ssim

from .conftest import blobs
from .test_features import toy


def test_psnr_of_a_known_error() -> None:
    pictures = np.full((2, 8, 8, 3), 100, np.uint8)
    drawn = pictures.copy()
    drawn[0] += 5
    drawn[1] -= 20
    found = psnr(squared_errors(pictures, drawn))
    five, twenty = 20 * math.log10(255 / 5), 20 * math.log10(255 / 20)
    assert found["psnr_db"] == pytest.approx((five + twenty) / 2)
    assert found["pooled_psnr_db"] == pytest.approx(10 * math.log10(255**2 / ((25 + 400) / 2)))


def test_psnr_of_identical_pictures_is_finite() -> None:
    pictures = np.zeros((1, 8, 8, 3), np.uint8)
    assert psnr(squared_errors(pictures, pictures))["psnr_db"] == pytest.approx(78.13, abs=0.01)


def test_ssim_of_identical_pictures_is_1_and_of_noise_is_not() -> None:
    pictures = blobs(3, 32, 0)
    assert ssim(pictures, pictures) == pytest.approx([1, 1, 1], abs=1e-4)
    noise = np.random.default_rng(0).integers(0, 256, pictures.shape, np.uint8)
    assert max(ssim(pictures, noise)) < 0.2
    assert ssim(pictures[:1], noise[:1]) == pytest.approx(ssim(pictures, noise)[:1])


def test_code_use_counts_codes_that_occur_and_their_evenness() -> None:
    assert code_use(np.array([[3, 3, 3, 3]]), 8) == {
        "vocab_size": 8,
        "share_used": 1 / 8,
        "perplexity": pytest.approx(1),
    }
    assert code_use(np.array([[0, 1], [2, 3]], np.uint16), 8) == {
        "vocab_size": 8,
        "share_used": 1 / 2,
        "perplexity": pytest.approx(4),
    }


def test_batches_do_not_matter_and_rfid_is_that_of_the_features() -> None:
    pictures, drawn = blobs(7, 32, 0), blobs(7, 32, 1)
    whole, parts = Reconstruction(toy([])), Reconstruction(toy([]))
    whole.add(pictures, drawn)
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        parts.add(pictures[part], drawn[part])
    assert whole.figures() == pytest.approx(parts.figures())
    sides = (Moments.of(toy([])(side)[0]) for side in (drawn, pictures))
    assert whole.figures()["rfid"] == pytest.approx(frechet_distance(*sides))
    assert Reconstruction(None).features is None
