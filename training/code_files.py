"""Codes on the disk: files that training maps, and those that an encoding is in the middle of.

All codes in a row are cut into parts, each of which one process encodes, batch by batch, into a
file of its own. Beside it grows a journal, a line a batch, so that what was stopped, however
roughly, goes on behind the last batch that is whole. Once all parts are, they take their places.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from aim_training.replacing import replacing

# A part is about so long, or shorter where several processes share the work.
_PART_BYTES = 64 << 20
_REQUEST = "request.json"

BadImage: TypeAlias = tuple[str, str, str]
"""Name, reason and kind of an `ImageError`."""


class Codes:
    """Codes (variants, images, T), mapped from files and read where they are taken.

    Attributes:
        shape: (variants, images, T).
        dtype: uint16, or int32 for large codebooks.
    """

    def __init__(self, files: Sequence[NDArray[Any]], variants: int) -> None:
        self._files = [file.reshape(-1, file.shape[-1]) for file in files]  # (rows, T) each
        self._starts = np.cumsum([0, *map(len, self._files)])
        rows = int(self._starts[-1])
        self.shape = (variants, rows // variants, self._files[0].shape[1])
        self.dtype = self._files[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all codes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.concatenate(self._files).reshape(self.shape).astype(dtype or self.dtype)

    def __getitem__(self, key: Any) -> NDArray[Any]:
        """All codes (images, T) of a variant; those (..., T) of variants and images."""
        variant, image = np.broadcast_arrays(
            *(key if isinstance(key, tuple) else (key, np.arange(self.shape[1])))
        )
        for places, count in ((variant, self.shape[0]), (image, self.shape[1])):
            if ((places < 0) | (places >= count)).any():
                raise IndexError(f"there are {count} of these, from 0")
        rows = (variant * self.shape[1] + image).ravel()
        of = np.searchsorted(self._starts, rows, side="right") - 1
        taken = np.empty((len(rows), self.shape[2]), self.dtype)
        for number in np.unique(of):
            chosen = of == number
            taken[chosen] = self._files[number][rows[chosen] - self._starts[number]]
        return taken.reshape(*variant.shape, self.shape[2])


@dataclass(frozen=True)
class Layout:
    """What is encoded, cut into batches and parts.

    Attributes:
        variants: versions of every image.
        images: how many there are.
        tokens: T.
        dtype: of a code.
        batch: images encoded at once; a batch holds images of one variant.
        bounds: batches with which the parts begin, and the number of all.
    """

    variants: int
    images: int
    tokens: int
    dtype: str
    batch: int
    bounds: tuple[int, ...]

    @classmethod
    def plan(
        cls, variants: int, images: int, tokens: int, dtype: str, batch: int, processes: int
    ) -> Layout:
        """Parts of a handy size, as many for each process."""
        size = variants * images * tokens * np.dtype(dtype).itemsize
        parts = -(-max(1, math.ceil(size / _PART_BYTES)) // processes) * processes
        batches = variants * -(-images // batch)
        parts = min(parts, batches)
        bounds = tuple(batches * part // parts for part in range(parts + 1))
        return cls(variants, images, tokens, dtype, batch, bounds)

    @property
    def parts(self) -> int:
        """How many there are."""
        return len(self.bounds) - 1

    @property
    def row_bytes(self) -> int:
        """Bytes of an image's codes."""
        return self.tokens * np.dtype(self.dtype).itemsize

    def first_row(self, batch: int) -> int:
        """Rows before a batch, all images of a variant after those of the one before."""
        variant, number = divmod(batch, -(-self.images // self.batch))
        return variant * self.images + number * self.batch

    def header(self, part: int) -> bytes:
        """How the part's `.npy` file begins."""
        shape: tuple[int, ...] = (self.variants, self.images, self.tokens)
        if self.parts > 1:
            rows = self.first_row(self.bounds[part + 1]) - self.first_row(self.bounds[part])
            shape = (rows, self.tokens)
        head = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(np.dtype(self.dtype))
        facts = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(head, facts)
        return head.getvalue()


class PartFile:
    """A part on its way: what of it is whole, and the next batches behind that.

    Attributes:
        done: batches that are whole.
        bad: images that were met on the way and cannot be read.
    """

    def __init__(self, folder: Path, layout: Layout, part: int) -> None:
        self.path = folder / f"{part:05d}.npy"
        self.journal = folder / f"{part:05d}.journal"
        self.layout = layout
        self.part = part
        self.first, self.last = layout.bounds[part : part + 2]
        self.done = 0
        self.bad: list[BadImage] = []
        self._files: tuple[FileIO, FileIO] | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing is left to encode."""
        return self.first + self.done == self.last

    def read(self) -> None:
        """See which batches are whole: in the journal, and on the disk as it says."""
        self.done, self.bad = 0, []
        try:
            lines = self.journal.read_bytes().split(b"\n")[:-1]
            with self.path.open("rb") as file:
                if file.read(len(head := self.layout.header(self.part))) != head:
                    return
                for line in lines[: self.last - self.first]:
                    entry = json.loads(line)
                    if zlib.crc32(file.read(self._size(self.done))) != entry["crc32"]:
                        return
                    self.bad += [
                        (str(name), str(why), str(kind)) for name, why, kind in entry["bad"]
                    ]
                    self.done += 1
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return

    def append(self, content: bytes, bad: Sequence[BadImage]) -> None:
        """Write the codes of the next batch, and the bad images met for it.

        Not through a memory map: where the disk is full, that kills the process.

        Raises:
            OSError: they cannot be written.
        """
        if self._files is None:
            self._files = self._opened()
        codes, journal = self._files
        _write(codes, content)
        entry = {"crc32": zlib.crc32(content), "bad": list(bad)}
        _write(journal, json.dumps(entry).encode() + b"\n")
        self.bad += bad
        self.done += 1
        if self.whole:
            os.fsync(codes.fileno())
            self.close()

    def close(self) -> None:
        """Close what is written to."""
        for file in self._files or ():
            file.close()
        self._files = None

    def _opened(self) -> tuple[FileIO, FileIO]:
        """The part and its journal, both cut behind the last whole batch."""
        head = self.layout.header(self.part)
        lines = self.journal.read_bytes().splitlines(True)[: self.done] if self.done else []
        codes, journal = FileIO(self.path, "ab"), FileIO(self.journal, "ab")
        journal.truncate(sum(map(len, lines)))
        codes.truncate(len(head) + self._place(self.done) if self.done else 0)
        if not self.done:
            _write(codes, head)
        return codes, journal

    def _size(self, batch: int) -> int:
        first = self.first + batch
        rows = self.layout.first_row(first + 1) - self.layout.first_row(first)
        return rows * self.layout.row_bytes

    def _place(self, batch: int) -> int:
        rows = self.layout.first_row(self.first + batch) - self.layout.first_row(self.first)
        return rows * self.layout.row_bytes


class Encoding:
    """The folder in which the codes of one request grow: `train.encoding` for `train.npy`.

    Attributes:
        folder: where it is.
        layout: of the codes.
        parts: as they were when last read.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout
        self.parts = [PartFile(folder, layout, part) for part in range(layout.parts)]

    @staticmethod
    def folder_of(path: Path) -> Path:
        """Where the codes of the file `path` grow."""
        return path.with_suffix(".encoding")

    @classmethod
    def begin(cls, path: Path, wanted: Mapping[str, Any], layout: Layout) -> Encoding:
        """An empty one, in the place of any other.

        Raises:
            OSError: it cannot be written.
        """
        cls.discard(path)
        folder = cls.folder_of(path)
        folder.mkdir(parents=True)
        with replacing(folder / _REQUEST) as new:
            request = {"wanted": wanted, "layout": asdict(layout)}
            new.write_text(json.dumps(request, indent=2) + "\n", encoding="utf-8")
        return cls(folder, layout)

    @classmethod
    def resume(cls, path: Path, wanted: Mapping[str, Any], like: Layout) -> Encoding | None:
        """The one that was begun for what is `wanted`; None where there is none.

        Batches and parts are as it was begun with, whatever `like`, a layout of now, has.
        """
        folder = cls.folder_of(path)
        try:
            request = json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
            if request["wanted"] != wanted:
                return None
            found = request["layout"]
            layout = Layout(**found | {"bounds": tuple(found["bounds"])})
            batches = layout.variants * -(-layout.images // layout.batch)
            bounds = layout.bounds
            ordered = all(first < last for first, last in itertools.pairwise(bounds))
            same = (layout.variants, layout.images, layout.tokens, layout.dtype) == (
                (like.variants, like.images, like.tokens, like.dtype)
            )
            if not (same and ordered and bounds[0] == 0 and bounds[-1] == batches):
                return None
        except (OSError, ValueError, TypeError, KeyError, ZeroDivisionError, RecursionError):
            return None
        encoding = cls(folder, layout)
        for part in encoding.parts:
            part.read()
        return encoding

    @classmethod
    def discard(cls, path: Path) -> None:
        """Remove what was begun."""
        shutil.rmtree(cls.folder_of(path), ignore_errors=True)

    def images_done(self) -> int:
        """Images encoded by now, by all processes, as the files' lengths tell."""
        done = 0
        for part in self.parts:
            try:
                size = part.path.stat().st_size - len(self.layout.header(part.part))
            except OSError:
                continue
            done += max(0, size) // self.layout.row_bytes
        return done

    def file_names(self, path: Path) -> list[Path]:
        """Where the parts go: `train.npy`, or `train-00000-of-00008.npy` and on."""
        if len(self.parts) == 1:
            return [path]
        count = len(self.parts)
        return [
            path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}")
            for number in range(count)
        ]


def _write(file: FileIO, content: bytes) -> None:
    """All of it: a disk that is nearly full takes a part."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
