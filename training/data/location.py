"""Where shards are: names with `*` and `{000..127}`, folders and URLs, as the files they stand for.

URLs (`s3://`, `gs://`, `hf://`, `https://`, ...) are read through fsspec and its drivers.
"""

from __future__ import annotations

import glob
import itertools
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from aim_training.data.errors import DataError, one_line, shown

# `pathlib` takes one of the two slashes from a URL.
_URL = re.compile(r"^((?:[a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]+):/+")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")
_MOST_FILES = 1_000_000
# What file systems call the mark that changes with a file, the surest first.
_VERSIONS = (
    *("ETag", "etag", "sha256", "md5Hash", "blob_id"),
    *("mtime", "LastModified", "last_modified", "updated", "created"),
)


@dataclass(frozen=True)
class StoredFile:
    """A file as it is now, on this machine or elsewhere.

    Attributes:
        location: its path or URL.
        size: bytes.
        version: changes when the file does: its time or, of a URL, what the server says.
    """

    location: str
    size: int
    version: str

    @property
    def name(self) -> str:
        """Its own name, without the folder's."""
        return self.location.rsplit("/", 1)[-1]

    def open(self) -> BinaryIO:
        """The file, to read from and seek in.

        Raises:
            DataError: it cannot be opened.
        """
        with _reached(self.location):
            if is_url(self.location):
                system, path = _file_system(self.location)
                opened: BinaryIO = system.open(path, "rb")
                return opened
            return open(self.location, "rb")

    def read(self, offset: int, size: int) -> bytes:
        """Some of its bytes; fewer where the file ends.

        Raises:
            DataError: it cannot be read.
        """
        with _reached(self.location):
            if is_url(self.location):
                system, path = _file_system(self.location)
                content = bytes(system.cat_file(path, start=offset, end=offset + size))
                if len(content) > size:
                    raise OSError("the server sends no parts of files")
                return content
            with open(self.location, "rb", buffering=0) as file:
                file.seek(offset)
                parts = []
                while size and (part := file.read(size)):  # at most 2 GiB come at once
                    parts.append(part)
                    size -= len(part)
                return parts[0] if len(parts) == 1 else b"".join(parts)


def written(path: Path) -> str:
    """A path or URL as it was given."""
    found = _URL.match(str(path))
    if found is None:
        return str(path)
    slashes = "///" if found[1].endswith("file") else "//"  # a file's path begins with one more
    return f"{found[1]}:{slashes}{str(path)[found.end() :]}"


def is_url(location: str) -> bool:
    """Whether fsspec reads it. A drive's letter is no scheme."""
    return "://" in location and _URL.match(location) is not None


def is_pattern(location: str) -> bool:
    """Whether it stands for several files, and is not itself the name of one."""
    if not is_url(location) and os.path.lexists(location):
        return False
    path = location.partition("?")[0] if location.startswith("http") else location
    return any(mark in path for mark in "*?[{")


def matching(location: str) -> list[StoredFile]:
    """The files that a name with `*`, `?`, `[...]` or braces stands for, in the order of names.

    Raises:
        DataError: there are none, or they cannot be listed.
    """
    files: dict[str, StoredFile] = {}
    for pattern in _spread(location):
        found = _globbed(pattern) if any(mark in pattern for mark in "*?[") else [pattern]
        for name in found:
            files.setdefault(name, stored_file(name))
    if not files:
        raise DataError(f"no file is called {shown(location)}; expected tar or Parquet shards")
    return sorted(files.values(), key=lambda file: file.location)


def stored_file(location: str) -> StoredFile:
    """A file's size and version.

    Raises:
        DataError: it is not there, or no regular file.
    """
    with _reached(location):
        if not is_url(location):
            found = os.stat(location)
            if not stat.S_ISREG(found.st_mode):
                raise DataError(f"{shown(location)} is not a regular file")
            return StoredFile(location, found.st_size, str(found.st_mtime_ns))
        system, path = _file_system(location)
        return _described(location, system.info(path))


def listed(folder: str) -> tuple[list[StoredFile], list[str]]:
    """The files and the folders directly under a URL, in the order of names.

    Raises:
        DataError: it cannot be listed.
    """
    with _reached(folder):
        system, path = _file_system(folder)
        entries = sorted(system.ls(path, detail=True), key=lambda entry: str(entry["name"]))
        located = [(str(system.unstrip_protocol(entry["name"])), entry) for entry in entries]
    files = [_described(name, entry) for name, entry in located if entry["type"] == "file"]
    folders = [name for name, entry in located if entry["type"] == "directory"]
    return files, folders


def is_remote_file(location: str) -> bool:
    """Whether a URL is a file's rather than a folder's.

    Raises:
        DataError: nothing is there, or it cannot be reached.
    """
    with _reached(location):
        system, path = _file_system(location)
        return bool(system.info(path)["type"] == "file")


def _described(location: str, info: dict[str, Any]) -> StoredFile:
    size = info.get("size")
    if not isinstance(size, int):
        raise DataError(f"{shown(location)}: the server does not say how long it is")
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return StoredFile(location, size, version)


def _file_system(location: str) -> tuple[Any, str]:
    """fsspec's file system, a new one in every process, and the path in it."""
    import fsspec

    system, path = fsspec.core.url_to_fs(location)
    return system, path


class _reached:
    """What goes wrong inside with a file, here or over a network, as a sentence."""

    def __init__(self, location: str) -> None:
        self.location = location

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, DataError | MemoryError) or not isinstance(error, Exception):
            return
        where = shown(self.location)
        if isinstance(error, ImportError) and is_url(self.location):
            scheme = self.location.partition("://")[0]
            needed = f"a driver for {scheme}:// ({one_line(error, 80)})"
            if getattr(error, "name", None) == "fsspec":
                needed = "fsspec and its driver: pip install 'aim-runtime[data]'"
            raise DataError(f"{where} cannot be read without {needed}") from error
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{where} is not there") from error
        # Drivers raise whatever their libraries do.
        reason = error.strerror if isinstance(error, OSError) else None
        raise DataError(f"{where} cannot be read: {reason or one_line(error)}") from error


def _globbed(pattern: str) -> list[str]:
    if not is_url(pattern):
        return [path for path in sorted(glob.glob(pattern)) if not os.path.isdir(path)]
    with _reached(pattern):
        system, path = _file_system(pattern)
        return [str(system.unstrip_protocol(name)) for name in sorted(system.glob(path))]


def _spread(pattern: str) -> Iterator[str]:
    """`a{00..02}` and `a{x,y}` written out, as a shell does."""
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    before, after = pattern[: found.start()], pattern[found.end() :]
    choices = _choices(found[1], pattern)
    for choice in itertools.islice(choices, _MOST_FILES):
        yield from _spread(f"{before}{choice}{after}")


def _choices(inside: str, pattern: str) -> Iterator[str]:
    numbers = _RANGE.match(inside)
    if numbers is None:
        yield from inside.split(",")
        return
    first, last = int(numbers[1]), int(numbers[2])
    if not 0 <= last - first < _MOST_FILES:
        raise DataError(f"{shown(pattern)}: '{{{shown(inside, 40)}}}' is no range from few to many")
    padded = numbers[1].startswith("0") or len(numbers[1]) == len(numbers[2])
    width = len(numbers[1]) if padded else 0
    for number in range(first, last + 1):
        yield f"{number:0{width}d}"
