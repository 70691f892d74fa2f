"""The page of a site, as people use it: `python benchmarks/web_page.py fp16=A int8=B ...`.

The site of each bundle is opened in a headless Chromium over loopback, and one picture is ordered
on the page itself. By a link, in a fresh profile, with the model (cold); by the same link in a new
tab (warm); once more there, by the button (again); and in another fresh profile by the button, some
seconds after the model was there (idle). Times end when the finished picture is on the page; each
is the median of so many visits. --no-previews leaves those out, to see what they take. Needs `npm
ci --prefix web`, Playwright and a Chromium.
Prints a line a row; with --json it puts them into a file, in the place of what that has of them.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from aim_runtime import Bundle
from aim_web import Package, listening, modules, write_site
from aim_web.local_server import url
from web import CLASS, IDLE_MS, LOOKED_AT_MS, SEED, WEB, browser_version, profile, put

# What the page shows, and when, in milliseconds since it was opened.
WATCH = """
window.seen = [];
new MutationObserver((changes) => {
  const at = performance.now();
  for (const { target, attributeName, addedNodes } of changes) {
    if (attributeName === "data-state" && target.matches(".group"))
      seen.push({ what: target.dataset.state, at });
    if (target.matches(".where") && target.textContent.includes(" thread"))
      seen.push({ what: "ready", at });
    for (const one of attributeName === "src" ? [target] : addedNodes)
      if (one.matches?.(".card img")) seen.push({ what: "image", at });
  }
}).observe(document, { subtree: true, childList: true, attributes: true });
"""


@contextmanager
def site_of(bundle: Path, previews: bool) -> Iterator[str]:
    """The address of the bundle's site, on loopback."""
    with tempfile.TemporaryDirectory() as name:
        pages = dict(modules.FOLDERS)
        if not previews:
            modules.FOLDERS["web/page"] = _without_previews(Path(name) / "page")
        package = Package.at(WEB / "node_modules" / "onnxruntime-web")
        site = write_site(Bundle.open(bundle), package, Path(name) / "site", webgpu=False)
        modules.FOLDERS.update(pages)
        with listening(site, 0) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield url(server)
            server.shutdown()


def _without_previews(folder: Path) -> Path:
    """The modules of the page, of which the first asks for no previews."""
    shutil.copytree(WEB / "page", folder)
    app = folder / "app.js"
    text = app.read_text(encoding="utf-8")
    assert text.count("previews: MOST_PREVIEWS") == 1
    app.write_text(text.replace("previews: MOST_PREVIEWS", "previews: 1"), encoding="utf-8")
    return folder


class Tab:
    """A tab with the page, and what was seen in it."""

    def __init__(self, context: Any, address: str) -> None:
        self.page = context.new_page()
        self.page.add_init_script(WATCH)
        self.page.goto(address)

    def until(self, what: str, count: int = 1) -> list[dict[str, Any]]:
        """All that was seen, once it was seen so often."""
        enough = "([what, count]) => seen.filter((one) => one.what === what).length >= count"
        self.page.wait_for_function(enough, arg=[what, count], polling=100)
        seen: list[dict[str, Any]] = self.page.evaluate("seen")
        assert not [one for one in seen if one["what"] == "failed"], seen
        return seen

    def pressed(self, count: int) -> dict[str, float]:
        """The picture that the button orders, the page's `count`th; seconds from then."""
        pressed = "() => { const at = performance.now(); draw.click(); return at; }"
        at = self.page.evaluate(pressed)
        seen = [one for one in self.until("done", count) if one["at"] >= at]
        return _told(seen, at)

    def linked(self) -> dict[str, float]:
        """The picture that the link orders; seconds since the model was there, and the tab."""
        seen = self.until("done")
        ready = next(one["at"] for one in seen if one["what"] == "ready")
        return {"first_s": seen[-1]["at"] / 1000, "load_s": ready / 1000} | _told(seen, ready)

    def close(self) -> None:
        """Look at it for a while, and leave."""
        self.page.wait_for_timeout(LOOKED_AT_MS)
        self.page.close()


def _told(seen: list[dict[str, Any]], since: float) -> dict[str, float]:
    """Seconds until the finished picture and what was seen first, and how many previews came."""
    images = [one["at"] for one in seen if one["what"] == "image"]
    done = next(one["at"] for one in reversed(seen) if one["what"] == "done")
    return {
        "picture_s": (done - since) / 1000,
        "first_seen_s": (images[0] - since) / 1000,
        "previews": len(images) - 1,
    }


def opened(chromium: Any, link: str) -> dict[str, dict[str, float]]:
    """Pictures of a fresh profile: cold, warm, and again in the tab of that one."""
    with profile(chromium) as context:
        cold = Tab(context, link)
        found = {"cold": cold.linked()}
        cold.close()
        warm = Tab(context, link)
        return found | {"warm": warm.linked(), "again": warm.pressed(2)}


def idle(chromium: Any, link: str) -> dict[str, dict[str, float]]:
    """A picture of a fresh profile, some seconds after the model was there."""
    with profile(chromium) as context:
        tab = Tab(context, link.replace("&draw=1", ""))
        tab.until("ready")
        tab.page.wait_for_timeout(IDLE_MS)
        return {"idle": tab.pressed(1)}


KINDS = {"opened": opened, "idle": idle}


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="LABEL=BUNDLE...")
@click.option("--visits", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--kind", "kinds", type=click.Choice(list(KINDS)), multiple=True, default=list(KINDS))
@click.option("--previews/--no-previews", default=True, show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path), help="Put the rows here.")
def main(
    bundles: tuple[str, ...],
    visits: int,
    kinds: tuple[str, ...],
    previews: bool,
    target: Path | None,
) -> None:
    """Measure one picture under the bundle's own guidance."""
    from playwright.sync_api import sync_playwright

    version = browser_version()
    for label, _, path in (one.partition("=") for one in bundles):
        name = Bundle.open(Path(path)).manifest.class_names[CLASS]
        about = {"model": label, "browser": version, "previews_wanted": previews, "visits": visits}
        rows = []
        with site_of(Path(path), previews) as address, sync_playwright() as started:
            link = f"{address}?class={name}&seed={SEED}&draw=1"
            for kind in kinds:
                taken = [KINDS[kind](started.chromium, link) for _ in range(visits)]
                for visit in taken[0]:
                    what = f"page, {visit}" + ("" if previews else ", no previews")
                    rows.append(about | {"what": what} | _medians([one[visit] for one in taken]))
        for row in rows:
            click.echo(json.dumps(row))
        if target is not None:
            put(target, rows)


def _medians(times: list[dict[str, float]]) -> dict[str, Any]:
    return {what: round(statistics.median(one[what] for one in times), 2) for what in times[0]} | {
        "pictures_s": sorted(round(one["picture_s"], 2) for one in times)
    }


if __name__ == "__main__":
    main()
