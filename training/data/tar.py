"""Tar shards in WebDataset's layout: `KEY.jpg` beside `KEY.cls` or `KEY.json`.

Only the headers are walked, with memory that does not depend on what they claim. Nothing is ever
extracted, so it does not matter what members are called or link to.
"""

from __future__ import annotations

import array
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from aim_training.data.errors import DataError, ImageError, shown
from aim_training.data.formats import readable_suffixes
from aim_training.data.image_set import StoredImage, composed, is_hidden, name_hash
from aim_training.data.index import ShardIndex
from aim_training.data.location import StoredFile

_BLOCK = 512
# What fits into 32 bits as a number of blocks.
_MOST_SHARD_BYTES = _BLOCK << 32
# Long names and the like; real ones have a few hundred bytes.
_MOST_HEADER_BYTES = 1 << 20
_MOST_LABEL_BYTES = 1 << 20
# An encoded image of more bytes is not read.
MOST_IMAGE_BYTES = 1 << 28
_LABELS = ("cls", "json")
_FIELDS = ("label", "class")
_FILES = (b"0", b"\0", b"7")
# Types whose headers are followed by contents although they are no files of the archive.
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _SPARSE = b"L", b"K", b"x", b"g", b"S"
_WITHOUT_CONTENTS = (b"1", b"2", b"3", b"4", b"5", b"6")


@dataclass(frozen=True)
class Member:
    """A file in a tar.

    Attributes:
        name: its path there, as bytes.
        offset: where its contents begin.
        size: bytes of them.
    """

    name: bytes
    offset: int
    size: int


def index_tar(file: StoredFile) -> ShardIndex:
    """Walk a shard's headers.

    Raises:
        DataError: it is no tar, or was cut short.
    """
    with file.open() as opened:
        return _Walk(file, opened).index()


def tar_image(file: StoredFile, block: int, size: int) -> StoredImage:
    """Read an image, of so many bytes from a block of 512 on, and what it is called.

    Raises:
        ImageError: it is too long, or no longer there.
        DataError: the shard cannot be read.
    """
    if size > MOST_IMAGE_BYTES:
        raise ImageError(
            tar_name(file, block),
            f"it takes {size / 2**20:,.0f} MiB, and at most {MOST_IMAGE_BYTES >> 20} are read",
            "oversized",
        )
    content = file.read((block - 1) * _BLOCK, _BLOCK + size)
    name = _place(file, content[:_BLOCK])
    if len(content) < _BLOCK + size:
        raise ImageError(name, "its shard has been cut short since it was indexed")
    return StoredImage(name, content[_BLOCK:])


def tar_name(file: StoredFile, block: int) -> str:
    """What an image is called: its shard's name and its own, as its header has it."""
    return _place(file, file.read((block - 1) * _BLOCK, _BLOCK))


def _place(file: StoredFile, header: bytes) -> str:
    own = _plain_name(header).decode(errors="surrogateescape") or "an image"
    return f"{file.location}/{own.rsplit('/', 1)[-1]}"


class _Walk:
    """One pass over a shard."""

    def __init__(self, file: StoredFile, opened: BinaryIO) -> None:
        self.file = file
        self.opened = opened
        self.left_out: Counter[str] = Counter()
        self.classes: dict[str, int] = {}
        self.digest = hashlib.sha256()
        # Column by column, eight bytes an image rather than a Python object.
        self.columns = {name: array.array("Q") for name in ("where", "extent", "label", "key")}
        self.waiting: dict[bytes, Member | str] = {}  # images without a label yet, and the reverse

    def index(self) -> ShardIndex:
        key, image, labels = b"", None, dict[str, str | None]()
        for member in self._members():
            folder, _, own = member.name.rpartition(b"/")
            if _is_hidden(member.name):
                self.left_out["hidden"] += 1
                continue
            stem, _, ending = own.partition(b".")
            this, kind = b"/".join((folder, stem)), ending.decode("latin-1").lower()
            if this != key:
                self._complete(key, image, labels)
                key, image, labels = this, None, {}
            if f".{kind}" in readable_suffixes():
                if image is None:
                    image = member
                else:
                    self.left_out["second image of its key"] += 1
            elif kind in _LABELS:
                labels[kind] = self._label(member, kind)
            else:
                self.left_out[f".{shown(kind, 15)}" if kind else "without an ending"] += 1
        self._complete(key, image, labels)
        images = sum(isinstance(one, Member) for one in self.waiting.values())
        if images:
            self.left_out["without a label"] += images
        return self._index()

    def _complete(self, key: bytes, image: Member | None, labels: dict[str, str | None]) -> None:
        """Take up a sample whose members were together, or wait for the rest of it."""
        label = labels.get("cls", labels.get("json"))
        if image is None and not labels:
            return
        if labels and label is None:
            self.left_out["with a label that cannot be read"] += image is not None
            return
        other = self.waiting.pop(key, None)
        if image is None and isinstance(other, Member):
            image = other
        elif label is None and isinstance(other, str):
            label = other
        if image is not None and label is not None:
            self._take(key, image, label)
        elif image is not None:
            self.waiting[key] = image
        elif label is not None:
            self.waiting[key] = label

    def _take(self, key: bytes, image: Member, label: str) -> None:
        number = self.classes.setdefault(label, len(self.classes))
        values = (image.offset // _BLOCK, min(image.size, 2**32 - 1), number, name_hash(key) >> 32)
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)

    def _index(self) -> ShardIndex:
        where, extent, label, key = (
            np.frombuffer(column, np.uint64) for column in self.columns.values()
        )
        order = np.argsort(where, kind="stable")
        return ShardIndex(
            where[order].astype(np.uint32),
            extent[order].astype(np.uint32),
            label[order].astype(np.int32),
            key[order].astype(np.uint32),
            tuple(self.classes),
            self.digest.hexdigest(),
            left_out=dict(self.left_out),
        )

    def _label(self, member: Member, kind: str) -> str | None:
        """The class that a label's file names; None where it names none."""
        if member.size > _MOST_LABEL_BYTES:
            return None
        self.opened.seek(member.offset)
        try:
            text = self.opened.read(member.size).decode("utf-8-sig").strip()
            if kind == "json":
                text = _field(json.loads(text)) or ""
        except (ValueError, RecursionError):
            return None
        return composed(text) or None

    def _members(self) -> Iterator[Member]:
        """The archive's files. Of each the header and the last block are hashed, which are read
        together: compressed images that differ do so to their end."""
        place, size = 0, self.file.size
        if size > _MOST_SHARD_BYTES:
            raise self._fault(f"takes {size / 2**40:.0f} TiB, and at most 2 are read")
        long_name: bytes | None = None
        long_size: int | None = None
        while place < size:
            header = self._read(place, _BLOCK)
            if len(header) < _BLOCK:
                raise self._fault("is no tar" if not place else "was cut short")
            if not header.strip(b"\0"):
                return
            kind, length = header[156:157], self._length(header, place)
            place += _BLOCK
            if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
                if length > _MOST_HEADER_BYTES:
                    raise self._fault(f"has a header of {length:,} bytes")
                content = self._read(place, length)
                if kind == _LONG_NAME:
                    long_name = content.rstrip(b"\0")
                elif kind == _PAX:
                    long_name, long_size = self._pax(content, long_name, long_size)
                place += -(-length // _BLOCK) * _BLOCK
                continue
            if kind == _SPARSE:
                raise self._fault("holds sparse files, which are not read")
            if kind in _WITHOUT_CONTENTS:
                if kind != b"5":
                    self.left_out["not a regular file"] += 1
                long_name = long_size = None
                continue
            length = length if long_size is None else long_size
            name = _plain_name(header) if long_name is None else long_name
            long_name = long_size = None
            if place + length > size:
                which = shown(name.decode(errors="surrogateescape"), 60)
                raise self._fault(f"was cut short, in the middle of {which}")
            if kind in _FILES and not name.endswith(b"/"):
                last = self._read(place + max(0, length - _BLOCK), min(length, _BLOCK))
                self.digest.update(b"%d %d\n%s\n%s" % (len(name), length, name, last))
                yield Member(name, place, length)
            place += -(-length // _BLOCK) * _BLOCK
        if place > size:
            raise self._fault("was cut short")

    def _read(self, place: int, size: int) -> bytes:
        self.opened.seek(place)
        return self.opened.read(size)

    def _length(self, header: bytes, place: int) -> int:
        """Bytes of a member's contents; the header's own sum must be right."""
        try:
            total = int(header[148:156].strip(b" \0") or b"0", 8)
            if sum(header) - sum(header[148:156]) + 8 * ord(" ") != total:
                raise ValueError
            if header[124] & 0x80:  # larger than octal digits can say
                length = int.from_bytes(header[125:136], "big")
            else:
                length = int(header[124:136].strip(b" \0") or b"0", 8)
            if length < 0:
                raise ValueError
            return length
        except ValueError:
            what = f"is damaged at byte {place:,}" if place else self._instead(header)
            raise self._fault(what) from None

    def _instead(self, start: bytes) -> str:
        if start[:2] == b"\x1f\x8b" or start[:4] in (b"\x28\xb5\x2f\xfd", b"BZh9", b"\xfd7zX"):
            return (
                "is compressed, and images are read from anywhere in it: unpack it to a plain tar"
            )
        return "is no tar"

    def _pax(
        self, content: bytes, name: bytes | None, size: int | None
    ) -> tuple[bytes | None, int | None]:
        """The name and size that an extended header gives the next member."""
        place = 0
        try:
            while place < len(content) and content[place : place + 1] != b"\0":
                digits, _, _ = content[place : place + 12].partition(b" ")
                length = int(digits)
                record = content[place + len(digits) + 1 : place + length - 1]
                word, found, value = record.partition(b"=")
                if not found or length < len(digits) + 3 or place + length > len(content):
                    raise ValueError
                if word == b"path":
                    name = value
                elif word == b"size":
                    size = int(value)
                    if size < 0:
                        raise ValueError
                elif word.startswith(b"GNU.sparse"):
                    raise self._fault("holds sparse files, which are not read")
                place += length
        except ValueError:
            raise self._fault("has a damaged extended header") from None
        return name, size

    def _fault(self, what: str) -> DataError:
        return DataError(f"{shown(self.file.location)} {what}")


def _is_hidden(name: bytes) -> bool:
    parts = name.decode("latin-1").split("/")
    return any(is_hidden(part) for part in parts if part not in (".", ".."))


def _plain_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _field(described: Any) -> str | None:
    """The class in a sample's JSON: a whole number or a text under `label` or `class`."""
    if not isinstance(described, dict):
        return None
    value = next((described[name] for name in _FIELDS if name in described), None)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    return str(value).strip()
