"""Looks through a data set before it is trained on: what kinds of images, which of them odd."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from aim_training.data.decode import LONGEST, Header, load_image, read_header
from aim_training.data.digest import file_hash
from aim_training.data.errors import DataError, ImageError, shown
from aim_training.data.folder import ImageFolder
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
        folder: the images.
        found: of each image its header, or why it cannot be used.
        hashes: of each readable image the sha256 of its file; empty unless all was decoded.
    """

    folder: ImageFolder
    found: tuple[Header | ImageError, ...]
    hashes: dict[Path, bytes]

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
            for label, found in zip(self.folder.labels, self.found, strict=True)
            if isinstance(found, Header)
        }
        for label, found in zip(self.folder.labels, self.found, strict=True):
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
        pairs = [
            (path, found)
            for path, found in zip(self.folder.paths, self.found, strict=True)
            if isinstance(found, Header) and chosen(found)
        ]
        if pairs:
            path, header = pairs[0]
            count = "1 image is" if len(pairs) == 1 else f"{len(pairs):,} images are"
            yield f"{count} {what}: {shown(path)} ({header}){' ...' if len(pairs) > 1 else ''}"

    def classes(self, size: int) -> list[ClassCounts]:
        """How many images each class has and how many of them are bad or small, by class id."""
        images, damaged, oversized, small = (Counter[int]() for _ in range(4))
        for label, found in zip(self.folder.labels.tolist(), self.found, strict=True):
            images[label] += 1
            if isinstance(found, Header):
                small[label] += found.is_small(size)
            else:
                (oversized if found.kind == "oversized" else damaged)[label] += 1
        names = self.folder.class_names
        return [
            ClassCounts(names[label], images[label], damaged[label], oversized[label], small[label])
            for label in sorted(images)
        ]


def survey(
    folder: ImageFolder,
    shorter_side: int,
    *,
    workers: int,
    decode: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Survey:
    """Read every image's header, or with `decode` all of it.

    Only decoding finds images that were cut short.

    Args:
        folder: the images.
        shorter_side: that they will be resized to, pixels.
        workers: threads.
        decode: decode the pixels too, and hash the files.
        progress: takes the number of images done.
    """
    hashes: dict[Path, bytes] = {}

    def look(path: Path) -> Header | ImageError:
        try:
            header = read_header(path, shorter_side)
            if decode:
                load_image(path, shorter_side)
                hashes[path] = file_hash(path)
            return header
        except ImageError as error:
            return error

    found = []
    for count, one in enumerate(ordered_map(look, folder.paths, workers), 1):
        found.append(one)
        if progress is not None:
            progress(count)
    return Survey(folder, tuple(found), hashes)


def same_contents(*surveys: Survey) -> list[list[tuple[int, Path]]]:
    """Files with the same bytes, each with its survey's place among the arguments, in groups of
    two or more, in the order of their first."""
    groups: defaultdict[bytes, list[tuple[int, Path]]] = defaultdict(list)
    for place, one in enumerate(surveys):
        for path in one.folder.paths:
            if path in one.hashes:
                groups[one.hashes[path]].append((place, path))
    return [group for group in groups.values() if len(group) > 1]
