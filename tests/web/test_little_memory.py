"""A browser that gives a page little memory: what is told, and what still works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aim_runtime import Bundle
from aim_web import Package, write_site

from ..browser import CHROMIUM, FLAGS, PATIENCE_MS, Watched
from .site_parts import Host, hosted

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
if CHROMIUM is None:
    pytest.skip("there is no Chromium here", allow_module_level=True)

DRAWN_MS = 180_000
TOO_LITTLE = "There is too little memory for this model"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, npm: Path) -> Iterator[Host]:
    """A host of the site of the model in the box."""
    folder = tmp_path_factory.mktemp("site") / "site"
    write_site(Bundle.open(), Package.at(npm / "onnxruntime-web"), folder, webgpu=False)
    with hosted(folder) as host:
        yield host


@pytest.fixture
def limited(request: pytest.FixtureRequest) -> Iterator[Watched]:
    """A Chromium whose WebAssembly has no more memory than so many MB (10^6)."""
    flag = f"--js-flags=--wasm-max-mem-pages={request.param * 10**6 // 2**16}"
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, flag])
        watched = Watched(browser)
        yield watched
        browser.close()
    assert watched.wrong == []


@pytest.mark.parametrize("limited", [75], indirect=True)
def test_too_little_to_load_the_model(limited: Watched, box: Host) -> None:
    page = limited.open(f"{box.url}?class=heart&seed=3&draw=1")
    failed = page.locator(".loading[data-state=failed]")
    expect(failed).to_contain_text(TOO_LITTLE, timeout=PATIENCE_MS)
    expect(page.locator(".group[data-state=failed]")).to_contain_text(TOO_LITTLE)
    expect(failed.get_by_role("button", name="Try again")).to_be_visible()


@pytest.mark.parametrize("limited", [210], indirect=True)
def test_too_little_for_many_pictures_is_enough_for_one(limited: Watched, box: Host) -> None:
    page = limited.open(box.url)
    expect(page.locator(".where")).to_contain_text("thread", timeout=PATIENCE_MS)
    page.fill("#count", "16")
    page.click("#draw")
    expect(group(page, 0)).to_have_attribute("data-state", "failed", timeout=DRAWN_MS)
    expect(group(page, 0)).to_contain_text(TOO_LITTLE)
    page.fill("#count", "1")
    page.click("#draw")
    expect(group(page, 0)).to_have_attribute("data-state", "done", timeout=DRAWN_MS)
    expect(group(page, 0).locator("img")).to_have_count(1)


def group(page: Any, at: int) -> Any:
    return page.locator(".group").nth(at)
