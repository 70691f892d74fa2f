"""A site, shown to the browsers of this machine with the headers that a host should send."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from aim_runtime import AimError
from aim_web.headers import HEADERS, TYPES, cache_control
from aim_web.site import INDEX, LIST, Site

HOST = "127.0.0.1"
_TIMEOUT_S = 60


class _Handler(BaseHTTPRequestHandler):
    """Answers with files of the site's list, and with nothing else."""

    site: Site
    protocol_version = "HTTP/1.1"
    timeout = _TIMEOUT_S
    server_version, sys_version = "aim", ""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/") or INDEX
        entry = self.site.files.get(path)
        tag = entry and f'"{entry.sha256[:32]}"'
        with contextlib.ExitStack() as stack:
            try:
                if entry is None and path != LIST:
                    return self._head(404, {"Content-Length": "0"})
                file = stack.enter_context((self.site.folder / path).open("rb"))
            except OSError:
                return self._head(404, {"Content-Length": "0"})
            kind = TYPES.get(PurePosixPath(path).suffix, "application/octet-stream")
            headers = {"Content-Type": kind, "Cache-Control": cache_control(path), **HEADERS}
            if tag:
                headers["ETag"] = tag
                if tag in self.headers.get("If-None-Match", ""):
                    return self._head(304, headers)
            size = (self.site.folder / path).stat().st_size
            self._head(200, {**headers, "Content-Length": str(size)})
            if body:
                with contextlib.suppress(ConnectionError, TimeoutError):  # the browser has gone
                    shutil.copyfileobj(file, self.wfile, 1 << 20)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the browser's own tools tell what it asked for."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: a browser that breaks a connection is no fault."""


@contextlib.contextmanager
def listening(site: Site, port: int) -> Iterator[ThreadingHTTPServer]:
    """A server of `site` on this machine's loopback, for `serve_forever`; port 0 takes a free one.

    Raises AimError when the port is taken.
    """
    handler = type("_SiteHandler", (_Handler,), {"site": site})
    try:
        server = _Server((HOST, port), handler)
    except OSError as error:
        raise AimError(
            f"cannot listen on {HOST} port {port}: {error.strerror}; choose another --port"
        ) from error
    try:
        yield server
    finally:
        server.server_close()


def url(server: ThreadingHTTPServer) -> str:
    """Where it is to be found."""
    return f"http://{HOST}:{server.server_port}/"
