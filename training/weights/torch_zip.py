"""The directory of a zip file, read with limits, and where in the file its members' bytes lie.

PyTorch keeps a checkpoint as a zip of uncompressed members: a pickle and the numbers it speaks of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import BinaryIO

from aim_training.weights.stored import CheckpointError, shown

# Many times what the largest published models need.
MAX_DIRECTORY_BYTES = 8 << 20
MAGIC = b"PK\x03\x04"

_END, _END_MAGIC = Struct("<4s4H2LH"), b"PK\x05\x06"
_LOCATOR, _LOCATOR_MAGIC = Struct("<4sLQL"), b"PK\x06\x07"
_END64, _END64_MAGIC = Struct("<4sQ2H2L4Q"), b"PK\x06\x06"
_ENTRY, _ENTRY_MAGIC = Struct("<4s6H3L5H2L"), b"PK\x01\x02"
_LOCAL = Struct("<4s5H3L2H")
_MAX_COMMENT = 0xFFFF
_IN_EXTRA = 0xFFFFFFFF
_ZIP64 = 1


class BadZip(Exception):
    """The file is no zip, or a damaged one."""


@dataclass(frozen=True)
class Member:
    """One file in the zip.

    Attributes:
        header: bytes of the file before its local header, behind which its bytes begin.
        size: its bytes.
        plain: it is stored as it is, neither compressed nor encrypted.
        checksum: their CRC-32; None where the writer kept none.
    """

    header: int
    size: int
    plain: bool
    checksum: int | None


def zip_members(path: Path) -> dict[str, Member]:
    """The members of a zip by name; no name twice.

    Raises:
        BadZip: the directory is missing, damaged, or larger than any that holds a model.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        offset, length = _directory(file, size)
        if length > MAX_DIRECTORY_BYTES or offset + length > size:
            raise BadZip(f"its directory would take {length} bytes")
        file.seek(offset)
        directory = file.read(length)
    members: dict[str, Member] = {}
    for name, member in _entries(directory):
        if name in members:
            raise BadZip(f"it holds {shown(name)} twice")
        members[name] = member
    return members


def data_offset(path: Path, name: str, member: Member) -> int:
    """Where the bytes of a member begin in the file.

    Raises:
        CheckpointError: they are compressed, or do not lie in the file.
    """
    where = f"{shown(path.name)}: {shown(name)}"
    if not member.plain:
        raise CheckpointError(
            f"{where} is compressed, which PyTorch never does; unpack the zip and pack it "
            "uncompressed (zip -0), or load and save it with PyTorch"
        )
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(min(member.header, size))
        header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size or not header.startswith(MAGIC):
        raise CheckpointError(f"{where} is damaged; get the file again")
    *_, name_length, extra_length = _LOCAL.unpack(header)
    start = member.header + _LOCAL.size + int(name_length) + int(extra_length)
    if start + member.size > size:
        raise CheckpointError(f"{where} is cut short; get the file again")
    return start


def _directory(file: BinaryIO, size: int) -> tuple[int, int]:
    """Offset and length of the list of members, as the end of the file tells them."""
    tail_size = min(size, _END.size + _MAX_COMMENT + _LOCATOR.size)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    at = tail.rfind(_END_MAGIC)
    if at < 0 or len(tail) - at < _END.size:
        raise BadZip("its end is missing")
    *_, length, offset, _ = _END.unpack_from(tail, at)
    before = at - _LOCATOR.size
    if before >= 0 and tail[before:].startswith(_LOCATOR_MAGIC):
        _, _, place, _ = _LOCATOR.unpack_from(tail, before)
        file.seek(min(place, size))
        end = file.read(_END64.size)
        if len(end) < _END64.size or not end.startswith(_END64_MAGIC):
            raise BadZip("its end is damaged")
        *_, length, offset = _END64.unpack(end)
    return int(offset), int(length)


def _entries(directory: bytes) -> Iterator[tuple[str, Member]]:
    at = 0
    while at < len(directory):
        if len(directory) - at < _ENTRY.size or not directory.startswith(_ENTRY_MAGIC, at):
            raise BadZip("its directory is damaged")
        fields = _ENTRY.unpack_from(directory, at)
        flags, method, checksum, packed, size = fields[3], fields[4], *fields[7:10]
        name_length, extra_length, comment_length, header = *fields[10:13], fields[16]
        name_at = at + _ENTRY.size
        extra_at = name_at + name_length
        at = extra_at + extra_length + comment_length
        extra = directory[extra_at : extra_at + extra_length]
        size, packed, header = _widened(extra, size, packed, header)
        name = directory[name_at:extra_at].decode("utf-8", "replace")
        plain = not method and not flags & 1 and packed == size
        yield name, Member(header, size, plain, checksum or None)


def _widened(extra: bytes, *values: int) -> list[int]:
    """Sizes beyond 32 bits stand in an extra field of 64-bit numbers, in this order."""
    wide = b""
    while len(extra) >= 4:
        kind, length = int.from_bytes(extra[:2], "little"), int.from_bytes(extra[2:4], "little")
        if kind == _ZIP64:
            wide = extra[4 : 4 + length]
        extra = extra[4 + length :]
    found = []
    for value in values:
        if value == _IN_EXTRA:
            if len(wide) < 8:
                raise BadZip("its directory is damaged")
            value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        found.append(value)
    return found
