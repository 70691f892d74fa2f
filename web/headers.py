"""What a site's answers say beside its files, wherever it is hosted."""

from __future__ import annotations

from collections.abc import Iterable

_SOURCES = {
    "default-src": "'none'",
    "script-src": "'self' 'wasm-unsafe-eval'",
    "worker-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data: blob:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
}
POLICY = "; ".join(f"{name} {value}" for name, value in _SOURCES.items())
"""The content security policy, as a page can state it of itself."""

HEADERS = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    # Several threads share memory, which browsers allow to pages that are isolated so.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every file."""

_FOREVER = "public, max-age=31536000, immutable"
_ASK = "no-cache"

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
}
"""Media types by the ending of a name; of all others `application/octet-stream`."""


def cache_control(path: str) -> str:
    """How long a file may be kept: the folders of a site have a hash of what they hold."""
    return _FOREVER if "/" in path else _ASK


def headers_file(folders: Iterable[str]) -> str:
    """The file `_headers` by which Netlify and Cloudflare Pages are told all this."""
    lines = ["/*", *(f"  {name}: {value}" for name, value in HEADERS.items())]
    for folder in folders:
        lines += [f"/{folder}/*", f"  Cache-Control: {_FOREVER}"]
    return "\n".join(lines) + "\n"
