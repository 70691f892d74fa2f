"""The browser's engine for tests: npm's packages, files over HTTP, parts of it in Node."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

WEB = Path(__file__).parents[2] / "web"
NODE = shutil.which("node")
SCRIPT = Path(__file__).with_name("engine_in_node.mjs")
TYPES = {
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".html": "text/html",
    ".wasm": "application/wasm",
}
ISOLATED = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
}

needs_node = pytest.mark.skipif(NODE is None, reason="there is no Node here")


def installed(folder: Path, npm: Path) -> Path:
    """A copy of the engine in `folder`, with what npm installed beside it."""
    shutil.copytree(WEB / "engine", folder / "engine")
    (folder / "node_modules").symlink_to(npm)
    return folder


def in_node(task: str, **given: Any) -> Any:
    """What a task of `engine_in_node.mjs` returns."""
    assert NODE is not None
    text = json.dumps({"engine": str(WEB / "engine"), "task": task, **given})
    done = subprocess.run([NODE, SCRIPT], input=text, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@dataclass
class Site:
    """A server of folders on loopback.

    Attributes:
        url: Its address, without "/" at the end.
        cuts: Files that end after so many bytes, by their path; `promises` says what they claim.
        asked: Paths that were asked for, in order, with the Cache-Control of the request.
    """

    folders: dict[str, Path]
    url: str = ""
    headers: dict[str, str] = field(default_factory=lambda: dict(ISOLATED))
    cuts: dict[str, int] = field(default_factory=dict)
    honest: bool = True
    asked: list[tuple[str, str]] = field(default_factory=list)

    def bundle(self, folder: Path) -> dict[str, str]:
        """The addresses of a bundle's files, as `load` takes them; `folder` is served then."""
        self.folders[folder.name] = folder
        return {file.name: f"{self.url}/{folder.name}/{file.name}" for file in folder.iterdir()}

    def runtime(self) -> dict[str, str]:
        """The addresses of ONNX Runtime, as `load` takes them."""
        dist = f"{self.url}/npm/node_modules/onnxruntime-web/dist"
        return {
            "module": f"{dist}/ort.wasm.min.mjs",
            "loader": f"{dist}/ort-wasm-simd-threaded.mjs",
            "wasm": f"{dist}/ort-wasm-simd-threaded.wasm",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.site.asked.append((path, self.headers.get("Cache-Control", "")))
        _, top, *rest = path.split("/")
        folder = self.site.folders.get(top)
        file = folder.joinpath(*rest) if folder else Path("/nowhere")
        known = folder is not None and ".." not in rest and file.is_file()
        data = file.read_bytes() if known else b"there is nothing here"
        kept = data[: self.site.cuts.get(path, len(data))]
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", TYPES.get(file.suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(kept) if self.site.honest else len(data)))
        self.send_header("Cache-Control", "max-age=600")
        for name, value in self.site.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(kept)
        self.close_connection = len(kept) < len(data)


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer requests on loopback; gives the URL, without a slash at its end."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def served(folders: dict[str, Path]) -> Iterator[Site]:
    """Serve `folders`, each under its name, on loopback."""
    site = Site(dict(folders))
    handler = type("BoundHandler", (_Handler,), {"site": site})
    with listening(handler) as site.url:
        yield site
