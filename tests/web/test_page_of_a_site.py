"""A site in a real browser: what a person sees and does, and what goes wrong without harm."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aim_runtime import Bundle
from aim_runtime.bundle import write_bundle
from aim_runtime.images import read_settings
from aim_web import Package, write_site

from ..browser import PATIENCE_MS, PHONE, Watched
from .site_parts import Host

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
expect.set_options(timeout=PATIENCE_MS)

ROOT = Path(__file__).parents[2]
# The stand-in for the engine takes so many milliseconds a token.
SLOW = "200"


def draw(page: Any, *names: str, count: int = 1) -> None:
    for name in names:
        page.fill("#class-input", name)
        page.keyboard.press("Enter")
    page.fill("#count", str(count))
    page.click("#draw")


def group(page: Any, state: str = "done", at: int = 0) -> Any:
    """The group at that place from the top, once it is in that state."""
    found = page.locator(".group").nth(at)
    expect(found).to_have_attribute("data-state", state)
    return found


def loaded(page: Any) -> None:
    expect(page.locator(".where")).to_contain_text("thread")


def kept(page: Any) -> list[str]:
    """The paths of all files that the browser keeps."""
    found = page.evaluate(
        """async () => {
            const found = [];
            for (const name of await caches.keys())
                for (const {url} of await (await caches.open(name)).keys())
                    found.push(new URL(url).pathname.slice(1));
            return found;
        }"""
    )
    return sorted(found)


def until(page: Any, holds: Callable[[], bool]) -> None:
    for _ in range(PATIENCE_MS // 50):
        if holds():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it never came")


def all_kept(page: Any, names: tuple[str, ...] = ("step.weights", ".wasm")) -> None:
    until(page, lambda: all(any(path.endswith(n) for path in kept(page)) for n in names))


def test_loads_draws_and_says_how_to_draw_it_again(watched: Watched, host: Host) -> None:
    host.slow = "step.weights"
    page = watched.open(host.url)
    loading = page.locator(".loading")
    expect(loading).to_contain_text(re.compile(r"Loading the model: \d+\.\d of \d+\.\d MB, once"))
    page.fill("#seed", "7")
    draw(page, "dog", count=2)
    group(page, "waiting")  # it can be ordered before all is there
    host.go.set()
    found = group(page)
    expect(loading).to_be_hidden()
    expect(page.locator(".where")).to_contain_text("on 2 threads")  # the host isolates
    expect(found.locator("img")).to_have_count(2)
    found.locator(".picture").nth(1).click()
    assert page.locator("#details-command").inner_text() == (
        "aim generate --bundle tiny --class dog --seed 8 "
        "--cfg-scale 2 --temperature 1 --top-k 0 --top-p 1"
    )
    with page.expect_download() as download:
        page.click("#details-download")
    assert download.value.suggested_filename == "dog_seed8.png"
    path = Path(download.value.path())
    settings = read_settings(path)
    assert (settings["class"], settings["class_name"], settings["seed"]) == (1, "dog", 8)
    assert settings["bundle"] == "tiny"
    with Image.open(path) as image:
        image.load()
        assert image.mode == "RGB"
        corner = tuple((8 * 31 + 57 + colour * 71) % 256 for colour in range(3))
        assert image.getpixel((0, 0)) == corner
        assert json.loads(image.text["aim"]) == settings
        assert "seed: 8" in image.text["parameters"]


def test_with_few_bits_it_says_that_python_draws_another(
    watched: Watched, host: Host, tiny: Path, package: Path, tmp_path: Path
) -> None:
    files = tmp_path / "files"
    shutil.copytree(tiny, files)
    (files / "manifest.json").unlink()
    manifest = dataclasses.replace(Bundle.open(tiny).manifest, precision="int8")
    few_bits = write_bundle(manifest, files, tmp_path / "int8")
    notes = []
    for bundle in (Bundle.open(tiny), few_bits):
        write_site(bundle, Package.at(package), host.folder)
        page = watched.open(f"{host.url}?class=dog&seed=3&draw=1")
        group(page).locator(".picture").click()
        notes.append(page.get_by_text("Python, which adds in another order").count())
        expect(page.locator("#details-command")).to_contain_text("--seed 3")
    assert notes == [0, 1]


def test_pictures_form_several_in_a_row_and_cancel(watched: Watched, host: Host) -> None:
    page = watched.open(host.url)
    loaded(page)
    page.fill("#cfg_scale", SLOW)
    draw(page, "dog")
    draw(page)
    forming = group(page, "drawing", 1)
    expect(forming.locator("img")).to_have_attribute("src", re.compile("^data:image/png"))
    group(page, "waiting").get_by_role("button", name=re.compile("Cancel")).click()
    expect(group(page, "failed")).to_contain_text("Cancelled.")
    group(page, "done", 1)
    group(page, "failed").get_by_role("button", name="Draw it after all").click()
    group(page, "drawing").get_by_role("button", name=re.compile("Cancel")).click()
    group(page, "failed")
    page.fill("#cfg_scale", "4")
    draw(page)
    group(page)


def test_progress_is_painted_ten_times_a_second(watched: Watched, host: Host) -> None:
    """Tokens come faster, and on machines of few cores painting takes the time of steps."""
    page = watched.open(host.url)
    loaded(page)
    page.evaluate(
        """() => {
            window.painted = [];
            new MutationObserver((changes) => {
                const seen = ({ target }) => target.matches(".group progress") && target.value;
                if (changes.some(seen)) painted.push(performance.now());
            }).observe(document, { subtree: true, attributes: true });
        }"""
    )
    page.fill("#cfg_scale", "40")  # ms a token of the stand-in
    draw(page, "dog")
    group(page)
    times = page.evaluate("painted")
    assert 1 <= len(times) <= (times[-1] - times[0]) / 100 + 2


def test_works_without_a_network_once_it_was_open(watched: Watched, host: Host) -> None:
    page = watched.open(host.url)
    loaded(page)
    all_kept(page)
    host.gone = True
    asked = len(host.asked)
    other = watched.open_in(page.context, f"{host.url}?class=dog&seed=3&draw=1")
    group(other)
    assert [path for path in host.asked[asked:] if "/" in path] == []
    expect(other.locator(".where")).to_contain_text("on 2 threads")


def test_threads_on_a_host_that_sends_no_headers(watched: Watched, host: Host) -> None:
    host.isolates = False
    page = watched.open(f"{host.url}?class=dog&seed=3&draw=1")
    group(page)
    expect(page.locator(".where")).to_contain_text("on 2 threads")
    assert page.evaluate("crossOriginIsolated") is True
    assert "draw=1" in page.url
    assert host.asked.count("index.html") <= 4  # two loads, two of the service worker


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("shortened", "The model's file step.weights came cut short."),
        ("cuts_off", "A file of the model does not arrive."),
    ],
)
def test_a_file_that_is_cut_short_is_told_and_not_kept(
    watched: Watched, host: Host, how: str, sentence: str
) -> None:
    setattr(host, how, "step.weights")
    page = watched.open(host.url)
    failed = page.locator(".loading[data-state=failed]")
    expect(failed).to_contain_text(sentence)
    draw(page, "dog")
    expect(group(page, "failed")).to_contain_text(sentence)
    assert not [path for path in kept(page) if path.endswith("step.weights")]
    setattr(host, how, "")
    failed.get_by_role("button", name="Try again").click()
    loaded(page)
    group(page, "failed").get_by_role("button", name="Try again").click()
    group(page)
    all_kept(page)


def test_a_file_with_a_wrong_checksum_is_not_kept(watched: Watched, host: Host) -> None:
    host.altered = "step.weights"
    page = watched.open(host.url)
    loaded(page)  # the stand-in compares sizes only
    all_kept(page, ("decoder.weights", ".wasm"))
    page.wait_for_timeout(200)
    assert not [path for path in kept(page) if path.endswith("step.weights")]


def test_a_tab_closed_while_loading_leaves_nothing_half(watched: Watched, host: Host) -> None:
    host.slow = "step.weights"
    page = watched.open(host.url)
    expect(page.locator(".loading")).to_contain_text(" MB, once")
    until(page, lambda: any(path.endswith("step.weights") for path in host.asked))
    page.close()
    host.go.set()
    other = watched.open_in(watched.contexts[0], host.url)
    loaded(other)
    draw(other, "dog")
    group(other)
    all_kept(other)


def test_a_newer_site_replaces_what_was_kept(
    watched: Watched, host: Host, tiny: Path, package: Path, tmp_path: Path
) -> None:
    page = watched.open(host.url)
    loaded(page)
    all_kept(page)
    old = {path.partition("/")[0] for path in kept(page) if "/" in path}
    page.close()
    bundle = Bundle.open(tiny)
    changed = dataclasses.replace(bundle.manifest, name="newer", license="MIT")
    files = tmp_path / "files"
    shutil.copytree(tiny, files)
    (files / "manifest.json").unlink()
    newer = write_bundle(changed, files, tmp_path / "newer")
    write_site(newer, Package.at(package), host.folder)
    context = watched.contexts[0]
    other = watched.open_in(context, host.url)
    expect(other.locator("#model")).to_contain_text("newer")
    draw(other, "dog")
    group(other)
    gone = {folder for folder in old if folder.startswith("model-")}
    assert gone
    until(other, lambda: not [p for p in kept(other) if p.partition("/")[0] in gone])
    # What the older page was made of goes once the newer one is in charge.
    until(other, lambda: sum(" shell " in name for name in other.evaluate("caches.keys()")) == 1)


def test_no_room_to_keep_it_is_told_and_it_draws(watched: Watched, host: Host) -> None:
    host.slow = "manifest.json"
    page = watched.open(host.url)
    session = page.context.new_cdp_session(page)
    origin = host.url.rstrip("/")
    session.send("Storage.overrideQuotaForOrigin", {"origin": origin, "quotaSize": 1})
    host.go.set()
    loaded(page)
    expect(page.locator("#notice")).to_contain_text("no room to keep the model")
    assert not [path for path in kept(page) if "model-" in path]
    draw(page, "dog")
    group(page)


def test_without_a_service_worker_it_draws_and_keeps_nothing(watched: Watched, host: Host) -> None:
    host.isolates = False  # browsers take no notice of such headers there, and complain
    page = watched.open(host.insecure_url)
    expect(page.locator(".where")).to_contain_text("on one thread")
    draw(page, "dog")
    group(page)
    assert page.evaluate("'serviceWorker' in navigator") is False


def test_an_order_that_fails_is_one_sentence(watched: Watched, host: Host) -> None:
    page = watched.open(host.url)
    page.fill("#seed", "666")
    draw(page, "dog")
    expect(group(page, "failed")).to_contain_text("The order cannot be drawn.")
    page.fill("#seed", "667")  # the worker cannot be relied on afterwards: another one draws
    draw(page)
    expect(group(page, "failed")).to_contain_text("There is too little memory for it.")
    page.fill("#seed", "1")
    draw(page)
    group(page)


def test_pictures_that_are_there_stay_when_their_order_is_cancelled(
    watched: Watched, host: Host
) -> None:
    page = watched.open(host.url)
    loaded(page)
    page.fill("#seed", "600")  # of which the engine's stand-in draws one after the other
    page.fill("#cfg_scale", SLOW)
    draw(page, "dog", count=3)
    found = group(page, "drawing")
    expect(found.locator(".card.done")).to_have_count(1)
    found.get_by_role("button", name="Remove dog, seed 600").click(force=True)
    found.get_by_role("button", name=re.compile("Cancel")).click()
    group(page, "failed")
    page.fill("#cfg_scale", "4")
    found.get_by_role("button", name="Draw it after all").click()
    group(page)
    expect(found.locator(".card.done")).to_have_count(2)
    expect(found.locator(".seed")).to_have_text(["seed 601", "seed 602"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_by_the_rules_of_axe(
    watched: Watched, host: Host, npm: Path, scheme: str
) -> None:
    host.slow = host.shortened = "step.weights"
    page = watched.open(host.url, color_scheme=scheme, reduced_motion="reduce")
    axe = (npm / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
    page.evaluate(axe)

    def check() -> None:
        found = page.evaluate("axe.run().then(({violations}) => violations)")
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []

    expect(page.locator(".loading[data-state=loading]")).to_contain_text(" MB, once")
    check()
    host.go.set()
    expect(page.locator(".loading[data-state=failed]")).to_be_visible()
    check()


def test_fits_a_phone(watched: Watched, host: Host) -> None:
    host.slow = host.shortened = "step.weights"
    page = watched.open(host.url, **PHONE)

    def fits() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        box = page.locator(".loading").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360

    expect(page.locator(".loading[data-state=loading]")).to_contain_text(" MB, once")
    fits()
    host.go.set()
    expect(page.locator(".loading[data-state=failed]")).to_be_visible()
    fits()
    assert page.get_by_role("button", name="Try again").bounding_box()["height"] >= 43.5


@pytest.mark.parametrize("folder", ["page", "service_worker"])
def test_types(npm: Path, folder: str) -> None:
    """The JSDoc types hold under the strict rules of TypeScript."""
    project = ROOT / "web" / folder / "tsconfig.json"
    checked = subprocess.run(
        [npm / ".bin" / "tsc", "--project", project], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
