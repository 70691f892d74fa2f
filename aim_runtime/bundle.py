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
import stat
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path

from aim_runtime.errors import BundleError
from aim_runtime.manifest import (
    ENGINES_FOLDER,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    is_plain_file_name,
)

MANIFEST_NAME = "manifest.json"

# A large member that shrinks more than this is no network: it is made to fill the memory.
_MAX_ZIP_RATIO = 100
_ZIP_RATIO_FREE_BYTES = 64 << 20


def models_dir() -> Path:
    """The folder of the models that are installed with the package."""
    return Path(__file__).parent / "models"


class Bundle:
    """An opened bundle: its manifest is checked, its files exist and have the right sizes.

    Checksums are compared in `read`, whenever a file's bytes are handed out. Instances hold no open
    files and may be shared between threads.
    """

    def __init__(self, source: _Source, manifest: Manifest, manifest_sha256: str) -> None:
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
        source = _source(Path(path))
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

        A folder's file is mapped into memory, a zip's is unpacked into it. Raises BundleError when
        the manifest does not list the file or its bytes are not the ones it promises.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.path}: the manifest lists no file {name!r}")
        data = self._source.read(name, entry)
        _check_size(self._source, name, len(data), entry)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BundleError(
                f"{self.path}: {name} is altered (its sha256 is not the manifest's); "
                "get the bundle again"
            )
        return data

    def verify(self) -> None:
        """Compare every file's sha256 with the manifest; BundleError at the first that differs."""
        for name in self.manifest.files:
            self.read(name)


def _check_size(source: _Source, name: str, size: int, entry: FileEntry) -> None:
    if size != entry.size:
        verb = "cut short" if size < entry.size else "altered"
        raise BundleError(
            f"{source.path}: {name} is {verb} ({size} bytes, the manifest says {entry.size}); "
            "get the bundle again"
        )


# -- where the bytes come from --------------------------------------------------------------------


class _Source(ABC):
    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def manifest_bytes(self) -> bytes:
        """The manifest's bytes, at most MAX_MANIFEST_BYTES."""

    @abstractmethod
    def size(self, name: str) -> int:
        """How large the file `name` is now."""

    @abstractmethod
    def read(self, name: str, entry: FileEntry) -> memoryview:
        """The bytes of the file `name`; never more than `entry.size` are unpacked."""

    def _manifest_limit(self, size: int) -> None:
        if size > MAX_MANIFEST_BYTES:
            raise BundleError(
                f"{self.path}: {MANIFEST_NAME} has {size} bytes; "
                f"at most {MAX_MANIFEST_BYTES} are read"
            )


def _source(path: Path) -> _Source:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = error.strerror if isinstance(error, OSError) else "not a possible path"
        raise BundleError(f"{path}: there is no bundle here ({reason})") from None
    if stat.S_ISDIR(mode):
        return _Folder(path)
    if stat.S_ISREG(mode):
        return _Zip(path)
    raise BundleError(f"{path}: a bundle is a folder or a .zip file, and this is neither")


class _Folder(_Source):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._root = Path(os.path.realpath(path))

    def manifest_bytes(self) -> bytes:
        if not os.path.lexists(self._root / MANIFEST_NAME):
            raise BundleError(
                f"{self.path}: this folder is not a bundle (it has no {MANIFEST_NAME})"
            )
        self._manifest_limit(self.size(MANIFEST_NAME))
        try:
            with self._locate(MANIFEST_NAME).open("rb") as file:
                return file.read(MAX_MANIFEST_BYTES)
        except OSError as error:
            raise self._unreadable(MANIFEST_NAME, error) from None

    def size(self, name: str) -> int:
        return self._locate(name).stat().st_size

    def read(self, name: str, entry: FileEntry) -> memoryview:
        try:
            with self._locate(name).open("rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    return memoryview(b"")  # an empty file cannot be mapped
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            raise self._unreadable(name, error) from None

    def _locate(self, name: str) -> Path:
        """The real path of the regular file `name`, which lies inside the folder."""
        try:
            real = (self._root / name).resolve(strict=True)
            mode = real.stat().st_mode
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before 3.13
            raise self._unreadable(name, error) from None
        if not real.is_relative_to(self._root):
            raise BundleError(f"{self.path}: {name} is a link that leads outside the bundle")
        if not stat.S_ISREG(mode):
            raise BundleError(f"{self.path}: {name} is not a regular file")
        return real

    def _unreadable(self, name: str, error: Exception) -> BundleError:
        if isinstance(error, FileNotFoundError):
            return BundleError(f"{self.path}: {name} is missing; get the bundle again")
        reason = error.strerror if isinstance(error, OSError) else "links in a circle"
        return BundleError(f"{self.path}: {name} cannot be read ({reason})")


class _Zip(_Source):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except Exception as error:
            raise self._broken(error) from None
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in members:
            self._check_member(info)
            if info.filename in self._members:
                raise BundleError(f"{path}: the zip holds {info.filename!r} twice")
            self._members[info.filename] = info

    def manifest_bytes(self) -> bytes:
        if MANIFEST_NAME not in self._members:
            raise BundleError(
                f"{self.path}: not a bundle (no {MANIFEST_NAME} at the top of the zip)"
            )
        size = self.size(MANIFEST_NAME)
        self._manifest_limit(size)
        return self._unpack(MANIFEST_NAME, size)

    def size(self, name: str) -> int:
        if name not in self._members:
            raise BundleError(f"{self.path}: {name} is missing; get the bundle again")
        return self._members[name].file_size

    def read(self, name: str, entry: FileEntry) -> memoryview:
        _check_size(self, name, self.size(name), entry)
        return memoryview(self._unpack(name, entry.size))

    def _check_member(self, info: zipfile.ZipInfo) -> None:
        # orig_filename: zipfile itself turns the system's separators into "/".
        for name in (info.filename, info.orig_filename):
            parts = name.split("/")
            if (
                not name
                or "\\" in name
                or "\0" in name
                or ":" in name
                or not parts[0]
                or ".." in parts
            ):
                raise BundleError(f"{self.path}: the zip holds the unsafe path {name[:60]!r}")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise BundleError(f"{self.path}: {info.filename[:60]!r} in the zip is a link")
        if info.flag_bits & 0x1:
            raise BundleError(f"{self.path}: the zip is encrypted; unpack it first")
        large = info.file_size > _ZIP_RATIO_FREE_BYTES
        if large and info.file_size > _MAX_ZIP_RATIO * info.compress_size:
            raise BundleError(
                f"{self.path}: {info.filename[:60]!r} claims to unpack from {info.compress_size} "
                f"to {info.file_size} bytes, which no model does"
            )

    def _unpack(self, name: str, size: int) -> bytes:
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self._members[name]) as file:
                return file.read(size)
        except Exception as error:
            raise self._broken(error, name) from None

    def _broken(self, error: Exception, name: str | None = None) -> BundleError:
        """Whatever the zip reader raised: it meets a stranger's bytes, and raises many types."""
        where = f"{self.path}: {name} in the zip" if name else f"{self.path}"
        if isinstance(error, OSError) and error.strerror:
            return BundleError(f"{where} cannot be read ({error.strerror})")
        if name is None:
            return BundleError(f"{where}: neither a bundle folder nor a readable .zip file")
        return BundleError(f"{where} is damaged; get the bundle again")


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
