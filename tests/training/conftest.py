"""A toy data set: squares, one colour a class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from .processes import Processes

COLOURS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Networks this small lose more to waiting for threads than they gain."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indices of shards are kept in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Starts several processes of a training."""
    started = Processes()
    yield started
    started.close()


@pytest.fixture(scope="session")
def draw_squares() -> Callable[..., Path]:
    """Writes ``count`` images a class, ``side`` pixels square, under a folder."""

    def draw(root: Path, count: int, side: int = 36, seed: int = 0) -> Path:
        generator = np.random.default_rng(seed)
        for name, colour in COLOURS.items():
            (root / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.full((side, side, 3), 255, np.uint8)
                top, left = generator.integers(0, side // 2, 2)
                pixels[top : top + side // 2, left : left + side // 2] = colour
                Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
        return root

    return draw


@pytest.fixture(scope="session")
def squares(draw_squares: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of 36 x 36 pixels in three classes."""
    return draw_squares(tmp_path_factory.mktemp("squares") / "train", 4)


@pytest.fixture(scope="session")
def held_out(draw_squares: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six more."""
    return draw_squares(tmp_path_factory.mktemp("squares") / "val", 2, seed=1)
