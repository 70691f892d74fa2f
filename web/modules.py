"""The files that a page is made of: modules and what they import, style sheets, pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import aim_serve

_WEB = Path(__file__).parent
_SERVE = Path(aim_serve.__file__).parent
FOLDERS = {
    "serve/page": _SERVE / "page",
    "web/engine": _WEB / "engine",
    "web/page": _WEB / "page",
}
"""Where a folder of the repository is once installed.

In a site it is called as in the repository, so that modules find each other by the same names.
"""
_STYLES = (
    "serve/page/style.css",
    "serve/page/form.css",
    "serve/page/gallery.css",
    "web/page/loading.css",
)
_ICON = "serve/page/favicon.svg"
PAGE = "web/page/app.js"
ENGINE = "web/engine/worker.js"

# At the start of a line: not what a comment imports, which are types.
_IMPORT = re.compile(r'^(?:import|export|\})[^"\n]*"(\.[^"\n]+)";', re.MULTILINE)


def read(path: str) -> str:
    """The text of a file of a page by its name in the repository, such as `serve/page/dom.js`."""
    folder, _, name = path.rpartition("/")
    return (FOLDERS[folder] / name).read_text(encoding="utf-8")


def page_files() -> dict[str, str]:
    """All files of the page and its engine, but for the HTML: texts by names."""
    modules = dict(_with_imports(PAGE)) | dict(_with_imports(ENGINE))
    others = {path: read(path) for path in (*_STYLES, _ICON)}
    return dict(sorted((modules | others).items()))


def preloaded() -> list[str]:
    """The modules that the page imports, which a browser may fetch all at once."""
    return sorted(dict(_with_imports(PAGE)))


def template() -> str:
    """The page of `aim serve`, of which the site's is made."""
    return read("serve/page/index.html")


def service_worker() -> str:
    """The service worker, but for what it is told of the site."""
    return (_WEB / "service_worker" / "service_worker.js").read_text(encoding="utf-8")


def _with_imports(entry: str) -> Iterator[tuple[str, str]]:
    """A module and those that it imports, directly or not."""
    pending, seen = [entry], {entry}
    while pending:
        path = pending.pop()
        text = read(path)
        yield path, text
        for name in _IMPORT.findall(text):
            found = _joined(path.rpartition("/")[0], name)
            if found not in seen:
                seen.add(found)
                pending.append(found)


def _joined(folder: str, name: str) -> str:
    """`name`, relative to `folder`, as a path without dots."""
    parts = folder.split("/")
    for part in name.split("/"):
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)
