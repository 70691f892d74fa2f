"""A worker of `aim sample --ray`: a model in a process of its own, on whichever machine."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aim_cli.sample_drawing import drawn
from aim_runtime import Bundle, BundleError, Generator
from aim_runtime.version import __version__

ARCHIVE = "bundle.zip"
"""The name of a bundle that is one file, when it is sent."""


@dataclass(frozen=True)
class Loaded:
    """What a worker draws with."""

    version: str
    backend: str
    precision: str


class SampleWorker:
    """Draws batches. One thread draws, another tells how far it is."""

    def __init__(self) -> None:
        self._generator: Generator | None = None
        self._progress = (-1, 0.0)

    def load(
        self,
        path: str | None,
        sha256: str,
        files: Mapping[str, bytes] | None,
        engine: Mapping[str, Any],
    ) -> Loaded | None:
        """Load the bundle whose manifest has this `sha256`.

        Without `files` it is the one at `path`, on this machine or a disk that machines share; None
        where that is another or none.
        """
        with tempfile.TemporaryDirectory(prefix="aim-bundle-") as folder:
            if files is None:
                found = None if path is None else Path(path)
            else:
                found = _unpacked(files, Path(folder))
            if files is None and not _is(found, sha256):
                return None
            generator = Generator.load(found, **engine)  # which compares every file's checksum
        if generator.bundle.manifest_sha256 != sha256:
            raise BundleError("the bundle has been replaced while it was loaded; start again")
        self._generator = generator
        return Loaded(__version__, generator.backend, generator.precision)

    def batch_size(self, count: int, cfg_scale: float) -> int:
        """How many images are drawn together, as on a machine alone."""
        assert self._generator is not None
        return self._generator.plan(count, cfg_scale).batch_size

    def draw(self, start: int, asked: Mapping[str, Any]) -> list[bytes]:
        """Draw a request whose first image has the number `start`; a PNG for each image."""
        assert self._generator is not None
        images = len(asked["classes"])

        def report(done: int, total: int) -> None:
            self._progress = (start, images * done / total)

        return drawn(self._generator, asked, report)

    def progress(self) -> tuple[int, float]:
        """The first number of the batch being drawn, and how many images' work is done of it."""
        return self._progress


def _unpacked(files: Mapping[str, bytes], folder: Path) -> Path:
    """The bundle of these files, written to `folder`."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder / ARCHIVE if ARCHIVE in files else folder


def _is(path: Path | None, sha256: str) -> bool:
    try:
        return Bundle.open(path).manifest_sha256 == sha256
    except BundleError:
        return False
