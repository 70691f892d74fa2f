"""A real browser for tests of pages, and npm's packages that check them.

The fixtures are imported by the `conftest.py` of each folder that has such tests.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# For machines that do much else; what waits for nothing ends at once.
PATIENCE_MS = 30_000
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
# As root, and in a container with a small /dev/shm. The name is this machine, over plain HTTP.
FLAGS = [
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--host-resolver-rules=MAP insecure.test 127.0.0.1",
]
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
WEB = Path(__file__).parents[1] / "web"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Watched:
    """Contexts of a browser whose pages may not complain, nor ask another host for anything."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser
        self.contexts: list[Any] = []
        self.wrong: list[str] = []

    def open(self, url: str, *, ready: bool = True, **options: Any) -> Any:
        """A page at `url`, in a context of its own; with `ready` one that can be drawn with."""
        context = self.browser.new_context(**options)
        self.contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        return self.open_in(context, url, ready=ready)

    def open_in(self, context: Any, url: str, *, ready: bool = True) -> Any:
        """Another page of a context."""
        page = context.new_page()
        origin = "/".join(url.split("/")[:3])

        def asked(request: Any) -> None:
            if not request.url.startswith((f"{origin}/", "data:image/", f"blob:{origin}/")):
                self.wrong.append(f"asked for {request.url}")

        def said(message: Any) -> None:
            # Chromium itself reports answers that are errors, which the page tells the person, and
            # ONNX Runtime what it finds odd about graphs.
            usual = ("Failed to load resource", "[W:onnxruntime")
            if message.type in ("error", "warning") and not any(
                words in message.text for words in usual
            ):
                self.wrong.append(message.text)

        page.on("request", asked)
        page.on("console", said)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.goto(url)
        if ready:
            from playwright.sync_api import expect

            expect(page.locator("#draw")).to_be_enabled(timeout=PATIENCE_MS)
        return page


@pytest.fixture
def watched(browser: Any) -> Iterator[Watched]:
    """Pages that are looked after."""
    watched = Watched(browser)
    yield watched
    for context in watched.contexts:
        context.close()
    assert watched.wrong == []


@pytest.fixture(scope="session")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder node_modules of what `web/package-lock.json` names; skips without npm.

    It is installed once a run of the tests, by whichever of its processes wants it first.
    """
    if shutil.which("npm") is None:
        pytest.skip("there is no npm here")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "npm"
    folder.mkdir(exist_ok=True)
    failed = folder / "failed"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second waits for the first
        if not (folder / "installed").exists() and not failed.exists():
            for name in ("package.json", "package-lock.json"):
                shutil.copy(WEB / name, folder / name)
            command = ["npm", "ci", "--no-audit", "--no-fund", "--prefer-offline"]
            made = subprocess.run(
                [*command, "--ignore-scripts"],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=180,
            )
            said = made.stderr.strip()[-200:] or f"it ended with {made.returncode}"
            (folder / "installed" if made.returncode == 0 else failed).write_text(said)
    if failed.exists():
        pytest.skip(f"npm cannot install here: {failed.read_text()}")
    return folder / "node_modules"
