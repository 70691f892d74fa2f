from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from aim_runtime import Generator

from .tiny_bundle import write_tiny_bundle


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle as a folder. Tests that change it work on a copy."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def generator(tiny: Path) -> Iterator[Generator]:
    """One generator for all tests: whatever a test does, the next must find it usable."""
    with Generator.load(tiny, backend="cpu") as loaded:
        yield loaded
