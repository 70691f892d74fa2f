"""A server with the interface of `aim serve` and pictures made up on the spot, to test the page.

Its pictures follow from class and seed alone, are quick to draw, and it can be told to fail.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aim_runtime.images import save_png

PAGE = Path(__file__).parents[2] / "serve" / "page"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
SIDE, GRID = 32, 4
TOKENS = GRID * GRID
CLASSES = [
    "cat-face",
    "dog",
    "emotion",
    "heart",
    "heart-shaped box",
    "tench, Tinca tinca",
    "zodiac",
]
DEFAULTS = {"cfg_scale": 3.0, "temperature": 0.8, "top_k": 0, "top_p": 0.95}
LIMITS = {
    "n": 10,
    "cfg_scale": [0, 1000],
    "temperature": [0, 100],
    "top_k": [0, 2048],
    "top_p": [0, 1],
    "seed": [0, 2**53 - 1],
}
MODEL = {
    "id": "tiny",
    "object": "model",
    "created": 0,
    "owned_by": "tests",
    "aim": {
        "size": f"{SIDE}x{SIDE}",
        "width": SIDE,
        "height": SIDE,
        "num_tokens": TOKENS,
        "grid": [GRID, GRID],
        "num_classes": len(CLASSES),
        "defaults": DEFAULTS,
        "limits": LIMITS,
        "licence": "MIT",
        "version": "0.1.0",
    },
}


@dataclass
class Behaviour:
    """What the server does, which a test may change at any time, and what it has seen."""

    step_s: float = 0.01
    """Between two tokens."""
    hold: threading.Event = field(default_factory=threading.Event)
    """Not set: drawings stop half-way, until it is."""
    full: int = 0
    """So many requests are told that the queue is full."""
    fails_with: str = ""
    """Drawings end with this error when half done."""
    cuts_off: bool = False
    """Drawings end half done without a word."""
    key: str = ""
    not_ready: str = ""
    orders: list[dict[str, Any]] = field(default_factory=list)
    drawing: int = 0
    left: int = 0
    """Drawings whose client went away."""
    gone: bool = False
    """Connections are closed without an answer."""
    url: str = ""


def picture(class_id: int, seed: int, done: int = TOKENS) -> Image.Image:
    """A picture of so many tokens, gray where there are none."""
    rng = np.random.default_rng([class_id, seed % 2**63])
    cells = rng.integers(60, 256, (TOKENS, 3)).astype(np.uint8)
    cells[done:] = 128
    patch = np.ones((SIDE // GRID, SIDE // GRID, 1), np.uint8)
    return Image.fromarray(np.kron(cells.reshape(GRID, GRID, 3), patch))


def png(image: Image.Image, folder: Path, settings: dict[str, Any] | None = None) -> str:
    """The image as a PNG file, in base64."""
    if settings is None:
        memory = io.BytesIO()
        image.save(memory, "PNG")
        return base64.b64encode(memory.getvalue()).decode()
    path = folder / f"{threading.get_ident()}.png"
    save_png(image, path, settings)
    return base64.b64encode(path.read_bytes()).decode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    behaviour: Behaviour
    folder: Path

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def parse_request(self) -> bool:
        answered = super().parse_request() and not self.behaviour.gone
        self.close_connection |= self.behaviour.gone
        return answered

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/readyz":
            why = self.behaviour.not_ready
            return self.error(503, why) if why else self.json({"status": "ready"})
        if path in ("/v1/models", "/v1/classes"):
            if not self.allowed():
                return self.error(401, "a key is needed")
            classes = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
            return self.json({"object": "list", "data": [MODEL] if "mod" in path else classes})
        file = PAGE / ("index.html" if path == "/" else path.removeprefix("/page/"))
        if file.suffix not in TYPES or not file.is_file():
            return self.error(404, "there is nothing here")
        self.answer(200, file.read_bytes(), TYPES[file.suffix], {"Content-Security-Policy": CSP})

    def do_POST(self) -> None:
        order = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return self.error(401, "a key is needed")
        self.behaviour.orders.append(order)
        if self.behaviour.full:
            self.behaviour.full -= 1
            return self.error(429, "the queue is full", {"Retry-After": "2"})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.behaviour.drawing += 1
        try:
            for event, data in self.events(order):
                self.wfile.write(f"event: {event}\ndata: {json.dumps(data)}\n\n".encode())
        except OSError:
            self.behaviour.left += 1
        finally:
            self.behaviour.drawing -= 1
            self.close_connection = True

    def events(self, order: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        images = [
            {"index": i, "class_id": index, "class_name": CLASSES[index], "seed": order["seed"] + i}
            for i, index in enumerate(map(self.class_id, order["classes"]))
        ]
        settings = {name: order.get(name, preset) for name, preset in DEFAULTS.items()}
        yield "accepted", {"id": "draw-1", "images": images, "settings": settings}
        total = TOKENS * len(images)
        for done in range(1, TOKENS + 1):
            time.sleep(self.behaviour.step_s)
            yield "progress", {"done": done * len(images), "total": total}
            if done == TOKENS // 2:
                while not self.behaviour.hold.wait(0.05):
                    yield "progress", {"done": done * len(images), "total": total}
                if self.behaviour.fails_with:
                    error = {"message": self.behaviour.fails_with, "type": "server_error"}
                    yield "error", {"error": error}
                    return
                if self.behaviour.cuts_off:
                    return
            if done % order["every"] == 0 and done < TOKENS:
                shown = [{"done_tokens": done, **self.drawn(one, done, None)} for one in images]
                yield "preview", {"done_tokens": done, "total_tokens": TOKENS, "images": shown}
        shown = [one | self.drawn(one, TOKENS, settings) for one in images]
        yield "done", {"seconds": 1.0, "images": shown}

    def drawn(
        self, one: dict[str, Any], done: int, settings: dict[str, Any] | None
    ) -> dict[str, Any]:
        about = settings and settings | {"class": one["class_id"], "seed": one["seed"]}
        data = png(picture(one["class_id"], one["seed"], done), self.folder, about)
        return {"index": one["index"], "b64_json": data, "output_format": "png"}

    def class_id(self, wanted: int | str) -> int:
        return wanted if isinstance(wanted, int) else CLASSES.index(wanted)

    def allowed(self) -> bool:
        key = self.behaviour.key
        return not key or self.headers.get("Authorization") == f"Bearer {key}"

    def error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        error = {"message": message, "type": "server_error", "param": None, "code": None}
        self.answer(
            status, json.dumps({"error": error}).encode(), "application/json", headers or {}
        )

    def json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), "application/json", {})

    def answer(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Cache-Control": "no-cache", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def page_server(folder: Path, port: int = 0) -> Iterator[Behaviour]:
    """Serve the page on loopback; `folder` is for files on their way."""
    behaviour = Behaviour()
    behaviour.hold.set()
    bound = type("BoundHandler", (Handler,), {"behaviour": behaviour, "folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", port), bound)
    server.daemon_threads = True
    server.request_queue_size = 64
    behaviour.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield behaviour
    finally:
        behaviour.gone = True
        behaviour.hold.set()
        server.shutdown()
        server.server_close()
