"""Fixtures that several folders of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Inputs, weights and outputs of the published code (see the README in that folder)."""
    return Path(__file__).parent / "golden"
