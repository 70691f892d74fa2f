"""Read bundles: a folder, or one .zip, of a manifest and the files it lists.

A bundle may come from a stranger. Nothing in it is unpickled, only files that its manifest lists
are read, names are plain or "engines/ENGINE/FILE", a symbolic link may not lead outside, and the
bytes handed out are those whose size and sha256 the manifest gives. Everything else is a
`BundleError` of one sentence.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from aim_runtime import arguments
from aim_runtime.bundle.files import MANIFEST_NAME, Source, find_source
from aim_runtime.bundle.manifest import FileEntry, Manifest
from aim_runtime.errors import BundleError
from aim_runtime.quoting import shown

# What is read at a time.
_CHUNK_BYTES = 4 << 20


def models_dir() -> Path:
    """The folder of the models that are installed with the package."""
    return Path(__file__).parents[1] / "models"


class Bundle:
    """An opened bundle: its manifest is checked, its files exist and have the right sizes.

    Checksums are compared in `read`, whenever a file's bytes are handed out. Instances hold no open
    files and may be shared between threads.
    """

    def __init__(self, source: Source, manifest: Manifest, manifest_sha256: str) -> None:
        self._source = source
        self.manifest = manifest
        self.manifest_sha256 = manifest_sha256

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None = None) -> Bundle:
        """Open the bundle at `path`, a folder or a .zip file, with cheap checks only.

        None opens the model that is installed with the package. Raises BundleError when there is
        no bundle, or one that is unsafe, incomplete or too new, ValueError when `path` is no path.
        """
        if path is None:
            path = models_dir() / "emoji"
            if not path.is_dir():
                raise BundleError(
                    "this installation of aim-runtime has no model in the box; "
                    "give the path of a bundle"
                )
        source = find_source(Path(arguments.path("path", path)))
        text = source.manifest_bytes()
        try:
            manifest = Manifest.from_json(text.decode("utf-8"))
        except UnicodeDecodeError:
            raise BundleError(f"{source.path}: {MANIFEST_NAME} is not UTF-8 text") from None
        except BundleError as error:
            raise BundleError(f"{source.path}: {error}") from None
        for name, entry in manifest.files.items():
            _check_size(source, name, source.size(name), entry)
        return cls(source, manifest, hashlib.sha256(text).hexdigest())

    @property
    def path(self) -> Path:
        """Where the bundle lies."""
        return self._source.path

    def manifest_bytes(self) -> bytes:
        """The manifest's file, to be handed on: the one that was checked.

        Raises BundleError when it cannot be read any more, or has changed.
        """
        text = self._source.manifest_bytes()
        if hashlib.sha256(text).hexdigest() != self.manifest_sha256:
            raise BundleError(f"{self.path}: {MANIFEST_NAME} has changed since it was opened")
        return text

    def read(self, name: str) -> memoryview:
        """The bytes of the file `name`, after comparing their sha256 with the manifest's.

        They are in memory of their own: nothing that happens to the file afterwards reaches them.
        Raises BundleError when the manifest does not list the file or its bytes are not the ones
        it promises.
        """
        with self.reading(name) as data:
            return data

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[memoryview]:
        """Like `read`, but hand the bytes out while their sha256 is still being computed.

        For work that takes long, is safe with any bytes and can be thrown away: the BundleError
        comes at the end of the block. Their number is the manifest's.
        """
        entry = self._entry(name)
        data = self._memory(name, entry.size)
        with _Hashing() as hashing:
            with self._opened(name, entry) as file:
                done = 0
                while count := file.readinto(data[done : done + _CHUNK_BYTES]):  # type: ignore[attr-defined]
                    hashing.update(data[done : done + count])
                    done += count
                _check_size(self._source, name, done + len(file.read(1) or b""), entry)
            yield data.toreadonly()
            self._check_sha256(name, entry, hashing.hexdigest())

    def _memory(self, name: str, size: int) -> memoryview:
        """Memory for the file `name`. Mapped without a file: it is not filled with zeros first."""
        try:
            if size and hasattr(mmap, "MAP_ANONYMOUS"):
                memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    with contextlib.suppress(OSError):  # a kernel made without them
                        memory.madvise(mmap.MADV_HUGEPAGE)
                return memoryview(memory)
            return memoryview(bytearray(size))
        except (MemoryError, OSError):
            raise BundleError(
                f"{self._source.named(name)} takes {size} bytes of memory, which are not there"
            ) from None

    def verify(self) -> None:
        """Compare every file's sha256 with the manifest; BundleError at the first that differs."""
        for name, entry in self.manifest.files.items():
            with self._opened(name, entry) as file:
                digest, done = hashlib.sha256(), 0
                while chunk := file.read(min(_CHUNK_BYTES, entry.size + 1 - done)):
                    digest.update(chunk)
                    done += len(chunk)
                _check_size(self._source, name, done, entry)
                self._check_sha256(name, entry, digest.hexdigest())

    def _entry(self, name: str) -> FileEntry:
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.path}: the manifest lists no file {shown(name)}")
        return entry

    @contextlib.contextmanager
    def _opened(self, name: str, entry: FileEntry) -> Iterator[IO[bytes]]:
        """The file `name`, whose size is the manifest's; its errors become BundleErrors."""
        _check_size(self._source, name, self._source.size(name), entry)
        try:
            with self._source.open(name) as file:
                yield file
        except BundleError:
            raise
        except Exception as error:  # zipfile meets a stranger's bytes, and raises many types
            raise self._source.unreadable(name, error) from None

    def _check_sha256(self, name: str, entry: FileEntry, sha256: str) -> None:
        if sha256 != entry.sha256:
            raise BundleError(
                f"{self._source.named(name)} is altered (its sha256 is not the manifest's); "
                "get the bundle again"
            )


class _Hashing:
    """A SHA-256 computed in a thread of its own: it takes about as long as reading does."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pieces: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def __enter__(self) -> _Hashing:
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped = True  # nobody asks any more, where an exception ends the block
        self._join()

    def update(self, piece: memoryview) -> None:
        """Take in `piece`, which must stay as it is."""
        if self._thread is None:
            if len(piece) < _CHUNK_BYTES:  # all there is: not worth a thread
                self._digest.update(piece)
                return
            self._thread = threading.Thread(target=self._work, name="aim-sha256", daemon=True)
            self._thread.start()
        self._pieces.put(piece)

    def hexdigest(self) -> str:
        """The checksum of all pieces."""
        self._join()
        return self._digest.hexdigest()

    def _work(self) -> None:
        while (piece := self._pieces.get()) is not None and not self._stopped:
            self._digest.update(piece)

    def _join(self) -> None:
        if self._thread is not None:
            self._pieces.put(None)
            self._thread.join()
            self._thread = None


def _check_size(source: Source, name: str, size: int, entry: FileEntry) -> None:
    if size != entry.size:
        verb = "cut short" if size < entry.size else "altered"
        raise BundleError(
            f"{source.named(name)} is {verb} ({size} bytes, the manifest says {entry.size}); "
            "get the bundle again"
        )
