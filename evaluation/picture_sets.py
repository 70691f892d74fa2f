"""Sets of pictures: folders and .npz files, with the classes and settings that they carry.

A set is listed when it is opened; pixels are read in batches, in the order of the files' names.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from aim_evaluation.errors import EvaluationError
from aim_evaluation.picture_files import SUFFIXES, Fit, Pixels, read_picture, size_of
from aim_runtime.cores import usable_cores
from aim_runtime.quoting import first_line

_CHUNK = 1 << 20
RECORD = "sample.json"
"""What `aim sample` writes beside the folder of its pictures."""
IMAGES = "images"
ARRAY = "arr_0"
"""The pictures of an .npz file in ADM's format: uint8 (N, height, width, 3)."""


class PictureSet(ABC):
    """N pictures of one size.

    Attributes:
        path: where they are.
        labels: (N,) the class of each, a place in `class_names`; None where nothing says it.
        class_names: of the classes.
        fit: what is done to files on the way.
    """

    path: Path
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    fit: Fit

    @abstractmethod
    def __len__(self) -> int:
        """N."""

    @abstractmethod
    def batches(self, size: int, first: int = 0) -> Iterator[Pixels]:
        """The pictures from number `first` on, (at most `size`, height, width, 3) at a time.

        Raises EvaluationError for a picture that cannot be taken.
        """

    @abstractmethod
    def digest(self) -> str:
        """sha256 over the files' names below the set and their contents."""

    @property
    def name(self) -> str:
        """What the set is called: the name of its folder or file."""
        return self.path.resolve().name

    def describe(self) -> dict[str, Any]:
        """What the set is, for a report."""
        return {
            "path": self.name,
            "sha256": self.digest(),
            "pictures": len(self),
            "classes": None if self.labels is None else len(np.unique(self.labels)),
            "height": self.fit.height,
            "width": self.fit.width,
            "resizing": self.fit.describe(),
        }


@dataclass(frozen=True, eq=False)
class PictureFolder(PictureSet):
    """Files of a folder, those in a folder of their own of the class that it is named after."""

    path: Path
    files: tuple[Path, ...]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    fit: Fit

    @classmethod
    def scan(cls, path: Path, fit: Fit | None = None) -> PictureFolder:
        """List the pictures below a folder; without a `fit` they must have the first one's size.

        Raises EvaluationError when there are none.
        """
        files = tuple(sorted(_pictures_below(path), key=lambda file: _key(file, path)))
        if not files:
            raise EvaluationError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
        folders = [file.relative_to(path).parts[:-1] for file in files]
        names: tuple[str, ...] = ()
        labels = None
        if all(folders):
            names = tuple(sorted({parts[0] for parts in folders}, key=_number_or_text))
            ids = {name: place for place, name in enumerate(names)}
            labels = np.array([ids[parts[0]] for parts in folders], np.int64)
        return cls(path, files, labels, names, fit or Fit(*size_of(files[0])))

    def __len__(self) -> int:
        return len(self.files)

    @property
    def record(self) -> Path | None:
        """What `aim sample` says of the pictures; None where they are not from there."""
        path = self.path.parent / RECORD
        return path if self.path.name == IMAGES and path.is_file() else None

    @property
    def name(self) -> str:
        """As `PictureSet.name`; of a sample that of its folder."""
        return (self.path if self.record is None else self.record.parent).resolve().name

    def batches(self, size: int, first: int = 0) -> Iterator[Pixels]:
        """As `PictureSet.batches`; files are decoded by several threads."""
        with ThreadPoolExecutor(min(8, usable_cores())) as pool:
            for start in range(first, len(self.files), size):
                places = range(start, min(start + size, len(self.files)))
                yield np.stack(list(pool.map(self._read, places)))

    def _read(self, place: int) -> Pixels:
        return read_picture(self.files[place], self.fit, place)

    def digest(self) -> str:
        """As `PictureSet.digest`."""
        total = hashlib.sha256()
        for file in self.files:
            total.update(os.fsencode(file.relative_to(self.path).as_posix()) + b"\0")
            total.update(bytes.fromhex(file_sha256(file)))
        return total.hexdigest()

    def part(self, places: Sequence[int]) -> PictureFolder:
        """The pictures at these places."""
        labels = None if self.labels is None else self.labels[list(places)]
        return replace(self, files=tuple(self.files[place] for place in places), labels=labels)


@dataclass(frozen=True, eq=False)
class PictureArray(PictureSet):
    """The pictures of an .npz file in ADM's format."""

    path: Path
    count: int
    fit: Fit
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path) -> PictureArray:
        """Look at the file's head; its pixels are read later.

        Raises EvaluationError when it holds no pictures.
        """
        if not holds_pictures(path):
            raise EvaluationError(f"{path} holds no pictures under {ARRAY!r}")
        with opened_npz(path) as archive, archive.open(f"{ARRAY}.npy") as member:
            shape = _shape(member, path)
        return cls(path, shape[0], Fit(shape[1], shape[2]))

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int, first: int = 0) -> Iterator[Pixels]:
        """As `PictureSet.batches`; the file is read through, and never whole in memory."""
        with opened_npz(self.path) as archive, archive.open(f"{ARRAY}.npy") as member:
            _, height, width, _ = _shape(member, self.path)
            bytes_each = height * width * 3
            for _ in range(first):
                _exactly(member, bytes_each, self.path)
            for start in range(first, self.count, size):
                count = min(size, self.count - start)
                data = _exactly(member, count * bytes_each, self.path)
                yield np.frombuffer(data, np.uint8).reshape(count, height, width, 3)

    def digest(self) -> str:
        """sha256 of the file."""
        return file_sha256(self.path)


def open_pictures(path: Path, fit: Fit | None = None) -> PictureSet:
    """The set at a path: a folder, that of `aim sample` among them, or an .npz file.

    Raises EvaluationError when there is none.
    """
    if path.is_dir():
        drawn = path / IMAGES
        return PictureFolder.scan(drawn if (path / RECORD).is_file() else path, fit)
    if not path.exists():
        raise EvaluationError(f"{path} does not exist; expected a folder of pictures or an .npz")
    pictures = PictureArray.open(path)
    if fit is not None and (fit.height, fit.width) != (pictures.fit.height, pictures.fit.width):
        raise EvaluationError(
            f"the pictures of {path} are {pictures.fit.width} x {pictures.fit.height} pixels and "
            f"{fit.width} x {fit.height} are compared; an .npz is taken as it is"
        )
    return pictures


def file_sha256(path: Path) -> str:
    """sha256 of a file's contents."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def holds_pictures(path: Path) -> bool:
    """Whether an .npz file has pictures. Raises EvaluationError when it is none."""
    with opened_npz(path) as archive:
        return f"{ARRAY}.npy" in archive.namelist()


def opened_npz(path: Path) -> zipfile.ZipFile:
    """The archive that an .npz file is. Raises EvaluationError when it is none."""
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise EvaluationError(f"{path} is no .npz file: {first_line(error, 80)}") from error


def _shape(member: Any, path: Path) -> tuple[int, int, int, int]:
    """The shape of the pictures whose .npy file `member` is about to be read."""
    try:
        version = npy.read_magic(member)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(member)
    except (ValueError, EOFError) as error:
        raise EvaluationError(f"{path} is damaged: {first_line(error, 80)}") from error
    if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or not all(shape):
        raise EvaluationError(
            f"{ARRAY} in {path} is {dtype} {tuple(shape)}; expected uint8 (pictures, height, width,"
            " 3)"
        )
    return shape


def _exactly(member: Any, count: int, path: Path) -> bytes:
    data: bytes = member.read(count)
    if len(data) != count:
        raise EvaluationError(f"{path} is cut short")
    return data


def _pictures_below(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(root, name)


def _key(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()


def _number_or_text(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isascii() and name.isdigit() else (1, 0, name)
