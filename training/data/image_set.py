"""What a data set of images is to those who use it, wherever its images lie."""

from __future__ import annotations

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from aim_training.data.errors import Name, shown

# What operating systems leave beside people's files; names in lower case.
_SYSTEM_FILES = frozenset({"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin"})
# Reasons that a summary names; the others it counts together.
_REASONS_NAMED = 6


@dataclass(frozen=True)
class StoredImage:
    """An image that lies inside a larger file.

    Attributes:
        name: what it is called in messages: its file and its place there.
        content: the bytes of the image as it was encoded.
    """

    name: str
    content: bytes


ImageFile: TypeAlias = Path | StoredImage
"""What `aim_training.data.load_image` reads."""


@dataclass(frozen=True)
class LeftOut:
    """Files that a scan did not take.

    Attributes:
        counts: how many for each reason, such as `hidden` or `.txt`. A folder that was not
            entered counts as one.
    """

    counts: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def describe(self) -> str:
        """`left out 3 files: 2 hidden, 1 .txt`, or that none was."""
        if not self.counts:
            return "left out no file"
        ranked = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        named = [f"{count:,} {reason}" for reason, count in ranked[:_REASONS_NAMED]]
        rest = sum(count for _, count in ranked[_REASONS_NAMED:])
        if rest:
            named.append(f"{rest:,} for other reasons")
        return f"left out {counted(len(self), 'file')}: {', '.join(named)}"


class ImageSet(ABC):
    """Images with their classes, each by its place from 0 to `len` - 1.

    Attributes:
        root: where they lie, for messages.
        class_names: the class id is the place in this list.
        labels: (count,) int64, class id of each image.
        digest: sha256 over class names, names and contents; a copy elsewhere has the same.
    """

    root: Name
    class_names: tuple[str, ...]
    labels: NDArray[np.int64]

    @property
    @abstractmethod
    def digest(self) -> str:
        """Tells this data set from any other."""

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abstractmethod
    def describe(self) -> str:
        """How many were taken, and what was left out."""

    @abstractmethod
    def image(self, place: int) -> ImageFile:
        """What to decode.

        Raises:
            ImageError: this one cannot be read.
            DataError: what holds it cannot be read.
        """

    @abstractmethod
    def name(self, place: int) -> Name:
        """What an image is called in messages."""

    @abstractmethod
    def hashes(self) -> NDArray[np.float64]:
        """(count,) numbers in [0, 1), each a function of an image's own name alone."""

    @abstractmethod
    def part(self, places: NDArray[np.int64]) -> ImageSet:
        """The images at these places, in this order, with the same classes."""


def name_hash(name: bytes) -> int:
    """A number below 2**64 that is a function of a name."""
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big")


def is_hidden(name: str) -> bool:
    """Whether a file's or folder's own name is one that systems give, not people."""
    return name.startswith(".") or name.lower() in _SYSTEM_FILES


def composed(name: str) -> str:
    """The composed form: macOS stores é as two characters where Linux has one."""
    return unicodedata.normalize("NFC", name)


def class_name_fault(name: str) -> str | None:
    """Why no class can have this name, which would end up in every bundle trained on it."""
    if any(0xD800 <= ord(character) < 0xE000 for character in name):
        return "is not UTF-8"
    if shown(name, len(name)) != name:
        return "has line breaks or control characters"
    return None if name.strip() else "is blank"


def in_class_order(names: Iterable[str]) -> list[str]:
    """Sorted as numbers where all are whole numbers, else as text."""
    listed = sorted(names)
    if all(name.isascii() and name.isdecimal() for name in listed):
        listed.sort(key=lambda name: (int(name), name))
    return listed


def counted(number: int, noun: str) -> str:
    """`1 class`, `2 classes`."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"
