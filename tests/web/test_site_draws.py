"""A site with the engine itself, in a real browser: what it draws, and how bad luck is told."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aim_runtime import Bundle
from aim_runtime.images import read_settings
from aim_web import Package, write_site

from ..browser import PATIENCE_MS, Watched
from .site_parts import Host, hosted

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
expect.set_options(timeout=PATIENCE_MS)

DRAWN_MS = 180_000


@pytest.fixture(scope="module")
def real_package(npm: Path) -> Package:
    """npm's package, as npm installs it."""
    return Package.at(npm / "onnxruntime-web")


@pytest.fixture
def real(tmp_path: Path, tiny: Path, real_package: Package) -> Iterator[Host]:
    """A host of the tiny bundle's site."""
    write_site(Bundle.open(tiny), real_package, tmp_path / "site", webgpu=False)
    with hosted(tmp_path / "site") as host:
        yield host


def drawn(page: Any) -> Any:
    found = page.locator(".group").first
    expect(found).to_have_attribute("data-state", "done", timeout=DRAWN_MS)
    return found


def test_the_model_in_the_box(
    watched: Watched, real_package: Package, tmp_path: Path, browser: Any
) -> None:
    """A link draws what the command that is shown draws in Python; again without a network."""
    write_site(Bundle.open(), real_package, tmp_path / "site", webgpu=False)
    with hosted(tmp_path / "site") as host:
        host.isolates = False  # the service worker sees to threads
        page = watched.open(f"{host.url}?class=heart&seed=3&draw=1")
        drawn(page).locator(".picture").click()
        expect(page.locator(".where")).to_contain_text("threads")
        command = shlex.split(page.locator("#details-command").inner_text())
        with page.expect_download() as download:
            page.click("#details-download")
        ours = Path(download.value.path())
        page.close()
        host.gone = True
        again = watched.open_in(watched.contexts[0], f"{host.url}?class=heart&seed=3&draw=1")
        drawn(again).locator(".picture").click()
        with again.expect_download() as download:
            again.click("#details-download")
        assert Path(download.value.path()).read_bytes() == ours.read_bytes()
    assert command[:2] == ["aim", "generate"]
    aim = [sys.executable, "-m", "aim_cli", *command[1:], "--out", tmp_path, "--quiet"]
    subprocess.run(aim, check=True, timeout=DRAWN_MS / 1000)
    theirs = tmp_path / "heart_seed3.png"
    with Image.open(ours) as one, Image.open(theirs) as other:
        difference = np.asarray(one).astype(int) - np.asarray(other.convert("RGB")).astype(int)
    assert np.abs(difference).max() <= 2  # the same tokens; decoders round each in its own way
    said, wanted = read_settings(ours), read_settings(theirs)
    assert said.pop("backend") == "wasm"
    wanted.pop("backend")
    assert said == wanted


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("shortened", "step.weights"),
        ("altered", "step.weights"),
        ("cuts_off", "step.weights"),
        ("newer", "newer"),
    ],
)
def test_bad_files_are_one_sentence_and_are_got_over(
    watched: Watched, real: Host, how: str, words: str
) -> None:
    manifest = next(real.folder.glob("model-*/manifest.json"))
    right = manifest.read_text(encoding="utf-8")
    if how == "newer":
        manifest.write_text(json.dumps(json.loads(right) | {"format_version": 99}), "utf-8")
    else:
        setattr(real, how, "step.weights")
    page = watched.open(real.url)
    failed = page.locator(".loading[data-state=failed]")
    expect(failed).to_contain_text(words)
    sentence = failed.locator("p").inner_text()
    assert len(sentence) <= 300
    assert sentence.endswith(".")
    if how == "newer":
        manifest.write_text(right, encoding="utf-8")
    else:
        setattr(real, how, "")
    failed.get_by_role("button", name="Try again").click()
    expect(page.locator(".where")).to_contain_text("thread")
    page.fill("#class-input", "dog")
    page.click("#draw")
    drawn(page)


def test_over_plain_http_it_says_what_is_wrong(watched: Watched, real: Host) -> None:
    real.isolates = False
    page = watched.open(f"{real.insecure_url}?class=dog&seed=3&draw=1")
    expect(page.locator(".loading[data-state=failed]")).to_contain_text("HTTPS")
    expect(page.locator(".group").first).to_have_attribute("data-state", "failed")
