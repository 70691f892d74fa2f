"""Put a site together from its parts, and read one back.

A site's folders are called after a hash of what they hold, so that their files may be kept for
ever; `index.html` and the service worker, which say which folders count, are asked for anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aim_runtime import AimError, Bundle
from aim_runtime.bundle.files import MANIFEST_NAME
from aim_runtime.engines.onnxruntime.decoder_graph import DECODER_FILE, chosen_decoder
from aim_runtime.quoting import shown
from aim_runtime.replacing import replacing_folder
from aim_runtime.version import __version__
from aim_web import modules
from aim_web.description import description
from aim_web.headers import POLICY, headers_file
from aim_web.licences import licences
from aim_web.onnxruntime_web import WASM, WEBGPU, Package

LIST = "aim-site.json"
INDEX = "index.html"
_FORMAT, _FORMAT_VERSION = "aim-site", 1
_MOST_LIST_BYTES = 4 << 20
_SERVICE_WORKER = "sw.js"
_HASH_LETTERS = 12
# Parameters from which on a decoder of fewer multiplications saves more than it takes to load.
_LARGE_DECODER = 1 << 24


@dataclass(frozen=True)
class SiteFile:
    """What the list says of a file."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Site:
    """A site's folder.

    Attributes:
        folder: where it is.
        name: the name of its model.
        files: what `aim web` wrote, by paths relative to the folder, but for the list itself.
        bytes_to_load: about how much a browser loads before it draws, unless it has it already.
    """

    folder: Path
    name: str
    files: Mapping[str, SiteFile]
    bytes_to_load: int

    @classmethod
    def open(cls, folder: Path) -> Site:
        """Read the list of the site in `folder`. Raises AimError where there is none."""
        path = folder / LIST
        try:
            if path.stat().st_size > _MOST_LIST_BYTES:
                raise AimError(f"{path} is too large for the list of a site")
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["format"] != _FORMAT or value["format_version"] != _FORMAT_VERSION:
                raise AimError(f"{path} is of another format than this aim-runtime reads")
            files = {
                str(name): SiteFile(str(entry["sha256"]), int(entry["size"]))
                for name, entry in value["files"].items()
            }
            return cls(folder, str(value["name"]), files, int(value["bytes_to_load"]))
        except OSError as error:
            raise AimError(f"{folder} holds no site: {path.name} {_why(error)}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise AimError(f"{path} is not the list of a site that 'aim web' wrote") from None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())


def check_target(out: Path) -> None:
    """Refuse a place that `write_site` would not write to, before work is spent on it.

    What is there already may be a site of which every file is one that `aim web` wrote, or an empty
    folder. Raises AimError otherwise.
    """
    out = Path(os.path.abspath(out))
    parent = next(parent for parent in (*out.parents, Path("/")) if os.path.lexists(parent))
    if not parent.is_dir():
        raise AimError(f"cannot write the site {out}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise AimError(f"cannot write the site {out}: no permission to write to {parent}")
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise AimError(f"{out} exists and is not a folder; choose another place")
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    if not found:
        return
    if LIST not in found:
        raise AimError(f"{out} is a folder with other things in it; choose another place")
    foreign = sorted(found - {LIST, *Site.open(out).files})
    if foreign:
        raise AimError(
            f"{out} has files that 'aim web' did not write, such as {shown(foreign[0])}, and would "
            "be replaced as a whole; choose another place"
        )


def write_site(
    bundle: Bundle, package: Package, out: str | os.PathLike[str], *, webgpu: bool = True
) -> Site:
    """Write the site of `bundle` into the folder `out`, all or nothing; an older one is replaced.

    `webgpu` puts in what ONNX Runtime needs for it. Raises AimError when `out` is taken (see
    `check_target`), or a part is missing or damaged; OSError, which names `out`, when it cannot be
    written.
    """
    out = Path(os.path.abspath(out))
    check_target(out)
    names = WASM + (WEBGPU if webgpu else ())
    parts = _Parts(
        bundle, modules.page_files(), _runtime_files(package, names), licences(bundle, package)
    )
    try:
        with replacing_folder(out) as staging:
            writer = _Writer(staging)
            to_load = _write_parts(writer, parts, package.version)
            writer.list(bundle.manifest.name, to_load)
    except OSError as error:
        # The temporary name means nothing to anybody.
        raise OSError(error.errno, error.strerror, str(out)) from error
    return Site.open(out)


class _Writer:
    """Writes files below a folder and notes what they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, SiteFile] = {}

    def put(self, path: str, content: str | bytes | memoryview) -> None:
        data = content.encode() if isinstance(content, str) else content
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        self.files[path] = SiteFile(hashlib.sha256(data).hexdigest(), len(data))

    def put_folder(self, name: str, contents: Mapping[str, str | bytes]) -> str:
        """Files below a folder that is called after them; returns its path."""
        digest = hashlib.sha256()
        for path, content in sorted(contents.items()):
            data = content.encode() if isinstance(content, str) else content
            digest.update(f"{path}\0{len(data)}\0".encode() + data)
        folder = f"{name}-{digest.hexdigest()[:_HASH_LETTERS]}"
        for path, content in contents.items():
            self.put(f"{folder}/{path}", content)
        return folder

    def list(self, name: str, bytes_to_load: int) -> None:
        """Write the list, at last."""
        files = {path: dataclasses.asdict(file) for path, file in sorted(self.files.items())}
        head = {"format": _FORMAT, "format_version": _FORMAT_VERSION}
        about = {"name": name, "aim_runtime": __version__, "bytes_to_load": bytes_to_load}
        value = head | about | {"files": files}
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        (self.folder / LIST).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class _Parts:
    """What a site is made of."""

    bundle: Bundle
    page: Mapping[str, str]
    runtime: Mapping[str, bytes]
    licences: str


def _runtime_files(package: Package, names: tuple[str, ...]) -> dict[str, bytes]:
    """ONNX Runtime's files of these names."""
    found = package.read(tuple(f"dist/{name}" for name in names))
    for name in names:
        if f"dist/{name}" not in found:
            raise AimError(f"{package.path} has no dist/{name}; it is not complete")
    return {name: found[f"dist/{name}"] for name in names}


def _write_parts(writer: _Writer, parts: _Parts, runtime_version: str) -> int:
    """Write all files but the list; returns how many bytes a browser loads of them."""
    page = writer.put_folder("page", parts.page)
    folder = writer.put_folder(f"onnxruntime-{runtime_version}", parts.runtime)
    runtime = _places(folder, parts.runtime)
    files = _model(writer, parts.bundle)
    graphs = parts.bundle.manifest.graphs.values()
    wanted = {files[name] for graph in graphs for name in (graph.file, graph.weights)}
    wanted |= {runtime["module"], runtime["wasm"], runtime["loader"], files[MANIFEST_NAME]}
    to_load = sum(writer.files[path].size for path in wanted)
    about = description(parts.bundle, files, runtime, to_load)
    writer.put(INDEX, _index(page, about))
    shell = [INDEX, *(path for path in writer.files if path.startswith(f"{page}/"))]
    writer.put(_SERVICE_WORKER, _service_worker(writer, page, shell))
    writer.put("LICENSES.txt", parts.licences)
    folders = sorted({path.partition("/")[0] for path in writer.files if "/" in path})
    writer.put("_headers", headers_file(folders))
    writer.put(".nojekyll", "")  # GitHub Pages leaves out files with an underscore otherwise
    return to_load


def _places(folder: str, names: Container[str]) -> dict[str, Any]:
    """Where ONNX Runtime's files are, as the engine's `load` takes it."""
    kinds = ("module", "wasm", "loader")
    runtime: dict[str, Any] = {
        kind: f"{folder}/{name}" for kind, name in zip(kinds, WASM, strict=True)
    }
    if WEBGPU[0] in names:
        runtime["webgpu"] = {"module": f"{folder}/{WEBGPU[0]}", "wasm": f"{folder}/{WEBGPU[1]}"}
    return runtime


def _model(writer: _Writer, bundle: Bundle) -> dict[str, str]:
    """Write the bundle's files that browsers use; where they are, by their names in it."""
    folder = f"model-{bundle.manifest_sha256[:_HASH_LETTERS]}"
    files = {MANIFEST_NAME: f"{folder}/{MANIFEST_NAME}"}
    writer.put(files[MANIFEST_NAME], bundle.manifest_bytes())
    left_out = _not_for_browsers(bundle)
    for name in bundle.manifest.files:
        if name not in left_out:
            files[name] = f"{folder}/{name}"
            writer.put(files[name], bundle.read(name))
    return files


def _not_for_browsers(bundle: Bundle) -> set[str]:
    """Engines for GPUs, and the float decoder of fewer multiplications if it is a small one.

    WebAssembly loads that graph half a second longer than the plain one at each first visit.
    """
    names = {name for name in bundle.manifest.files if "/" in name}
    decoder = chosen_decoder(bundle).decoder
    small = bundle.manifest.model.decoder_parameters < _LARGE_DECODER
    if decoder is not None and decoder.precision == "fp32" and small:
        names |= {DECODER_FILE, decoder.graph.file}
    return names


def _index(page: str, about: Mapping[str, Any]) -> str:
    """The page of `aim serve`, with other modules and what they are told."""
    told = json.dumps(about, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    head = [
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="referrer" content="no-referrer">',
        *(f'<link rel="modulepreload" href="{page}/{path}">' for path in modules.preloaded()),
        f'<link rel="stylesheet" href="{page}/web/page/loading.css">',
    ]
    return _replaced(
        modules.template(),
        ('<meta charset="utf-8">', "\n  ".join(['<meta charset="utf-8">', *head])),
        ('src="page/app.js"', f'src="{page}/{modules.PAGE}"'),
        ("</body>", f'<script type="application/json" id="site">{told}</script>\n</body>'),
    ).replace('href="page/', f'href="{page}/serve/page/')


def _service_worker(writer: _Writer, page: str, shell: list[str]) -> str:
    """The service worker, told which files there are, and which of them to keep at once."""
    files = {
        path: [file.sha256, file.size] for path, file in sorted(writer.files.items()) if "/" in path
    }
    version = writer.files[INDEX].sha256[:_HASH_LETTERS]  # which names the folders of all others
    about = {"version": version, "index": INDEX, "page": page, "policy": POLICY}
    site = about | {"shell": shell, "files": files}
    return f"const SITE = {json.dumps(site)};\n\n{modules.service_worker()}"


def _replaced(text: str, *pairs: tuple[str, str]) -> str:
    """`text` with each first part, which it has once, replaced by the second."""
    for before, after in pairs:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


def _why(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else f"({error.strerror})"
