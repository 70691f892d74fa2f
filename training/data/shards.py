"""Images in shards: tar files in WebDataset's layout, or Parquet as Hugging Face writes it.

Of each image 24 bytes are kept in memory; what it is called is read from its shard where it is
to be said.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from aim_training.data.errors import DataError, shown
from aim_training.data.image_set import ImageSet, LeftOut, StoredImage, composed, counted
from aim_training.data.index import ShardIndex, keep_index, read_index
from aim_training.data.location import StoredFile, is_url
from aim_training.data.parallel import ordered_map
from aim_training.data.parquet import ParquetImages, index_parquet
from aim_training.data.shard_classes import as_wanted, classes_of
from aim_training.data.tar import index_tar, tar_image, tar_name

Kind: TypeAlias = Literal["tar", "parquet"]
Progress: TypeAlias = Callable[[int, int], None]
"""Takes how many shards are indexed, and of how many."""

_INDEX = {"tar": index_tar, "parquet": index_parquet}
_CALLED = {"tar": "tar shard", "parquet": "Parquet file"}
# Requests that wait for a network at once.
_CONNECTIONS = 16


@dataclass(frozen=True)
class ShardedImages(ImageSet):
    """The images of a set of shards, in the shards' order and in that of each shard.

    Attributes:
        root: what the user named.
        kind: what the shards are.
        files: the shards.
        class_names: of a numbered label its names; else the labels themselves, sorted as numbers
            where all are whole numbers, else as text.
        labels: (count,) int64.
        shard: (count,) uint32, the shard of each image.
        where: (count,) uint32, see `ShardIndex`.
        extent: (count,) uint32, likewise.
        key: (count,) uint32, likewise.
        contents: hash of the shards' names and contents.
        left_out: members that were not taken.
    """

    root: str
    kind: Kind
    files: tuple[StoredFile, ...]
    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    shard: NDArray[np.uint32]
    where: NDArray[np.uint32]
    extent: NDArray[np.uint32]
    key: NDArray[np.uint32]
    contents: str
    left_out: LeftOut = field(default_factory=LeftOut)
    parquet: ParquetImages = field(default_factory=ParquetImages, compare=False)

    @classmethod
    def open(
        cls,
        root: str,
        kind: Kind,
        files: Sequence[StoredFile],
        class_names: Sequence[str] | None = None,
        *,
        workers: int = 8,
        progress: Progress | None = None,
    ) -> ShardedImages:
        """Index the shards, as far as their indices are not kept.

        Args:
            root: what the user named.
            kind: what the shards are.
            files: the shards.
            class_names: classes of another data set whose ids to use (for validation images).
            workers: processes that index tars, or threads for the rest.
            progress: takes how many shards are done, and of how many.

        Raises:
            DataError: a shard cannot be used, no image has a label, a name that no class can
                have, or a class not in `class_names`.
        """
        indices = list(_indices(kind, files, workers, progress))
        left_out = Counter[str]()
        for index in indices:
            left_out += Counter(index.left_out)
        if not sum(map(len, indices)):
            raise DataError(
                f"{shown(root)} holds no image with a label ({LeftOut(left_out).describe()}); "
                + ("expected KEY.jpg beside KEY.cls" if kind == "tar" else "its files are empty")
            )
        names, own = classes_of(root, files, indices)
        labels = own if class_names is None else as_wanted(root, names, own, class_names)
        return cls(
            root,
            kind,
            tuple(files),
            names if class_names is None else tuple(map(composed, class_names)),
            labels,
            np.repeat(np.arange(len(indices), dtype=np.uint32), list(map(len, indices))),
            np.concatenate([index.where for index in indices]),
            np.concatenate([index.extent for index in indices]),
            np.concatenate([index.key for index in indices]),
            _contents(files, indices),
            LeftOut(left_out),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def describe(self) -> str:
        """`2 tar shards: took 242 images of 2 classes; left out 3 files: 3 .txt`."""
        found = np.unique(self.labels)
        taken = f"took {counted(len(self), 'image')} of {counted(len(found), 'class')}"
        said = (
            f"{counted(len(self.files), _CALLED[self.kind])}: {taken}; {self.left_out.describe()}"
        )
        missing = np.setdiff1d(np.arange(len(self.class_names)), found)
        if len(missing):
            name = shown(self.class_names[missing[0]], 40)
            said += f"; no image of {counted(len(missing), 'class')} such as '{name}'"
        return said

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over class names and over the shards' names, sizes, labels and contents.

        Of a tar every image's name, size and last bytes count, of Parquet blocks of each file.
        """
        digest = hashlib.sha256("\n".join(self.class_names).encode())
        digest.update(self.contents.encode())
        for column in (self.labels, self.shard, self.where):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    def image(self, place: int) -> StoredImage:
        """The bytes of an image."""
        file, where, extent = self._at(place)
        if self.kind == "tar":
            return tar_image(file, where, extent)
        return self.parquet.image(file, extent, where)

    def name(self, place: int) -> str:
        """The shard and the image's own name."""
        file, where, extent = self._at(place)
        if self.kind == "tar":
            return tar_name(file, where)
        return self.parquet.name(file, extent, where)

    def hashes(self) -> NDArray[np.float64]:
        """Numbers in [0, 1) that follow from the images' keys or paths."""
        return self.key / 2.0**32

    def part(self, places: NDArray[np.int64]) -> ShardedImages:
        """The images at these places."""
        return replace(
            self,
            labels=self.labels[places],
            shard=self.shard[places],
            where=self.where[places],
            extent=self.extent[places],
            key=self.key[places],
        )

    def _at(self, place: int) -> tuple[StoredFile, int, int]:
        return self.files[self.shard[place]], int(self.where[place]), int(self.extent[place])


def _indices(
    kind: Kind, files: Sequence[StoredFile], workers: int, progress: Progress | None
) -> Iterator[ShardIndex]:
    """The indices of all shards, in their order; those that are new are kept."""
    known = list(ordered_map(read_index, files, workers))
    missing = [file for file, index in zip(files, known, strict=True) if index is None]
    made = _made(kind, missing, workers)
    done = 0
    for file, index in zip(files, known, strict=True):
        if index is None:
            index = next(made)
            keep_index(file, index)
            done += 1
            if progress is not None:
                progress(done, len(missing))
        yield index


def _made(kind: Kind, files: Sequence[StoredFile], workers: int) -> Iterator[ShardIndex]:
    """The indices of these shards, made at once by several processes or threads."""
    index = _INDEX[kind]
    if any(is_url(file.location) for file in files):
        yield from ordered_map(index, files, _CONNECTIONS)
        return
    workers = min(workers, len(files), os.cpu_count() or 1)
    # Walking headers is Python's own work. Forked as those that read images are: a new
    # interpreter would run the user's script again.
    if kind == "tar" and workers > 1 and "fork" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, context, initializer=_ignore_interrupts) as pool:
            try:
                yield from pool.map(index, files)
            except BrokenProcessPool as error:
                raise DataError(
                    "a process that indexes shards was killed, most likely for lack of memory"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)
        return
    yield from ordered_map(index, files, workers)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _contents(files: Sequence[StoredFile], indices: Sequence[ShardIndex]) -> str:
    digest = hashlib.sha256()
    for file, index in zip(files, indices, strict=True):
        name = composed(file.name).encode(errors="surrogateescape")
        digest.update(b"%s %d %s\n" % (name, file.size, index.contents.encode()))
    return digest.hexdigest()
