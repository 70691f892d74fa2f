"""The engine's worker in a real browser: whole pictures, cancelling, and what can go wrong."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aim_runtime import Bundle, Generator

from ..runtime.tiny_bundle import TOKENS, copy_bundle, rehash, write_tiny_bundle
from .engine_parts import Site, installed, served

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
if CHROMIUM is None:
    pytest.skip("there is no Chromium here", allow_module_level=True)
# As root, and in a container with a small /dev/shm.
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
PATIENCE_MS = 120_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, npm: Path) -> Path:
    return installed(tmp_path_factory.mktemp("engine"), npm)


@pytest.fixture
def site(engine: Path) -> Iterator[Site]:
    with served({"npm": engine, "page": Path(__file__).parent}) as site:
        yield site


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "tiny")


class Page:
    """A page with a worker."""

    def __init__(self, browser: Any, site: Site, script: str = "") -> None:
        self.context = browser.new_context()
        self.context.set_default_timeout(PATIENCE_MS)
        if script:
            self.context.add_init_script(script)
        self.page = self.context.new_page()
        self.site = site
        self.page.goto(f"{site.url}/page/engine_page.html")
        self.page.evaluate("(url) => start(url)", f"{site.url}/npm/engine/worker.js")

    def start_behind(self, script: str) -> None:
        """Another worker, in which a module runs before that of the worker does."""
        name = f"behind-{zlib.crc32(script.encode())}.js"
        script += "\nawait import('./worker.js');\npostMessage({ type: 'there' });\n"
        (self.site.folders["npm"] / "engine" / name).write_text(script)
        self.page.evaluate("(url) => start(url)", f"{self.site.url}/npm/engine/{name}")
        self.until("there")

    def tell(self, *messages: dict[str, Any]) -> None:
        self.page.evaluate("(all) => all.forEach((one) => worker.postMessage(one))", list(messages))

    def load(self, bundle: Path, **options: Any) -> None:
        files, runtime = self.site.bundle(bundle), self.site.runtime()
        self.tell({"type": "load", "files": files, "runtime": runtime, **options})

    def until(self, kind: str, count: int = 1) -> list[dict[str, Any]]:
        """All that the worker said, once it has said so many of a kind."""
        said: list[dict[str, Any]] = self.page.evaluate(
            "([kind, count]) => until(kind, count)", [kind, count]
        )
        assert [one for one in said if one["type"] == "crash"] == []
        return said

    def error(self) -> dict[str, Any]:
        """The first error that the worker tells of."""
        error = next(one for one in self.until("error") if one["type"] == "error")
        assert "\n" not in error["message"]
        assert len(error["message"]) <= 300
        assert error["message"].endswith((".", "!", "?"))
        return error


@pytest.fixture
def page(browser: Any, site: Site) -> Iterator[Page]:
    page = Page(browser, site)
    yield page
    page.context.close()


def of(said: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [one for one in said if one["type"] == kind]


ORDER = {"type": "draw", "id": "a", "classes": [0, 1, 2, 2], "seeds": [7, 8, 9, 10]}


def test_four_pictures_have_the_tokens_that_python_draws(page: Page, tiny: Path) -> None:
    page.start_behind(
        """import { Engine } from "./engine.js";
        Object.defineProperty(Engine.prototype, "decodeMs", { get: () => 1e-3, set: () => {} });
        """  # so that there is time for previews
    )
    page.load(tiny, threads=2)
    page.tell({**ORDER, "every": 2, "top_k": 9})
    said = page.until("done")
    (ready,) = of(said, "ready")
    assert (ready["backend"], ready["threads"]) == ("wasm", 2)
    assert ready["manifest"]["name"] == "tiny"
    assert ready["manifest_sha256"] == Bundle.open(tiny).manifest_sha256
    with Generator.load(tiny, backend="cpu") as gen:
        expected = gen.generate(ORDER["classes"], seed=7, top_k=9)
    pictures = of(said, "picture")
    assert [one["index"] for one in pictures] == [0, 1, 2, 3]
    for one, tokens, image in zip(pictures, expected.tokens, expected.array, strict=True):
        assert one["tokens"] == tokens.tolist()
        rgba = np.array(one["rgba"]).reshape(one["height"], one["width"], 4)
        np.testing.assert_array_equal(rgba[..., :3], image)
    assert [one["step"] for one in of(said, "progress")] == list(range(1, TOKENS + 1))
    assert [one["step"] for one in of(said, "preview") if one["index"] == 0] == list(
        range(2, TOKENS, 2)
    )
    assert of(said, "done")[0]["seconds"] > 0
    loading = of(said, "loading")
    sizes = json.loads((tiny / "manifest.json").read_text(encoding="utf-8"))["files"]
    for name in ("step.weights", "prologue.onnx", "decoder.onnx"):
        last = [one for one in loading if one["file"] == name][-1]
        assert last["loaded"] == last["total"] == sizes[name]["size"]
    assert [one for one in loading if one["file"] == "onnxruntime"][-1]["loaded"] > 10**7


def test_the_model_in_the_box_with_threads_and_without(
    browser: Any, site: Site, page: Page, tmp_path: Path
) -> None:
    """Two pictures, one a worker, are those of Python; without isolation there is one thread."""
    folder = copy_bundle(Bundle.open().path, tmp_path / "emoji")
    page.load(folder, threads=2)
    page.tell({**ORDER, "classes": [5], "seeds": [1]})
    said = page.until("done")
    site.headers.clear()
    alone = Page(browser, site)
    alone.load(folder, threads=2)
    alone.tell({**ORDER, "classes": [44], "seeds": [2]})
    others = alone.until("done")
    alone.context.close()
    assert [of(some, "ready")[0]["threads"] for some in (said, others)] == [2, 1]
    with Generator.load(folder, backend="cpu") as gen:
        expected = gen.generate([5, 44], seed=1)
    drawn = [of(some, "picture")[0]["tokens"] for some in (said, others)]
    assert drawn == expected.tokens.tolist()


def test_orders_wait_for_one_another_and_are_cancelled(page: Page, tiny: Path) -> None:
    page.load(tiny)
    page.page.evaluate(
        """() => { window.reactions = [(news) => {
          if (news.type === "progress" && news.id === "a" && news.step === 1) {
            window.reactions = [];
            worker.postMessage({ type: "cancel", id: "a" });
          }
        }]; }"""
    )
    long = {**ORDER, "classes": [0] * 1000, "seeds": [0] * 1000}
    page.tell(long, {**ORDER, "id": "b"}, {**ORDER, "id": "c"}, {"type": "cancel", "id": "c"})
    said = page.until("cancelled", 2)
    said = page.until("done")
    page.tell({"type": "cancel", "id": "nobody"}, {**ORDER, "id": "a"})
    said = page.until("done", 2)
    assert [one["id"] for one in of(said, "cancelled")] == ["a", "c"]
    assert [one["id"] for one in of(said, "done")] == ["b", "a"]
    assert [one["id"] for one in of(said, "picture")] == ["b"] * 4 + ["a"] * 4
    stopped = [one["step"] for one in of(said, "progress") if one["id"] == "a"]
    assert max(stopped[: stopped.index(1, 1)]) < TOKENS


def test_steps_are_rehearsed_while_nobody_waits(page: Page, tiny: Path) -> None:
    """Without an order there are steps; an order ends them, and draws what it draws otherwise."""
    script = """import { WasmRows } from "./wasm_rows.js";
    const { step } = WasmRows.prototype;
    WasmRows.prototype.step = function (tokens, position) {
      postMessage({ type: "stepped", rows: tokens.length });
      return step.call(this, tokens, position);
    };
    """
    page.start_behind(script)
    page.load(tiny)
    said = page.until("stepped", TOKENS)
    assert {one["rows"] for one in of(said, "stepped")} == {2}
    page.tell({**ORDER, "top_k": 9})
    said = page.until("done")
    assert len([one for one in of(said, "stepped") if one["rows"] == 8]) == TOKENS
    with Generator.load(tiny, backend="cpu") as gen:
        expected = gen.generate(ORDER["classes"], seed=7, top_k=9)
    assert [one["tokens"] for one in of(said, "picture")] == expected.tokens.tolist()


def test_webassembly_is_compiled_from_its_address(page: Page, tiny: Path) -> None:
    """Of bytes browsers keep no optimised code for the next visit."""
    script = """const { compileStreaming } = WebAssembly;
    WebAssembly.compileStreaming = async (answer) => {
      postMessage({ type: "compiled", url: (await answer).url });
      return compileStreaming.call(WebAssembly, answer);
    };
    WebAssembly.compile = () => postMessage({ type: "compiled", url: "" });
    """
    page.start_behind(script)
    page.load(tiny)
    assert [one["url"] for one in of(page.until("ready"), "compiled")] == [
        page.site.runtime()["wasm"]
    ]


def test_orders_that_are_wrong_leave_the_worker_well(page: Page, tiny: Path) -> None:
    page.load(tiny)
    page.tell({**ORDER, "classes": [0, 1, 2, 3]}, {**ORDER, "id": "b"})
    said = page.until("done")
    error = page.error()
    assert (error["id"], error["code"]) == ("a", "request")
    assert error["message"] == "Class is 3; it must be a whole number from 0 to 2."
    assert len(of(said, "picture")) == 4


def damaged(page: Page, bundle: Path) -> dict[str, Any]:
    page.load(bundle)
    error = page.error()
    assert error["id"] is None
    return error


def test_files_that_are_cut_short_altered_or_missing(
    browser: Any, site: Site, tiny: Path, tmp_path: Path
) -> None:
    found = []
    for spoil in ("cut", "altered", "missing"):
        folder = copy_bundle(tiny, tmp_path / spoil)
        path = folder / "step.weights"
        data = path.read_bytes()
        if spoil == "cut":
            site.cuts[f"/{spoil}/step.weights"] = 100
        page = Page(browser, site)
        if spoil == "altered":
            path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        files = site.bundle(folder)
        if spoil == "missing":
            path.unlink()
        page.tell({"type": "load", "files": files, "runtime": site.runtime()})
        found.append(page.error())
        page.context.close()
    assert [one["code"] for one in found] == ["truncated", "altered", "network"]
    assert {one["file"] for one in found} == {"step.weights"}
    assert {one["id"] for one in found} == {None}


def test_a_bundle_of_a_newer_format(page: Page, tiny: Path, tmp_path: Path) -> None:
    folder = copy_bundle(tiny, tmp_path / "newer")
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 9}))
    assert damaged(page, folder)["code"] == "newer"


def test_a_graph_that_is_none(page: Page, tiny: Path, tmp_path: Path) -> None:
    folder = copy_bundle(tiny, tmp_path / "broken")
    (folder / "decoder.onnx").write_bytes(b"\x08\x0anonsense")
    rehash(folder)
    error = damaged(page, folder)
    assert error["code"] == "bundle"
    assert "decoder.onnx" in error["message"]


def test_a_server_that_is_gone(page: Page, tiny: Path) -> None:
    files = dict.fromkeys(page.site.bundle(tiny), "http://127.0.0.1:1/x")
    page.tell({"type": "load", "files": files, "runtime": page.site.runtime()})
    assert page.error()["code"] == "network"


NO_MEMORY = "class { constructor() { throw new RangeError('could not allocate memory'); } }"


@pytest.mark.parametrize(
    ("lacks", "code", "says"),
    [
        ("self.WebAssembly = undefined;", "browser", "no WebAssembly"),
        ("WebAssembly.validate = () => false;", "browser", "no SIMD"),
        (
            "Object.defineProperty(self.crypto, 'subtle', { value: undefined });",
            "browser",
            "over HTTPS",
        ),
        (f"WebAssembly.Memory = {NO_MEMORY};", "memory", "too little memory"),
    ],
)
def test_a_browser_that_lacks_something(
    page: Page, tiny: Path, lacks: str, code: str, says: str
) -> None:
    """As the worker finds it: a module that runs before the worker's takes it away."""
    page.start_behind(lacks)
    page.load(tiny)
    error = page.error()
    assert error["code"] == code
    assert says in error["message"]
