"""Small sets of pictures, and torch-fidelity where it is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from aim_evaluation.comparison import Show


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fidelity() -> ModuleType:
    """torch-fidelity, where it and a torchvision of this PyTorch are installed."""
    try:
        import torch_fidelity
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity cannot be imported: {error}")
    return cast("ModuleType", torch_fidelity)


def blobs(count: int, size: int, seed: int, colour: int = 0) -> NDArray[np.uint8]:
    """Pictures (count, size, size, 3), white with a rectangle of some place and shade each."""
    rng = np.random.default_rng(seed)
    pictures = np.full((count, size, size, 3), 255, np.uint8)
    for picture in pictures:
        top, left = rng.integers(0, size // 2, 2)
        height, width = rng.integers(size // 4, size // 2, 2)
        shade = rng.integers(0, 120, 3)
        shade[colour] = 255
        picture[top : top + height, left : left + width] = shade
    return pictures


def write_pictures(
    folder: Path, pictures: NDArray[np.uint8], names: Sequence[str] | None = None
) -> Path:
    """One PNG each, in the folder or in one of the class's name."""
    for index, picture in enumerate(pictures):
        place = folder if names is None else folder / names[index]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{index:04d}.png")
    return folder


@contextlib.contextmanager
def unseen(label: str, total: int) -> Iterator[Show]:
    """A progress that nobody watches."""
    yield lambda done: None
