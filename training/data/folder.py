"""Images in files of their own: one folder a class, and everything below it.

Scanning reads names only. Every file that is not taken is counted with the reason, and contents
are looked at later: by `aim_training.data.survey` or where they are decoded.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from aim_training.data.digest import contents_digest
from aim_training.data.errors import DataError, one_line, shown
from aim_training.data.formats import readable_suffixes
from aim_training.data.image_set import (
    ImageSet,
    LeftOut,
    class_name_fault,
    composed,
    counted,
    in_class_order,
    is_hidden,
    name_hash,
)


@dataclass(frozen=True)
class ImageFolder(ImageSet):
    """The files of a data set.

    Attributes:
        root: folder that holds one folder a class.
        class_names: folder names in Unicode's composed form (NFC), sorted: as numbers where all
            are whole numbers, else as text. The class id is the place in this list.
        paths: all images, sorted by class, then by path.
        labels: (count,) int64, class id of each image.
        left_out: the files that were not taken.
    """

    root: Path
    class_names: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: NDArray[np.int64]
    left_out: LeftOut = field(default_factory=LeftOut)

    @classmethod
    def scan(cls, root: Path, class_names: Sequence[str] | None = None) -> ImageFolder:
        """List the images under `root`, as deep as the folders go. No file is opened.

        Args:
            root: folder that holds one folder a class.
            class_names: classes of another data set whose ids to use (for validation images).

        Raises:
            DataError: no folder, no images, a class without images, a name that no class can
                have, or a class not in `class_names`.
        """
        if not root.is_dir():
            raise DataError(
                f"{shown(root)} is not a folder; expected one that holds a folder per class"
            )
        counts: Counter[str] = Counter()
        try:
            above = _folders_above(root)
            folders = _class_folders(root, above, counts)
        except OSError as error:
            raise DataError(f"{shown(root)} cannot be listed: {one_line(error)}") from error
        if not folders:
            raise DataError(
                f"{shown(root)} holds no folders; expected one folder of images per class"
            )
        names = tuple(map(composed, class_names)) if class_names else tuple(folders)
        ids = {name: index for index, name in enumerate(names)}
        paths: list[Path] = []
        labels: list[int] = []
        for name, folder in folders.items():
            if name not in ids:
                raise DataError(
                    f"{shown(folder)} is a class that the training images lack; expected some of "
                    f"{len(names)} classes such as '{shown(names[0], 60)}'"
                )
            others: Counter[str] = Counter()
            images = sorted(_images_below(folder, above, others))
            if not images:
                instead = LeftOut(others).describe() if others else "it is empty"
                raise DataError(
                    f"{shown(folder)} holds no images ({instead}); add some or remove the folder"
                )
            counts += others
            paths += images
            labels += [ids[name]] * len(images)
        return cls(root, names, tuple(paths), np.asarray(labels, dtype=np.int64), LeftOut(counts))

    def __len__(self) -> int:
        return len(self.paths)

    def describe(self) -> str:
        """`took 242 images of 2 classes; left out 3 files: 2 hidden, 1 .txt`."""
        classes = len(np.unique(self.labels))
        taken = f"took {counted(len(self), 'image')} of {counted(classes, 'class')}"
        return f"{taken}; {self.left_out.describe()}"

    def image(self, place: int) -> Path:
        """The file."""
        return self.paths[place]

    def name(self, place: int) -> Path:
        """Likewise."""
        return self.paths[place]

    def hashes(self) -> NDArray[np.float64]:
        """Numbers in [0, 1) that follow from the files' names below the root."""
        names = (path.relative_to(self.root).as_posix() for path in self.paths)
        encoded = (name.encode(errors="surrogateescape") for name in names)
        return np.array([name_hash(name) / 2**64 for name in encoded])

    def part(self, places: NDArray[np.int64]) -> ImageFolder:
        """The images at these places."""
        paths = tuple(self.paths[place] for place in places)
        return replace(self, paths=paths, labels=self.labels[places])

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over class names, paths, sizes and contents; those of a large set in samples.

        The folder's own place does not count, nor do modification times: a copy has the same.
        """
        return contents_digest(self.root, self.class_names, self.paths)


def holds_images(folder: Path) -> bool:
    """Whether there is an image, by its name, anywhere below a folder."""
    try:
        above = _folders_above(folder.parent)
    except OSError:
        return False
    return next(_images_below(folder, above, Counter()), None) is not None


def _class_folders(
    root: Path, above: frozenset[_Identity], counts: Counter[str]
) -> dict[str, Path]:
    """The class folders by class name, in the order of the class ids."""
    folders: dict[str, Path] = {}
    with os.scandir(root) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        kind = _kind(entry)
        if kind != _FOLDER:
            counts["hidden" if kind == "hidden" else "beside the class folders"] += 1
            continue
        if entry.is_symlink() and _identity(entry.path) in above:
            counts["link that leads back"] += 1
            continue
        folder = Path(entry.path)
        name = _class_name(folder)
        if name in folders:
            raise DataError(
                f"{shown(root)} holds two folders named '{shown(name, 60)}', written with "
                "different Unicode characters; merge them or rename one"
            )
        folders[name] = folder
    return {name: folders[name] for name in in_class_order(folders)}


def _class_name(folder: Path) -> str:
    """The name of a class folder, which ends up in every bundle trained on it."""
    name = composed(folder.name)
    fault = class_name_fault(name)
    if fault:
        where = shown(folder.parent)
        raise DataError(
            f"the name of the class folder '{shown(name, 60)}' in {where} {fault}; rename it"
        )
    return name


def _images_below(
    folder: Path, above: frozenset[_Identity], counts: Counter[str]
) -> Iterator[Path]:
    """The images of a class; what else is there is counted. No folder is entered twice."""
    seen = set(above)
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            identity = _identity(here)
            with os.scandir(here) as entries:
                found = list(entries)
        except OSError:
            counts["folder that cannot be opened"] += 1
            continue
        if identity in seen:
            counts["link that leads back"] += 1
            continue
        seen.add(identity)
        links: list[str] = []
        folders: list[str] = []
        for entry in found:
            kind = _kind(entry)
            if kind == _IMAGE:
                yield Path(entry.path)
            elif kind == _FOLDER:
                (links if entry.is_symlink() else folders).append(entry.path)
            else:
                counts[kind] += 1
        # The last one in is the first one out: real folders come before links to them.
        waiting += [Path(path) for path in sorted(links, reverse=True)]
        waiting += [Path(path) for path in sorted(folders, reverse=True)]


_FOLDER = "folder"
_IMAGE = "image"


def _kind(entry: os.DirEntry[str]) -> str:
    """A folder, an image by its name, or the reason to leave it out."""
    if is_hidden(entry.name):
        return "hidden"
    try:
        if entry.is_dir():
            return _FOLDER
        if not entry.is_file():
            return "broken link" if entry.is_symlink() else "not a regular file"
    except OSError:  # links in a circle
        return "broken link"
    suffix = PurePath(entry.name).suffix.lower()
    if suffix in readable_suffixes():
        return _IMAGE
    return shown(suffix, 16) or "without an ending"


_Identity: TypeAlias = tuple[int, int]


def _identity(folder: str | Path) -> _Identity:
    """What a folder is for the file system, whatever links lead to it."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _folders_above(root: Path) -> frozenset[_Identity]:
    """The data set's folder and those that it lies in: links to them lead back."""
    whole = root.resolve()
    return frozenset(_identity(folder) for folder in (whole, *whole.parents))
