"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Inputs, weights and outputs of the published code (see the README in that folder)."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def lowered_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Exports in this process take the decoder's graph from those made before in this run."""
    from aim_export import bundle

    from .lowered_once import kept

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle, "lower_decoder", kept(bundle.lower_decoder, shared / "lowered"))
        yield
