"""Fixtures of a browser, and of sites that need no network to be made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from aim_runtime import Bundle
from aim_web import Package, modules, write_site

from ..browser import browser, npm, watched  # noqa: F401 - fixtures
from ..runtime.tiny_bundle import write_tiny_bundle
from .site_parts import FAKE_ENGINE, Host, fake_package, hosted


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_package(tmp_path_factory.mktemp("npm") / "package")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def site(tmp_path: Path, tiny: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a site that draws with the stand-in for the engine."""
    monkeypatch.setitem(modules.FOLDERS, "web/engine", FAKE_ENGINE)
    return write_site(Bundle.open(tiny), Package.at(package), tmp_path / "site").folder


@pytest.fixture
def host(site: Path) -> Iterator[Host]:
    """A host of it."""
    with hosted(site) as host:
        yield host
