"""Read and write bundles: a folder, or one .zip, of a manifest and the files it lists.

A bundle may come from a stranger. Nothing in it is unpickled, only files that its manifest lists
are read, names are plain or "engines/ENGINE/FILE", a symbolic link may not lead outside, and the
bytes handed out are those whose size and sha256 the manifest gives. Everything else is a
`BundleError` of one sentence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import mmap
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from aim_runtime.bundle_files import MANIFEST_NAME, Source, find_source
from aim_runtime.errors import BundleError
from aim_runtime.manifest import ENGINES_FOLDER, FileEntry, Manifest, is_plain_file_name
from aim_runtime.quoting import quoted

# What is read at a time.
_CHUNK_BYTES = 4 << 20


def models_dir() -> Path:
    """The folder of the models that are installed with the package."""
    return Path(__file__).parent / "models"


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
        no bundle, or one that is unsafe, incomplete or too new.
        """
        if path is None:
            path = models_dir() / "emoji"
            if not path.is_dir():
                raise BundleError(
                    "this installation of aim-runtime has no model in the box; "
                    "give the path of a bundle"
                )
        source = find_source(Path(path))
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

    def read(self, name: str) -> memoryview:
        """The bytes of the file `name`, after comparing their sha256 with the manifest's.

        They are in memory of their own: nothing that happens to the file afterwards reaches them.
        Raises BundleError when the manifest does not list the file or its bytes are not the ones
        it promises.
        """
        entry = self._entry(name)
        data = self._memory(name, entry.size)
        with self._opened(name, entry) as file, _Hashing() as hashing:
            done = 0
            while count := file.readinto(data[done : done + _CHUNK_BYTES]):  # type: ignore[attr-defined]
                hashing.update(data[done : done + count])
                done += count
            self._check(name, entry, done + len(file.read(1) or b""), hashing.hexdigest())
        return data.toreadonly()

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
                self._check(name, entry, done, digest.hexdigest())

    def _entry(self, name: str) -> FileEntry:
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.path}: the manifest lists no file {quoted(name)}")
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

    def _check(self, name: str, entry: FileEntry, size: int, sha256: str) -> None:
        """What was read of a file must be what the manifest says."""
        _check_size(self._source, name, size, entry)
        if sha256 != entry.sha256:
            raise BundleError(
                f"{self._source.named(name)} is altered (its sha256 is not the manifest's); "
                "get the bundle again"
            )


class _Hashing:
    """A SHA-256 that is computed beside reading: both take about as long, and neither a lock."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._running: threading.Thread | None = None

    def __enter__(self) -> _Hashing:
        return self

    def __exit__(self, *error: object) -> None:
        self._wait()

    def update(self, piece: memoryview) -> None:
        """Begin with the next piece, which must stay as it is."""
        self._wait()
        self._running = threading.Thread(target=self._digest.update, args=(piece,))
        self._running.start()

    def hexdigest(self) -> str:
        """The checksum of all pieces."""
        self._wait()
        return self._digest.hexdigest()

    def _wait(self) -> None:
        if self._running is not None:
            self._running.join()
            self._running = None


def _check_size(source: Source, name: str, size: int, entry: FileEntry) -> None:
    if size != entry.size:
        verb = "cut short" if size < entry.size else "altered"
        raise BundleError(
            f"{source.named(name)} is {verb} ({size} bytes, the manifest says {entry.size}); "
            "get the bundle again"
        )


# -- writing --------------------------------------------------------------------------------------


def write_bundle(
    manifest: Manifest,
    source_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Bundle:
    """Make a bundle folder at `out_dir` from the files in `source_dir`, all or nothing.

    Every regular file of `source_dir` and of the folders in its "engines" is copied and listed (a
    manifest.json there is not); `manifest.files` is ignored and computed. The bundle is made beside
    `out_dir` and renamed in one go, so that an interruption leaves neither half a bundle nor a
    temporary. An existing bundle is replaced only with `overwrite`; anything else that exists and
    is not an empty folder stays.

    Raises BundleError when the target is taken or cannot be written, or the manifest is not valid.
    """
    source, out = Path(source_dir), Path(os.path.abspath(out_dir))
    check_target(out, overwrite)
    staging = out.with_name(f".{out.name}.{secrets.token_hex(6)}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        files = {name: _copy(source / name, staging / name) for name in _bundle_files(source)}
        _write_manifest(dataclasses.replace(manifest, files=files), staging)
        _replace(staging, out)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BundleError(f"cannot write the bundle {out}: {reason}") from error
    finally:
        # After success there is nothing left here; otherwise (also Ctrl-C) it must go.
        shutil.rmtree(staging, ignore_errors=True)
    return Bundle.open(out)


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse a place that :func:`write_bundle` would not write to, before work is spent on it.

    Raises BundleError when `out` is no folder, lies under a file or in a folder that cannot be
    written, holds other things, or holds a bundle and `overwrite` is not set.
    """
    out = Path(os.path.abspath(out))
    # Bundles are made beside the target and renamed.
    existing = next(parent for parent in out.parents if os.path.lexists(parent))
    if not existing.is_dir():
        raise BundleError(f"cannot write the bundle {out}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise BundleError(f"cannot write the bundle {out}: no permission to write to {existing}")
    try:
        if not os.path.lexists(out):
            return
        if not out.is_dir():
            raise BundleError(f"{out} exists and is not a folder; choose another place")
        if not any(out.iterdir()):
            return
    except OSError as error:
        raise BundleError(f"cannot write the bundle {out}: {error.strerror}") from None
    if not (out / MANIFEST_NAME).is_file():
        raise BundleError(f"{out} is a folder with other things in it; choose another place")
    if not overwrite:
        raise BundleError(
            f"{out} holds a bundle already; overwrite it explicitly or choose another"
        )


def add_engine(
    bundle_dir: str | os.PathLike[str], name: str, source_dir: str | os.PathLike[str]
) -> Bundle:
    """Put the files in `source_dir` into a bundle folder as its "engines/`name`".

    What the bundle had there is replaced; all else stays and is not copied. The bundle can be read
    at every moment: at first as it was, then without the engine, then with the new one.

    Raises BundleError when there is no bundle folder, or it cannot be written, or `name` or the
    name of a file is not plain.
    """
    bundle, source = Bundle.open(bundle_dir), Path(source_dir)
    root = Path(os.path.realpath(bundle.path))
    if not root.is_dir():
        raise BundleError(f"{bundle.path}: engines are added to a bundle folder; unpack it first")
    if not is_plain_file_name(name):
        raise BundleError(
            f"{name!r} cannot name an engine: it may have letters, digits and ._- only"
        )
    folder = root / ENGINES_FOLDER / name
    if not Path(os.path.realpath(folder)).is_relative_to(root):
        raise BundleError(
            f"{bundle.path}: {ENGINES_FOLDER} is a link that leads outside the bundle"
        )
    staging = root / f".{name}.{secrets.token_hex(6)}.tmp"
    prefix = f"{ENGINES_FOLDER}/{name}/"
    others = {key: e for key, e in bundle.manifest.files.items() if not key.startswith(prefix)}
    try:
        staging.mkdir()
        added = {
            prefix + file: _copy(source / file, staging / file) for file in _plain_files(source)
        }
        without = dataclasses.replace(bundle.manifest, files=others)
        if others != bundle.manifest.files:
            _write_manifest(without, root)
        folder.parent.mkdir(exist_ok=True)
        _replace(staging, folder)
        _write_manifest(dataclasses.replace(without, files=others | added), root)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BundleError(f"cannot write to the bundle {bundle.path}: {reason}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Bundle.open(bundle_dir)


def _write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the manifest of the bundle `folder`, replacing an old one in one go."""
    text = manifest.to_json()
    Manifest.from_json(text)  # what is written can be read
    new = folder / f".{MANIFEST_NAME}.{secrets.token_hex(6)}.tmp"
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(folder / MANIFEST_NAME)
    finally:
        new.unlink(missing_ok=True)


def _bundle_files(source: Path) -> list[str]:
    """Names, as a manifest gives them, of the files that a bundle made from `source` has."""
    engines = source / ENGINES_FOLDER
    names = _plain_files(source, also=ENGINES_FOLDER if engines.is_dir() else None)
    if engines.is_dir():
        for folder in sorted(engines.iterdir()):
            if not folder.is_dir() or not is_plain_file_name(folder.name):
                raise BundleError(
                    f"{folder} cannot go into a bundle: it must be an engine's folder "
                    "whose name has letters, digits and ._- only"
                )
            names += [f"{ENGINES_FOLDER}/{folder.name}/{name}" for name in _plain_files(folder)]
    return names


def _plain_files(source: Path, also: str | None = None) -> list[str]:
    """The names of the files in `source`, which may hold nothing else but a manifest and `also`."""
    names = []
    for path in sorted(source.iterdir()):
        if path.name in (MANIFEST_NAME, also):
            continue
        if not path.is_file() or not is_plain_file_name(path.name):
            raise BundleError(
                f"{path} cannot go into a bundle: it must be a file "
                "whose name has letters, digits and ._- only"
            )
        names.append(path.name)
    return names


def _copy(path: Path, target: Path) -> FileEntry:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as source, target.open("xb") as copy:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            size += copy.write(chunk)
    return FileEntry(digest.hexdigest(), size)


def _replace(staging: Path, out: Path) -> None:
    """Put `staging` in the place of `out` (absent, or a folder to replace)."""
    if not out.exists():
        staging.rename(out)
        return
    old = out.with_name(f".{out.name}.{secrets.token_hex(6)}.old")
    out.rename(old)
    try:
        staging.rename(out)
    except BaseException:
        with contextlib.suppress(OSError):
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
