"""The page at `/` and its assets, read once, served with a policy that lets in nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from aim_serve.errors import of_status

FOLDER = Path(__file__).parent / "page"

_INDEX = "index.html"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'


class Page:
    """The files of a folder, by name; what is in memory needs no folder any more."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._files = {
            path.name: _File(path.read_bytes(), _TYPES[path.suffix])
            for path in (sorted(folder.iterdir()) if folder.is_dir() else [])
            if path.suffix in _TYPES and path.is_file()
        }

    def answer(self, request: Request, name: str = _INDEX) -> Response:
        """One of them; 304 to whoever has it. Raises ApiError where there is none."""
        file = self._files.get(name)
        if file is None:
            raise of_status(404, "there is no such page")
        headers = {
            "Cache-Control": "no-cache",
            "Content-Security-Policy": _POLICY,
            "ETag": file.etag,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        if file.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers, media_type=file.media_type)
