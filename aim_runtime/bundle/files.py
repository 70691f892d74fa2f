"""Where a bundle's bytes come from: a folder, or one .zip.

Files are read, never mapped: another process that overwrites or cuts a mapped file ends every
process that touches the pages that are gone. Whatever a file or an archive holds, no more is read
of it than its manifest promises.
"""

from __future__ import annotations

import contextlib
import os
import stat
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from aim_runtime.bundle.manifest import MAX_FILES, MAX_MANIFEST_BYTES
from aim_runtime.errors import BundleError
from aim_runtime.quoting import shortened, shown

MANIFEST_NAME = "manifest.json"

# A large member that shrinks more than this is no network: it is made to fill the memory.
_MAX_ZIP_RATIO = 100
_ZIP_RATIO_FREE_BYTES = 64 << 20
# The list of members at a zip's end, which is read whole: of all files that a bundle may have, with
# long names, and as many folders and strangers among them.
_MAX_ZIP_MEMBERS = 2 * MAX_FILES
_MAX_ZIP_LIST_BYTES = 256 * _MAX_ZIP_MEMBERS
# Others may need gigabytes to unpack anything (LZMA), and nothing that packs bundles uses them.
_ZIP_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}


class Source(ABC):
    """The files of a bundle at `path`, by the names that its manifest gives them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def manifest_bytes(self) -> bytes:
        """The manifest's bytes, at most MAX_MANIFEST_BYTES."""

    @abstractmethod
    def size(self, name: str) -> int:
        """How large the file `name` is now."""

    @abstractmethod
    def open(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """The file `name`, to be read from its start."""

    @abstractmethod
    def unreadable(self, name: str, error: Exception) -> BundleError:
        """What to say when `error` came of reading the file `name`."""

    def named(self, name: str) -> str:
        """The file `name` of this bundle, as messages call it."""
        return f"{self.path}: {shortened(name, 80)}"

    def _manifest_limit(self, size: int) -> None:
        if size > MAX_MANIFEST_BYTES:
            raise BundleError(
                f"{self.path}: {MANIFEST_NAME} has {size} bytes; "
                f"at most {MAX_MANIFEST_BYTES} are read"
            )


def find_source(path: Path) -> Source:
    """The folder or .zip at `path`. Raises BundleError if it is neither."""
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


class _Folder(Source):
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
            with self.open(MANIFEST_NAME) as file:
                return file.read(MAX_MANIFEST_BYTES)
        except OSError as error:
            raise self.unreadable(MANIFEST_NAME, error) from None

    def size(self, name: str) -> int:
        return self._locate(name)[1]

    def open(self, name: str) -> IO[bytes]:
        # Unbuffered: it is read in large pieces.
        return open(self._locate(name)[0], "rb", buffering=0, opener=_open_regular)

    def unreadable(self, name: str, error: Exception) -> BundleError:
        if isinstance(error, FileNotFoundError):
            return BundleError(f"{self.named(name)} is missing; get the bundle again")
        reason = error.strerror if isinstance(error, OSError) else "links in a circle"
        return BundleError(f"{self.named(name)} cannot be read ({reason})")

    def _locate(self, name: str) -> tuple[Path, int]:
        """The real path and the size of the regular file `name`, which lies inside the folder."""
        try:
            real = (self._root / name).resolve(strict=True)
            status = real.stat()
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before 3.13
            raise self.unreadable(name, error) from None
        if not real.is_relative_to(self._root):
            raise BundleError(f"{self.named(name)} is a link that leads outside the bundle")
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{self.named(name)} is not a regular file")
        return real, status.st_size


def _open_regular(path: str, flags: int) -> int:
    """Open what `_locate` found, unless it has become a link, or something that keeps one waiting.

    Nothing waits for whoever may write to a FIFO, which reads as an empty file then.
    """
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


class _Zip(Source):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with path.open("rb") as file, zipfile.ZipFile(_ListReader(file)) as archive:
                members = archive.infolist()
        except _TooManyMembers:
            raise self._too_many() from None
        except Exception as error:
            raise self._broken(error) from None
        if len(members) > _MAX_ZIP_MEMBERS:
            raise self._too_many()
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in members:
            self._check_member(info)
            if info.filename in self._members:
                raise BundleError(f"{path}: the zip holds {shown(info.filename)} twice")
            self._members[info.filename] = info

    def manifest_bytes(self) -> bytes:
        if MANIFEST_NAME not in self._members:
            raise BundleError(
                f"{self.path}: not a bundle (no {MANIFEST_NAME} at the top of the zip)"
            )
        size = self.size(MANIFEST_NAME)
        self._manifest_limit(size)
        try:
            with self.open(MANIFEST_NAME) as file:
                return file.read(size)
        except Exception as error:
            raise self.unreadable(MANIFEST_NAME, error) from None

    def size(self, name: str) -> int:
        if name not in self._members:
            raise BundleError(f"{self.named(name)} is missing; get the bundle again")
        return self._members[name].file_size

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        with self.path.open("rb") as file, zipfile.ZipFile(reader := _ListReader(file)) as archive:
            reader.most = None
            with archive.open(self._members[name]) as member:
                yield member

    def unreadable(self, name: str, error: Exception) -> BundleError:
        return self._broken(error, name)

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
                raise BundleError(f"{self.path}: the zip holds the unsafe path {shown(name)}")
        name = shown(info.filename)
        if stat.S_ISLNK(info.external_attr >> 16):
            raise BundleError(f"{self.path}: {name} in the zip is a link")
        if info.flag_bits & 0x1:
            raise BundleError(f"{self.path}: the zip is encrypted; unpack it first")
        if info.compress_type not in _ZIP_METHODS:
            raise BundleError(
                f"{self.path}: {name} in the zip is packed with method {info.compress_type}; "
                "a bundle's files are stored or deflated"
            )
        large = info.file_size > _ZIP_RATIO_FREE_BYTES
        if large and info.file_size > _MAX_ZIP_RATIO * info.compress_size:
            raise BundleError(
                f"{self.path}: {name} claims to unpack from {info.compress_size} "
                f"to {info.file_size} bytes, which no model does"
            )

    def _too_many(self) -> BundleError:
        return BundleError(
            f"{self.path}: the zip holds more than {_MAX_ZIP_MEMBERS} files, which no bundle does"
        )

    def _broken(self, error: Exception, name: str | None = None) -> BundleError:
        """Whatever the zip reader raised: it meets a stranger's bytes, and raises many types."""
        where = f"{self.named(name)} in the zip" if name else f"{self.path}"
        if isinstance(error, OSError) and error.strerror:
            return BundleError(f"{where} cannot be read ({error.strerror})")
        if name is None:
            return BundleError(f"{where}: neither a bundle folder nor a readable .zip file")
        return BundleError(f"{where} is damaged; get the bundle again")


class _TooManyMembers(Exception):
    pass


class _ListReader:
    """A zip's file, of which `zipfile` reads no longer list of members than a bundle can have.

    It reads that list in one piece as long as the archive says, and takes it apart member by
    member, whatever the number of members that the archive gives beside it.

    Attributes:
        most: What is read at a time at most; None once the list is read.
    """

    most: int | None = _MAX_ZIP_LIST_BYTES

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell, self.close = file.seek, file.tell, file.close
        self.seekable = file.seekable

    def read(self, size: int = -1) -> bytes:
        if self.most is not None and size > self.most:
            raise _TooManyMembers
        return self._file.read(size)
