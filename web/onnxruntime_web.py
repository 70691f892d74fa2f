"""npm's package onnxruntime-web, pinned by the lock file: found here, or fetched."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from aim_runtime import AimError
from aim_runtime.quoting import shown
from aim_runtime.replacing import replacing

NAME = "onnxruntime-web"
DEFAULT_REGISTRY = "https://registry.npmjs.org/"

WASM = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.mjs")
"""A module, its WebAssembly and the loader of that, in the package's folder `dist`."""
WEBGPU = ("ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm")
"""A module and its WebAssembly for browsers that have WebGPU."""
NOTICES = ("LICENSE", "LICENSE.txt", "ThirdPartyNotices.txt")
"""At the package's top, where it has them."""

_LOCK = Path(__file__).parent / "package-lock.json"
_TIMEOUT_S = 60
_PIECE = 1 << 20
_MOST_PACKED, _MOST_UNPACKED = 256 << 20, 64 << 20

Progress = Callable[[int, int], None]
"""Told how many bytes have come, of how many; 0 of all where the registry does not say."""


@dataclass(frozen=True)
class Pin:
    """What the lock file says: this version, whose package has this sha512 (base64)."""

    version: str
    sha512: str

    @classmethod
    def read(cls) -> Pin:
        """The one of this release."""
        locked = json.loads(_LOCK.read_text(encoding="utf-8"))["packages"][f"node_modules/{NAME}"]
        algorithm, _, digest = locked["integrity"].partition("-")
        assert algorithm == "sha512", locked["integrity"]
        return cls(locked["version"], digest)

    @property
    def file_name(self) -> str:
        """As `npm pack` calls the package."""
        return f"{NAME}-{self.version}.tgz"

    def matches(self, file: BufferedReader) -> bool:
        """Whether `file` is the package that was pinned."""
        digest = hashlib.file_digest(file, "sha512").digest()
        return base64.b64encode(digest).decode() == self.sha512


class Package:
    """The package in a place that is known to hold it: a folder, or the file that npm publishes."""

    def __init__(self, path: Path, version: str) -> None:
        self.path = path
        self.version = version

    @classmethod
    def at(cls, path: Path) -> Package:
        """The package at `path`: unpacked, as npm installs it, or the .tgz file of `npm pack`.

        Raises AimError when it is not there, or not the pinned one.
        """
        pin = Pin.read()
        if path.is_dir():
            try:
                about = json.loads((path / "package.json").read_text(encoding="utf-8"))
                found = (about["name"], about["version"])
            except (OSError, ValueError, KeyError, TypeError):
                raise AimError(f"{path} is no npm package: it has no package.json of one") from None
            if found != (NAME, pin.version):
                raise AimError(
                    f"{path} is {shown(found[0])} {shown(found[1])}; {NAME} {pin.version} is wanted"
                )
            return cls(path, pin.version)
        try:
            with path.open("rb") as file:
                if pin.matches(file):
                    return cls(path, pin.version)
        except OSError as error:
            raise AimError(f"{path} cannot be read: {error.strerror}") from error
        raise AimError(f"{path} is not {pin.file_name} as npm publishes it: its checksum differs")

    @classmethod
    def fetched(cls, registry: str, progress: Progress = lambda done, total: None) -> Package:
        """The package from this user's cache, or else from `registry`, into the cache.

        Raises AimError when the registry cannot be reached, has no such package or another one, or
        the cache cannot be written.
        """
        pin = Pin.read()
        cached = cache_folder() / pin.file_name
        with contextlib.suppress(OSError), cached.open("rb") as file:
            if pin.matches(file):
                return cls(cached, pin.version)
        url = f"{_checked(registry)}/{NAME}/-/{pin.file_name}"
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            with replacing(cached) as new:
                with new.open("xb") as written:
                    _download(url, written, progress)
                with new.open("rb") as file:
                    if not pin.matches(file):
                        raise AimError(
                            f"{url} is not what it should be: its checksum differs from that of "
                            f"{NAME} {pin.version}"
                        )
        except OSError as error:
            raise AimError(f"cannot write {cached}: {error.strerror or error}") from error
        return cls(cached, pin.version)

    def read(self, names: tuple[str, ...]) -> dict[str, bytes]:
        """Those of its files that it has, by their names below its top, such as `dist/ort.js`.

        Raises AimError when it cannot be read.
        """
        try:
            if self.path.is_dir():
                places = {name: self.path / name for name in names}
                return {n: place.read_bytes() for n, place in places.items() if place.is_file()}
            with tarfile.open(self.path, "r:gz") as packed:
                return dict(_members(packed, set(names)))
        except (OSError, tarfile.TarError, EOFError) as error:
            raise AimError(f"{self.path} cannot be read: {error}") from error


def cache_folder() -> Path:
    """Where packages are kept for the next time."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    return base / "aim-runtime"


def default_registry() -> str:
    """The registry that npm's own environment variable names, or else npm's."""
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        if value := os.environ.get(name, "").strip():
            return value
    return DEFAULT_REGISTRY


def _checked(registry: str) -> str:
    parts = urlsplit(registry)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise AimError(
            f"the registry is {shown(registry)}; it must be a URL such as {DEFAULT_REGISTRY}"
        )
    return registry.rstrip("/")


def _download(url: str, file: BinaryIO, progress: Progress) -> None:
    """Write what `url` answers to `file`. Raises AimError unless all of it comes."""
    offline = f"'npm pack {NAME}@{Pin.read().version}' elsewhere, and --onnxruntime-web FILE"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            total = int(answer.headers.get("Content-Length") or 0)
            done = 0
            while piece := _piece(answer, url):
                done += len(piece)
                if done > _MOST_PACKED:
                    raise AimError(f"{url} does not end: more than {_MOST_PACKED} bytes came")
                file.write(piece)
                progress(done, total)
    except urllib.error.HTTPError as error:
        raise AimError(f"{url} answers {error.code} {shown(error.reason)}; or {offline}") from None
    except (urllib.error.URLError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise AimError(f"cannot fetch {url}: {reason}; without a network: {offline}") from None
    if total and done != total:
        raise AimError(f"{url} was cut off after {done} of {total} bytes; try again")


def _piece(answer: http.client.HTTPResponse, url: str) -> bytes:
    """The next bytes; AimError where the connection is what fails, not the disk."""
    try:
        return answer.read(_PIECE)
    except (OSError, http.client.HTTPException):
        raise AimError(f"the connection was lost while {url} was fetched; try again") from None


def _members(packed: tarfile.TarFile, names: set[str]) -> dict[str, bytes]:
    found = {}
    for member in packed:
        name = member.name.partition("/")[2]  # npm's packages have one folder
        if name not in names or not member.isfile():
            continue
        if member.size > _MOST_UNPACKED:
            raise AimError(f"{name} of the package has {member.size} bytes, too many")
        content = packed.extractfile(member)
        assert content is not None
        found[name] = content.read()
        if found.keys() == names:
            break
    return found
