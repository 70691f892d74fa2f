"""Sites for tests: with a stand-in for npm's package, on a host that can be a bad one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath

from aim_web.headers import HEADERS, TYPES, cache_control
from aim_web.onnxruntime_web import NAME, WASM, WEBGPU, Pin

FAKE_ENGINE = Path(__file__).parent / "fake_engine"


def fake_package(folder: Path) -> Path:
    """A folder like the unpacked package, its files small."""
    (folder / "dist").mkdir(parents=True)
    about = {"name": NAME, "version": Pin.read().version}
    (folder / "package.json").write_text(json.dumps(about), encoding="utf-8")
    for name in WASM + WEBGPU:
        (folder / "dist" / name).write_bytes(f"// {name}\n".encode() * 999)
    return folder


@dataclass
class Host:
    """A host of static files that can be told to be a bad one, and what it was asked for."""

    folder: Path
    isolates: bool = True
    """Whether it sends the headers that threads take; hosts like GitHub Pages do not."""
    shortened: str = ""
    """Of files whose path ends so it has the first half only."""
    altered: str = ""
    """Files whose path ends so have another first byte."""
    cuts_off: str = ""
    """Half-way through files whose path ends so it breaks the connection."""
    slow: str = ""
    """Files whose path ends so stop half-way until `go`."""
    gone: bool = False
    """It closes connections without an answer."""
    go: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @property
    def insecure_url(self) -> str:
        """The same over HTTP by a name that browsers do not take for this machine."""
        return f"http://insecure.test:{self.port}/"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    host: Host

    def log_message(self, format: str, *args: object) -> None:
        pass

    def parse_request(self) -> bool:
        answered = super().parse_request() and not self.host.gone
        self.close_connection |= self.host.gone
        return answered

    def do_GET(self) -> None:
        host = self.host
        path = self.path.partition("?")[0].lstrip("/") or "index.html"
        host.asked.append(path)
        file = host.folder / path
        if not file.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        data = file.read_bytes()
        if host.shortened and path.endswith(host.shortened):
            data = data[: len(data) // 2]
        if host.altered and path.endswith(host.altered):
            data = bytes([data[0] ^ 1]) + data[1:]
        self.send_response(200)
        kind = TYPES.get(PurePosixPath(path).suffix, "application/octet-stream")
        headers = {"Content-Type": kind, "Cache-Control": cache_control(path)}
        headers |= HEADERS if host.isolates else {}
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        half = len(data) // 2
        self.wfile.write(data[:half])
        if host.cuts_off and path.endswith(host.cuts_off):
            self.close_connection = True
            return
        if host.slow and path.endswith(host.slow):
            self.wfile.flush()
            while not (host.go.is_set() or host.gone):
                time.sleep(0.01)
        self.wfile.write(data[half:])


@contextmanager
def hosted(folder: Path) -> Iterator[Host]:
    """A host of the site in `folder`."""
    host = Host(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"host": host}))
    server.daemon_threads = True
    server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
    host.port = server.server_port
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield host
    finally:
        host.gone = True
        server.shutdown()
        server.server_close()
