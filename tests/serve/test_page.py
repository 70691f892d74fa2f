"""The page that `aim serve` shows, in a real browser: what a person does with it, and sees."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aim_runtime.class_names import ClassNames
from aim_runtime.images import read_settings

from ..browser import PATIENCE_MS, PHONE, Watched
from .page_server import LIMITS, PAGE, Behaviour, page_server

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Behaviour]:
    with page_server(tmp_path) as behaviour:
        yield behaviour


def choose(page: Any, *names: str) -> None:
    for name in names:
        page.fill("#class-input", name)
        page.keyboard.press("Enter")


def draw(page: Any, *names: str, count: int = 1) -> None:
    choose(page, *names)
    page.fill("#count", str(count))
    page.click("#draw")


def group(page: Any, state: str = "done", at: int = 0) -> Any:
    """The group at that place from the top, once it is in that state."""
    found = page.locator(".group").nth(at)
    expect(found).to_have_attribute("data-state", state)
    return found


def sources(found: Any) -> list[str]:
    return [image.get_attribute("src") for image in found.locator("img").all()]


def file_bytes(page: Any, picture: Any) -> bytes:
    with page.expect_download() as download:
        picture.click()
    return Path(download.value.path()).read_bytes()


def test_drawn_by_keyboard_alone(watched: Watched, server: Behaviour) -> None:
    server.hold.clear()
    page = watched.open(server.url)
    page.keyboard.press("Tab")
    field = page.locator("#class-input")
    expect(field).to_be_focused()
    page.keyboard.press("ArrowDown")  # the first of all
    expect(page.locator("[role=option]")).to_have_count(7)
    expect(page.locator(".active")).to_have_text(re.compile("cat-face"))
    page.keyboard.press("Escape")
    expect(field).to_have_attribute("aria-expanded", "false")
    page.keyboard.type("rt")  # inside a name: the heart, the box
    expect(page.locator("[role=option]")).to_have_count(2)
    page.keyboard.press("ArrowDown")
    option = field.get_attribute("aria-activedescendant")
    assert "box" in page.locator(f"#{option}").inner_text()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    page.keyboard.type("6")  # by number
    page.keyboard.press("Enter")
    expect(page.locator("#chips li")).to_have_text(["heart", "zodiac"])
    page.keyboard.press("Backspace")
    expect(page.locator("#chips li")).to_have_text(["heart"])
    page.keyboard.press("Enter")

    forming = group(page, "drawing")
    expect(forming.locator("img")).to_have_count(4)
    assert all(source.startswith("data:image/png") for source in sources(forming))
    # One row of four tokens is in the preview; the next one is marked until it is, too.
    rows = re.compile(re.escape("polygon(0% 25%, 100% 25%, 100% 50%, 0% 50%"))
    expect(forming.locator(".picture .tokens").first).to_have_attribute("style", rows)
    page.evaluate("""() => {
        const image = document.querySelector('.picture img'), seen = window.seen = new Set();
        new MutationObserver(() => seen.add(image.src)).observe(image, {attributes: true});
    }""")
    server.hold.set()
    done = sources(group(page))
    assert len(done) == 4
    assert all(source.startswith("blob:") for source in done)
    assert page.evaluate("seen.size") >= 2
    order = server.orders[0]
    assert order["classes"] == ["heart"] * 4
    assert {name: order[name] for name in ("cfg_scale", "temperature", "top_k", "top_p")} == {
        "cfg_scale": 3,
        "temperature": 0.8,
        "top_k": 0,
        "top_p": 0.95,
    }
    page.keyboard.press("Tab")  # on to the pictures: no trap on the way
    for _ in range(30):
        if page.evaluate("document.activeElement.classList.contains('picture')"):
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#details")).to_be_visible()
    title = page.locator("#details-facts")
    first = title.inner_text()
    page.keyboard.press("ArrowRight")
    assert title.inner_text() != first
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.classList.contains('picture')")


def test_several_at_once_and_cancel(watched: Watched, server: Behaviour) -> None:
    server.hold.clear()
    page = watched.open(server.url)
    draw(page, "heart", count=2)
    draw(page, "dog")  # the chip of the heart stays: both
    for at in range(2):
        expect(group(page, "drawing", at).locator("img")).to_have_count(2)
    assert server.drawing == 2
    group(page, "drawing", 1).get_by_role("button", name="Cancel heart").click()
    expect(group(page, "failed", 1)).to_contain_text("Cancelled.")
    wait_until(page, lambda: server.left == 1 and server.drawing == 1)
    server.hold.set()
    expect(group(page).locator("img")).to_have_count(2)
    assert server.orders[1]["classes"] == ["heart", "dog"]
    group(page, "failed", 1).get_by_role("button", name="Draw it after all").click()
    group(page, "done", 1)
    assert server.orders[2] == server.orders[0]


def test_more_groups_than_connections_wait_their_turn(watched: Watched, server: Behaviour) -> None:
    server.hold.clear()
    page = watched.open(server.url)
    for _ in range(6):
        draw(page, count=1)
    wait_until(page, lambda: server.drawing == 4)
    # The browser would have no connection left for this.
    assert page.evaluate("fetch('readyz').then(answer => answer.status)") == 200
    group(page, "waiting", 0).get_by_role("button", name=re.compile("Cancel")).click()
    group(page, "failed", 0)
    server.hold.set()
    for at in range(1, 6):
        group(page, "done", at)
    assert len(server.orders) == 5


def test_a_link_draws_the_same_picture(watched: Watched, server: Behaviour) -> None:
    context = {"permissions": ["clipboard-read", "clipboard-write"]}
    page = watched.open(server.url, **context)
    page.fill("#cfg_scale", "4.5")
    page.fill("#top_k", "50")
    page.fill("#seed", str(2**53 - 1))
    draw(page, "tench")
    found = group(page)
    assert server.orders[0]["seed"] == 2**53 - 1
    expect(found).to_contain_text("guidance 4.5 · top-k 50")
    found.locator(".picture").click()
    page.click("#copy-link")
    expect(page.locator("#copy-link")).to_have_text("Copied")
    link = page.evaluate("navigator.clipboard.readText()")
    page.click("#copy-command")
    expect(page.locator("#copy-command")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == (
        f"aim generate --bundle tiny --class 'tench, Tinca tinca' --seed {2**53 - 1} "
        "--cfg-scale 4.5 --temperature 0.8 --top-k 50 --top-p 0.95"
    )
    first = file_bytes(page, page.locator("#details-download"))

    other = watched.open(link)
    again = group(other)
    assert server.orders[1] == server.orders[0]
    expect(other.locator("#cfg_scale")).to_have_value("4.5")
    expect(other.locator("#chips li")).to_have_text(["tench, Tinca tinca"])
    again.locator(".picture").click()
    assert file_bytes(other, other.locator("#details-download")) == first


def test_download_has_a_name_and_the_settings(watched: Watched, server: Behaviour) -> None:
    page = watched.open(server.url)
    page.fill("#seed", "7")
    draw(page, "heart-shaped")
    found = group(page)
    found.hover()
    with page.expect_download() as download:
        found.get_by_role("link", name="Download heart-shaped box, seed 7").click()
    assert download.value.suggested_filename == "heart-shaped-box_seed7.png"
    with Image.open(io.BytesIO(Path(download.value.path()).read_bytes())) as image:
        assert json.loads(image.text["aim"])["seed"] == 7


def test_more_like_this_and_remove(watched: Watched, server: Behaviour) -> None:
    page = watched.open(server.url)
    draw(page, "zodiac", count=2)
    group(page).locator(".picture").first.click()
    page.click("#details-more")
    group(page, "done", 1)
    group(page)
    first, second = server.orders
    assert second["classes"] == ["zodiac"]
    assert second["seed"] != first["seed"]
    urls = sources(page.locator("#gallery"))
    assert [in_memory(page, url) for url in urls] == [True] * 3
    page.locator(".group").nth(1).locator(".picture").first.click()
    page.click("#details-remove")
    page.click("#details-remove")
    page.click("#details-remove")
    expect(page.locator("#details")).to_be_hidden()
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#class-input")).to_be_focused()
    assert [in_memory(page, url) for url in urls] == [False] * 3


def test_the_oldest_pictures_go(
    watched: Watched, server: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LIMITS, "n", 110)
    server.step_s = 0
    page = watched.open(server.url)
    draw(page, "dog", count=110)
    first = group(page).locator("img").last.get_attribute("src")
    page.click("#draw")
    group(page)
    expect(page.locator(".card")).to_have_count(200)
    expect(page.locator(".group").last.locator(".card")).to_have_count(90)
    assert not in_memory(page, first)


@pytest.mark.parametrize("fails_with", ["the model ran out of numbers", ""])
def test_an_error_is_one_sentence_and_can_be_tried_again(
    watched: Watched, server: Behaviour, fails_with: str
) -> None:
    server.fails_with, server.cuts_off = fails_with, not fails_with
    page = watched.open(server.url)
    draw(page, "dog")
    failed = group(page, "failed")
    expect(failed.locator(".message p")).to_have_text(
        "The model ran out of numbers."
        if fails_with
        else "The connection was lost before the pictures were done."
    )
    server.fails_with, server.cuts_off = "", False
    failed.get_by_role("button", name="Try again").click()
    group(page)
    assert server.orders[0] == server.orders[1]


def test_a_full_queue_is_tried_again(watched: Watched, server: Behaviour) -> None:
    server.full = 1
    page = watched.open(server.url)
    draw(page, "dog")
    expect(group(page, "failed")).to_contain_text("The queue is full. Trying again in 2 s.")
    expect(page.locator(".group")).to_contain_text("in 1 s.")
    group(page)


def test_a_key_is_asked_for_and_kept(watched: Watched, server: Behaviour) -> None:
    server.key = "secret"
    page = watched.open(server.url, ready=False)
    page.fill("#key-input", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-error")).to_have_text("The server did not accept this key.")
    page.fill("#key-input", "secret")
    page.keyboard.press("Enter")
    expect(page.locator("#draw")).to_be_enabled()
    draw(page, "dog")
    group(page)
    page.reload()
    expect(page.locator("#draw")).to_be_enabled()
    expect(page.locator("#key")).to_be_hidden()


def test_a_server_that_goes_and_comes_back(watched: Watched, tmp_path: Path) -> None:
    with page_server(tmp_path) as server:
        page = watched.open(server.url)
        server.not_ready = "the server is shutting down"
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        expect(page.locator("#notice")).to_have_text("The server is shutting down.")
        port = int(server.url.rstrip("/").rpartition(":")[2])
    draw(page, "dog")
    expect(group(page, "failed")).to_contain_text("The server does not answer.")
    expect(page.locator("#notice")).to_have_text(re.compile("does not answer"))
    with page_server(tmp_path, port):
        expect(page.locator("#notice")).to_have_text("The server is back.")
        page.get_by_role("button", name="Try again").click()
        group(page)


def test_wrong_settings_are_told_where_they_are(watched: Watched, server: Behaviour) -> None:
    page = watched.open(f"{server.url}?class=dog&seed=x&top_p=0&temperature=0.8&draw=1")
    expect(page.locator("#seed-error")).to_contain_text("must be a whole number from 0 to")
    expect(page.locator("#top_p-error")).to_have_text("Top-p must be a number above 0, up to 1.")
    expect(page.locator("#top_p")).to_be_focused()
    page.click("#reset")
    expect(page.locator("#settings-state")).to_have_text("defaults")
    choose(page, "no such")
    expect(page.locator("#class-error")).to_have_text("This model has no class “no such”.")
    page.fill("#class-input", "")
    page.fill("#count", "11")
    page.click("#draw")
    expect(page.locator("#count-error")).to_have_text("There may be 1 to 10 pictures.")
    page.goto(f"{server.url}?class=<b>&draw=1")
    expect(page.locator("#class-error")).to_contain_text("“<b>”, which this model does not have")
    assert not server.orders


@pytest.mark.parametrize(
    "names",
    [
        ["cat, feline", "Dog", "dog", "red panda", "3", "1984", "it's", "-v"],
        ["10", "0", "2", "1"],
        ["É", "tench, Tinca tinca", "Tinca tinca", " heart "],
    ],
)
def test_classes_are_named_so_that_the_runtime_finds_them(
    watched: Watched, server: Behaviour, names: list[str]
) -> None:
    known = ClassNames(names)
    classes = [{"id": known.number(index), "name": name} for index, name in enumerate(names)]
    page = watched.open(server.url)
    told = page.evaluate(
        """async classes => {
            const { Names, commandFor } = await import(`${location.origin}/page/references.js`);
            const names = new Names(classes);
            return classes.map(one => {
                const reference = names.reference(one);
                const settings = {cfg_scale: 1, temperature: 1, top_k: 0, top_p: 1};
                const command = commandFor({class: one, seed: 1, settings}, reference, "");
                return [reference, command, names.find(String(reference)).id];
            });
        }""",
        classes,
    )
    for index, (reference, command, found) in enumerate(told):
        assert known.index(reference) == index
        assert found == classes[index]["id"]
        words = shlex.split(command)
        assert known.index(words[words.index("--class") + 1]) == index


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(watched: Watched, server: Behaviour, scheme: str) -> None:
    page = watched.open(server.url, color_scheme=scheme, **PHONE)

    def fits() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        small = page.evaluate(
            """[...document.querySelectorAll('button, a, input, summary, [role=option]')]
            .filter(one => one.checkVisibility() && !one.closest('.unseen'))
            .map(one => [one.id || one.outerHTML, one.getBoundingClientRect()])
            .filter(([, box]) => box.width && (box.height < 43.5 || box.width < 32))
            .map(([name]) => name)"""
        )
        assert small == []

    fits()
    page.tap("#class-toggle")
    page.locator("[role=option]", has_text="tench").tap()
    expect(page.locator("#chips li")).to_have_count(1)
    page.tap("summary")
    fits()
    page.tap("summary")
    page.tap("#draw")
    group(page)
    fits()
    page.locator(".picture").first.tap()
    expect(page.locator("#details")).to_be_visible()
    fits()
    page.tap("#details-close")


def test_with_the_model_in_the_box(watched: Watched, tmp_path: Path) -> None:
    """A link draws; the command that the page shows draws the same; a cancel frees the slot."""
    aim = [sys.executable, "-m", "aim_cli"]
    with served([*aim, "serve", "--port", "0"]) as url:
        page = watched.open(f"{url}?class=heart&seed=3&top_k=50&draw=1")
        group(page).locator(".picture").click()
        command = shlex.split(page.locator("#details-command").inner_text())
        with page.expect_download() as download:
            page.click("#details-download")
        drawn = Path(download.value.path())
        page.click("#details-more")
        wait_until(page, lambda: slots_in_use(page) == 1)
        page.get_by_role("button", name="Cancel heart").click()
        wait_until(page, lambda: slots_in_use(page) == 0)
    assert command[0] == "aim"
    subprocess.run([*aim, *command[1:], "--out", tmp_path, "--quiet"], check=True, timeout=120)
    same = tmp_path / download.value.suggested_filename
    assert same.name == "heart_seed3.png"
    with Image.open(drawn) as one, Image.open(same) as other:
        assert one.tobytes() == other.tobytes()
    assert read_settings(drawn) == read_settings(same)


@contextmanager
def served(command: list[str]) -> Iterator[str]:
    """A server of its own process, at the address that it says."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = next(line for line in process.stderr or () if "http://" in line)
            yield re.findall(r"http://[^ ]+", said)[0] + "/"
        finally:
            process.terminate()
            process.communicate(timeout=30)


def slots_in_use(page: Any) -> float:
    text = page.evaluate("fetch('metrics').then(answer => answer.text())")
    return float(re.findall(r"^aim_slots_in_use (\S+)", text, re.M)[0])


def test_types(npm: Path) -> None:
    """The JSDoc types hold under the strict rules of TypeScript."""
    checked = subprocess.run(
        [npm / ".bin" / "tsc", "--project", PAGE / "tsconfig.json"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_by_the_rules_of_axe(
    watched: Watched, server: Behaviour, npm: Path, scheme: str
) -> None:
    axe = (npm / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
    page = watched.open(server.url, color_scheme=scheme, reduced_motion="reduce")
    page.evaluate(axe)

    def check() -> None:
        found = page.evaluate("axe.run().then(({violations}) => violations)")
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []

    check()
    page.fill("#class-input", "a")
    check()
    page.keyboard.press("Enter")
    server.hold.clear()
    draw(page, "dog")
    expect(group(page, "drawing").locator("img")).to_have_count(2)
    check()
    server.hold.set()
    group(page)
    server.fails_with = "it failed"
    draw(page)
    group(page, "failed")
    check()
    page.locator(".done .picture").first.click()
    check()


def in_memory(page: Any, url: str) -> bool:
    loads = """url => new Promise(resolve => {
        const image = new Image();
        image.onload = () => resolve(true);
        image.onerror = () => resolve(false);
        image.src = url;
    })"""
    return bool(page.evaluate(loads, url))


def wait_until(page: Any, holds: Any) -> None:
    for _ in range(PATIENCE_MS // 50):
        if holds():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it never came")
