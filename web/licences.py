"""The file LICENSES.txt of a site: the licences of all that it hands out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from aim_runtime import Bundle
from aim_web.onnxruntime_web import NOTICES, Package

_RULE = "=" * 78
_REPOSITORY = "https://github.com/microsoft/onnxruntime"


def licences(bundle: Bundle, package: Package) -> str:
    """The bundle's, this project's and ONNX Runtime's, each in full where its text is there."""
    sections = [*_of_bundle(bundle), ("aim-runtime (the page and its engine)", _own())]
    sections += _of_runtime(package)
    return "\n".join(f"{_RULE}\n{title}\n{_RULE}\n\n{text.strip()}\n" for title, text in sections)


def _of_bundle(bundle: Bundle) -> Iterator[tuple[str, str]]:
    manifest = bundle.manifest
    yield f"{manifest.name} (the model)", manifest.license or "Its bundle states no licence."
    for name in sorted(manifest.files):
        if name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")):
            text = bytes(bundle.read(name)).decode("utf-8", errors="replace")
            yield f"{manifest.name}: {name}", text


def _own() -> str:
    text = importlib.metadata.distribution("aim-runtime").read_text("licenses/LICENSE")
    return text or "MIT License"


def _of_runtime(package: Package) -> Iterator[tuple[str, str]]:
    """From the npm package where it has them, else those of the Python package.

    Both are built from the same sources; the npm package says "MIT" and carries no text.
    """
    title = f"onnxruntime-web {package.version}"
    found = {name: text.decode("utf-8", "replace") for name, text in package.read(NOTICES).items()}
    spec = importlib.util.find_spec("onnxruntime")
    for place in spec.submodule_search_locations or [] if spec else []:
        for name in NOTICES:
            path = Path(place) / name
            if name not in found and path.is_file():
                found[name] = path.read_text(encoding="utf-8", errors="replace")
    if not any(name.startswith("LICENSE") for name in found):
        yield title, f"MIT License, Copyright (c) Microsoft Corporation. See {_REPOSITORY}"
    for name in sorted(found):
        yield f"{title}: {name}", found[name]
