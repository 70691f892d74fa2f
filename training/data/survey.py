"""Looks through a data set before it is trained on: what kinds of images, which of them odd."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aim_training.data.decode import LONGEST, Header, load_image, read_header
from aim_training.data.digest import file_hash
from aim_training.data.errors import DataError, ImageError, Name, shown
from aim_training.data.image_set import ImageFile, ImageSet
from aim_training.data.parallel import ordered_map

# Modes that need no remark: grey or colour of 8 bits, with transparency or a palette.
_USUAL_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})


@dataclass(frozen=True)
class ClassCounts:
    """How many images of a class are what."""

    name: str
    images: int
    damaged: int
    oversized: int
    small: int


@dataclass(frozen=True)
class Survey:
    """What was found, image by image.

    Attributes:
        images: the data set.
        found: of each image its header, or why it cannot be used.
        hashes: (count, 32) uint8, of each readable image the sha256 of its file; None unless all
            was decoded.
    """

    images: ImageSet
    found: tuple[Header | ImageError, ...]
    hashes: NDArray[np.uint8] | None

    @property
    def bad(self) -> list[ImageError]:
        """The images that cannot be used."""
        return [found for found in self.found if isinstance(found, ImageError)]

    @property
    def headers(self) -> list[Header]:
        """What the others are."""
        return [found for found in self.found if isinstance(found, Header)]

    def require_every_class(self) -> None:
        """Check that every class has an image left.

        Raises:
            DataError: one has none.
        """
        left = {
            int(label)
            for label, found in zip(self.images.labels, self.found, strict=True)
            if isinstance(found, Header)
        }
        for label, found in zip(self.images.labels, self.found, strict=True):
            if label not in left:
                raise DataError(f"{found}; nor can any other image of its class")

    def remarks(self, size: int) -> Iterator[str]:
        """What a person may want to know before training on squares of `size` pixels."""
        for what, chosen in (
            (f"smaller than {size} pixels and will be enlarged", lambda h: h.is_small(size)),
            (f"more than {LONGEST} times as long as wide", lambda h: h.is_long),
            ("neither grey nor colour of 8 bits", lambda h: h.mode not in _USUAL_MODES),
        ):
            yield from self._remark(what, chosen)

    def _remark(self, what: str, chosen: Callable[[Header], bool]) -> Iterator[str]:
        places = [
            place
            for place, found in enumerate(self.found)
            if isinstance(found, Header) and chosen(found)
        ]
        if places:
            name, header = shown(self.images.name(places[0])), self.found[places[0]]
            count = "1 image is" if len(places) == 1 else f"{len(places):,} images are"
            yield f"{count} {what}: {name} ({header}){' ...' if len(places) > 1 else ''}"

    def classes(self, size: int) -> list[ClassCounts]:
        """How many images each class has and how many of them are bad or small, by class id."""
        images, damaged, oversized, small = (Counter[int]() for _ in range(4))
        for label, found in zip(self.images.labels.tolist(), self.found, strict=True):
            images[label] += 1
            if isinstance(found, Header):
                small[label] += found.is_small(size)
            else:
                (oversized if found.kind == "oversized" else damaged)[label] += 1
        names = self.images.class_names
        return [
            ClassCounts(names[label], images[label], damaged[label], oversized[label], small[label])
            for label in sorted(images)
        ]


def survey(
    images: ImageSet,
    shorter_side: int,
    *,
    workers: int,
    decode: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Survey:
    """Read every image's header, or with `decode` all of it.

    Only decoding finds images that were cut short.

    Args:
        images: the data set.
        shorter_side: that they will be resized to, pixels.
        workers: threads.
        decode: decode the pixels too, and hash the files.
        progress: takes the number of images done.
    """
    hashes = np.zeros((len(images), 32), np.uint8) if decode else None
    seen: dict[Header, Header] = {}  # most are alike, and a million may be kept

    def look(place: int) -> Header | ImageError:
        try:
            image = images.image(place)
            header = read_header(image, shorter_side)
            if hashes is not None:
                load_image(image, shorter_side)
                hashes[place] = np.frombuffer(_hash(image), np.uint8)
            return seen.setdefault(header, header)
        except ImageError as error:
            return error

    found = []
    for count, one in enumerate(ordered_map(look, range(len(images)), workers), 1):
        found.append(one)
        if progress is not None:
            progress(count)
    return Survey(images, tuple(found), hashes)


def same_contents(*surveys: Survey) -> list[list[tuple[int, Name]]]:
    """Files with the same bytes, each with its survey's place among the arguments, in groups of
    two or more, in the order of their first."""
    whose, places, hashes = [], [], []
    for number, one in enumerate(surveys):
        if one.hashes is None:
            continue
        readable = np.flatnonzero([isinstance(found, Header) for found in one.found])
        whose.append(np.full(len(readable), number))
        places.append(readable)
        hashes.append(one.hashes[readable])
    if not hashes:
        return []
    owner, place = np.concatenate(whose), np.concatenate(places)
    keys = np.ascontiguousarray(np.concatenate(hashes)).view("V32")[:, 0]
    order = np.argsort(keys, kind="stable")
    bounds = np.flatnonzero(keys[order][1:] != keys[order][:-1]) + 1
    groups = [group for group in np.split(order, bounds) if len(group) > 1]
    return [
        [(int(owner[one]), surveys[owner[one]].images.name(int(place[one]))) for one in group]
        for group in sorted(groups, key=lambda group: int(group[0]))
    ]


def _hash(image: ImageFile) -> bytes:
    """sha256 of an image's file."""
    if isinstance(image, Path):
        return file_hash(image)
    return hashlib.sha256(image.content).digest()
