"""The engine in the browser: `python benchmarks/web.py fp16=A int8=B ... --threads 1,2`.

Each bundle is drawn with in a headless Chromium over loopback, with each number of threads: one
picture in a fresh profile, ordered with the model (cold); one in a new tab of the same (warm); one
in another fresh profile, ordered some seconds after the model was there (idle); and one by the
backend `cpu` of this process with as many threads. Needs `npm ci --prefix web`, Playwright and a
Chromium.
Prints a line a row; with --json it puts them into a file, in the place of what that has of them.
"""

from __future__ import annotations

import functools
import gzip
import json
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click

from aim_cli.commands.bench import machine
from aim_runtime import Bundle, Generator

WEB = Path(__file__).parents[1] / "web"
DIST = WEB / "node_modules" / "onnxruntime-web" / "dist"
RUNTIME = {
    "module": "ort.wasm.min.mjs",
    "loader": "ort-wasm-simd-threaded.mjs",
    "wasm": "ort-wasm-simd-threaded.wasm",
}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or "chromium"
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
WARM_UP = 8
SEED, CLASS = 1, 12
IDLE_MS = 5000
# Until browsers have put aside the code that they optimised.
LOOKED_AT_MS = 3000
PAGE = """<!doctype html><script type="module">
window.draw = (order, load, idle) => new Promise((resolve, reject) => {
  const said = [];
  const worker = new Worker("/engine/worker.js", { type: "module" });
  worker.onmessage = ({ data }) => {
    said.push({ type: data.type, at: performance.now(), threads: data.threads,
      graphs: data.graphs, tokens: data.tokens });
    if (data.type === "ready" && idle) setTimeout(() => worker.postMessage(order), idle);
    if (data.type === "error") reject(new Error(data.message));
    if (data.type === "done") { worker.terminate(); resolve(said); }
  };
  worker.postMessage(load);
  if (!idle) worker.postMessage(order);
});
</script>"""


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "max-age=3600")
        super().end_headers()


@contextmanager
def served(bundles: dict[str, Path]) -> Iterator[str]:
    """A site of the engine, ONNX Runtime and the bundles; its address."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "index.html").write_text(PAGE)
        for link, target in {"engine": WEB / "engine", "ort": DIST, **bundles}.items():
            (root / link).symlink_to(target.resolve())
        handler = functools.partial(_Handler, directory=name)
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def visit(context: Any, url: str, load: dict[str, Any], idle: int) -> dict[str, Any]:
    """One picture in a new tab: seconds from the tab's opening, and milliseconds a step."""
    order = {"type": "draw", "id": 1, "classes": [CLASS], "seeds": [SEED]}
    page = context.new_page()
    page.goto(url)
    said = page.evaluate(
        "async ([order, load, idle]) => { const began = performance.now(); "
        "const said = await draw(order, load, idle); "
        "return said.map((one) => ({ ...one, at: one.at - began })); }",
        [order, load, idle],
    )
    page.wait_for_timeout(LOOKED_AT_MS)
    page.close()
    at = [one["at"] for one in said if one["type"] == "progress"]
    ready = next(one for one in said if one["type"] == "ready")
    picture = next(one for one in said if one["type"] == "picture")
    return {
        "ready": ready,
        "load_s": ready["at"] / 1000,
        "first_s": picture["at"] / 1000,
        "picture_s": (picture["at"] - ready["at"] - idle) / 1000,
        "decode_s": (picture["at"] - at[-1]) / 1000,
        "steps": [b - a for a, b in zip(at[WARM_UP:], at[WARM_UP + 1 :], strict=False)],
        "tokens": picture["tokens"],
    }


def drawn(chromium: Any, url: str, label: str, files: list[str], threads: int) -> dict[str, Any]:
    """Pictures of the three kinds of visits."""
    load = {
        "type": "load",
        "files": {name: f"{url}/{label}/{name}" for name in files},
        "runtime": {kind: f"{url}/ort/{name}" for kind, name in RUNTIME.items()},
        "threads": threads,
        "backend": "wasm",
    }
    with profile(chromium) as context:
        cold, warm = (visit(context, url, load, 0) for _ in range(2))
    with profile(chromium) as context:
        idle = visit(context, url, load, IDLE_MS)
    assert cold["tokens"] == warm["tokens"] == idle["tokens"]
    return {
        "threads": warm["ready"]["threads"],
        "step": warm["ready"]["graphs"]["step"],
        "decoder": warm["ready"]["graphs"]["decoder"],
        "ms_a_step": round(statistics.median(warm["steps"]), 2),
        "fastest_tenth_ms": round(statistics.quantiles(warm["steps"], n=10)[0], 2),
        "cold_ms_a_step": round(statistics.median(cold["steps"]), 2),
        "load_cold_s": round(cold["load_s"], 2),
        "load_warm_s": round(warm["load_s"], 2),
        "first_picture_cold_s": round(cold["first_s"], 2),
        "first_picture_warm_s": round(warm["first_s"], 2),
        "picture_cold_s": round(cold["picture_s"], 2),
        "picture_idle_s": round(idle["picture_s"], 2),
        "picture_s": round(warm["picture_s"], 2),
        "decode_s": round(min(one["decode_s"] for one in (cold, warm, idle)), 2),
        "tokens": warm["tokens"],
    }


def browser_version() -> str:
    """Chromium's."""
    said = subprocess.run([CHROMIUM, "--version"], capture_output=True, text=True, check=True)
    return said.stdout.split()[1]


@contextmanager
def profile(chromium: Any) -> Iterator[Any]:
    """A browser that has seen nothing yet."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        context = chromium.launch_persistent_context(folder, executable_path=CHROMIUM, args=FLAGS)
        try:
            yield context
        finally:
            context.close()


def natively(path: Path, threads: int) -> dict[str, Any]:
    """The same picture by the backend `cpu`, in this process."""
    began = time.perf_counter()
    with Generator.load(path, backend="cpu", threads=threads) as generator:
        loaded = time.perf_counter() - began
        at: list[float] = []
        generator.generate([CLASS], seed=0)
        began = time.perf_counter()
        result = generator.generate(
            [CLASS], seed=SEED, progress=lambda *_: at.append(time.perf_counter())
        )
        took = time.perf_counter() - began
    taken = [1000 * (b - a) for a, b in zip(at[WARM_UP:-2], at[WARM_UP + 1 : -1], strict=True)]
    return {
        "native_ms_a_step": round(statistics.median(taken), 2),
        "native_fastest_tenth_ms": round(statistics.quantiles(taken, n=10)[0], 2),
        "native_load_s": round(loaded, 2),
        "native_picture_s": round(took, 2),
        "tokens": result.tokens[0].tolist(),
    }


def wanted_files(path: Path) -> list[str]:
    """The files of a bundle that the engine fetches."""
    graphs = Bundle.open(path).manifest.graphs.values()
    plain = {name for graph in graphs for name in (graph.file, graph.weights)}
    own = {
        f"{graph}-cpu.{ending}"
        for graph in ("step", "decoder")
        for ending in ("json", "onnx")
        if (path / f"{graph}-cpu.json").is_file()
    }
    replaced = {f"{graph}.onnx" for graph in ("step", "decoder") if f"{graph}-cpu.onnx" in own}
    return sorted((plain - replaced) | own | {"manifest.json"})


def bytes_loaded(path: Path) -> dict[str, Any]:
    """What comes over the network for a bundle: as it is, and packed as servers pack."""
    bundle = [path / name for name in wanted_files(path)]
    engine = [file for file in (WEB / "engine").glob("*.js") if file.name != "types.js"]
    runtime = [DIST / name for name in RUNTIME.values()]
    row: dict[str, Any] = {}
    for name, files in {"bundle": bundle, "engine": engine, "onnxruntime": runtime}.items():
        data = [file.read_bytes() for file in files]
        row[f"{name}_bytes"] = sum(map(len, data))
        row[f"{name}_gzip_bytes"] = sum(len(gzip.compress(one, 9)) for one in data)
        row[f"{name}_brotli_bytes"] = sum(map(brotli, files))
    for form in ("", "_gzip", "_brotli"):
        row[f"all{form}_bytes"] = sum(
            row[f"{p}{form}_bytes"] for p in ("bundle", "engine", "onnxruntime")
        )
    return row


@functools.cache
def brotli(file: Path) -> int:
    """Its size, packed by Node's Brotli at 9 of 11."""
    script = (
        "const z = require('zlib'); const c = z.constants;"
        "const params = { [c.BROTLI_PARAM_QUALITY]: 9, [c.BROTLI_PARAM_LGWIN]: 24 };"
        "const data = require('fs').readFileSync(process.argv[1]);"
        "console.log(z.brotliCompressSync(data, { params }).length)"
    )
    found = subprocess.run(["node", "-e", script, file], capture_output=True, text=True, check=True)
    return int(found.stdout)


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="LABEL=BUNDLE...")
@click.option("--threads", default="1,2", show_default=True, metavar="N,...")
@click.option("--bytes", "only_bytes", is_flag=True, help="Only what is loaded, nothing drawn.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Put the rows here.")
def main(bundles: tuple[str, ...], threads: str, only_bytes: bool, target: Path | None) -> None:
    """Measure one picture under the bundle's own guidance."""
    if not DIST.is_dir():
        raise click.UsageError("ONNX Runtime for the web is missing; run npm ci --prefix web")
    named = {label: Path(path) for label, _, path in (one.partition("=") for one in bundles)}
    if only_bytes:
        rows = [{"model": label, "what": "bytes", **bytes_loaded(p)} for label, p in named.items()]
    else:
        rows = list(timed(named, [int(number) for number in threads.split(",")]))
    for row in rows:
        click.echo(json.dumps(row))
    if target is not None:
        put(target, rows)


def timed(named: dict[str, Path], threads: list[int]) -> Iterator[dict[str, Any]]:
    """Rows of what drawing takes, one for each bundle and number of threads."""
    from playwright.sync_api import sync_playwright

    version = browser_version()
    with served(named) as url, sync_playwright() as started:
        for label, path in named.items():
            for number in threads:
                found = drawn(started.chromium, url, label, wanted_files(path), number)
                native = natively(path, number)
                same = found.pop("tokens") == native.pop("tokens")
                about = {"model": label, "what": "time", "browser": version}
                yield about | found | native | {"same_tokens": same}


def put(target: Path, rows: list[dict[str, Any]]) -> None:
    """Put `rows` into the file `target`, in the place of those of the same model."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["model"], row["what"], row.get("threads")

    old = json.loads(target.read_text())["rows"] if target.is_file() else []
    new = {key(row) for row in rows}
    kept = [row for row in old if key(row) not in new]
    target.write_text(json.dumps({"machine": machine(), "rows": kept + rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
