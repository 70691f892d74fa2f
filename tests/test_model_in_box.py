"""The model that ships with the package: whole, licensed, and independent of its batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from aim_runtime import Generator, models_dir


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    with Generator.load() as loaded:
        yield loaded


def test_every_file_is_what_the_manifest_says(generator: Generator) -> None:
    generator.bundle.verify()


def test_it_fits_into_the_wheel() -> None:
    total = sum(path.stat().st_size for path in models_dir().rglob("*") if path.is_file())
    assert total <= 12e6


def test_licences_and_card_are_with_it(generator: Generator) -> None:
    folder = Path(generator.bundle.path)
    licences = (folder / "LICENSES.md").read_text(encoding="utf-8")
    for licence in ("MIT", "Apache License 2.0", "CC BY 4.0"):
        assert licence in licences
    assert "held-out" in (folder / "MODEL_CARD.md").read_text(encoding="utf-8").lower()
    assert generator.manifest.license


def test_classes_have_names_and_numbers(generator: Generator) -> None:
    assert len(generator.class_names) == 98
    assert generator.class_index("cat-face") == generator.class_names.index("cat-face")
    with pytest.raises(ValueError, match="did you mean 'cat-face'"):
        generator.class_index("catface")


def test_an_image_is_the_same_in_any_batch(generator: Generator) -> None:
    """Image i of a large request, of a small one and alone: the same tokens and pixels."""
    classes = [13, 50, 13, 4, 88, 97, 0, 31]
    many = generator.generate(classes, seed=5)
    few = generator.generate(classes[:3], seed=5)
    np.testing.assert_array_equal(few.tokens, many.tokens[:3])
    np.testing.assert_array_equal(few.array, many.array[:3])
    alone = generator.generate(classes[4], seed=9)
    np.testing.assert_array_equal(alone.tokens[0], many.tokens[4])
    np.testing.assert_array_equal(alone.array[0], many.array[4])


def test_the_class_decides_what_is_drawn(generator: Generator) -> None:
    """Its own class explains a picture better than another: the model is a trained one."""
    drawn = generator.generate(["heart", "country-flag"], seed=1)
    right, wrong = (
        generator.logits(drawn.tokens, classes, cfg_scale=1.0).astype(np.float64)
        for classes in (["heart", "country-flag"], ["country-flag", "heart"])
    )

    def log_likelihood(scores: np.ndarray) -> np.ndarray:
        scores = scores - scores.max(-1, keepdims=True)
        normalised = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        picked = np.take_along_axis(normalised, drawn.tokens[..., None], -1)
        return np.asarray(picked.sum((1, 2)))

    assert (log_likelihood(right) > log_likelihood(wrong) + 10).all()
