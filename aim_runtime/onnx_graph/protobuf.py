"""A reader of protocol buffers that takes one reading of a message or none.

Protocol buffers have many spellings of one message: fields may repeat (the last wins, or parts are
merged), numbers may be padded, unknown fields are skipped. Two readers that treat those differently
see two messages in one file, and what one has checked the other does not run. So whatever can be
spelled otherwise is refused here: what remains means the same to every reader.

A message type is a table from field numbers to fields. There is no recursion that a file controls:
messages nest as deep as the tables do.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

VARINT, LENGTH, FIXED32 = 0, 2, 5

Kind = Literal["int", "float", "bytes", "text", "message", "ints", "floats", "skipped", "refused"]
_WIRE: dict[Kind, int] = {"int": VARINT, "float": FIXED32}
_PACKED: dict[Kind, Kind] = {"int": "ints", "float": "floats"}


class MalformedMessage(ValueError):
    """The bytes are no message of the wanted type, or one that could be read in two ways."""


class RefusedField(ValueError):
    """The bytes are a message with a field that must not be there."""


class Field(NamedTuple):
    """One field of a message.

    `kind` "skipped" is for notes: they may be there, as often as they like, and are not read;
    "refused" for what must not be there at all. "ints" and "floats" are repeated numbers in one
    piece, which `table` makes of "int" and "float".
    """

    name: str
    kind: Kind
    repeated: bool = False
    message: Table | None = None


Table = Mapping[int, Field]
"""The fields of a message by the tag that stands before them: number and way of writing."""
Message = dict[str, Any]
"""What was read: a value for each field, a list for repeated ones. Absent fields are absent."""


def table(fields: Mapping[int, Field]) -> Table:
    """A message type out of its fields by number."""
    tags = {}
    for number, field in fields.items():
        tags[number << 3 | _WIRE.get(field.kind, LENGTH)] = field
        if field.repeated and field.kind in _PACKED:
            tags[number << 3 | LENGTH] = field._replace(kind=_PACKED[field.kind])
    return tags


class Reader:
    """Reads messages out of `data`, at most `max_fields` fields and packed numbers in all."""

    def __init__(self, data: bytes, max_fields: int) -> None:
        self._data = data
        self._left = max_fields

    def read(self, fields: Table) -> Message:
        """The one message that `data` is. Raises MalformedMessage, RefusedField."""
        return self._message(fields, 0, len(self._data))

    def _message(self, fields: Table, at: int, end: int) -> Message:
        found: Message = {}
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise MalformedMessage("it has more fields than any bundle's graph")
            tag, at = self._varint(at, end)
            field = fields.get(tag)
            if field is None:
                raise _unexpected(fields, tag >> 3)
            name, kind, repeated, message = field
            value: Any
            if kind == "int":
                value, at = self._varint(at, end)
                value -= (value >> 63) << 64  # two's complement
            elif kind == "float":
                value, at = self._float(at, end)
            else:
                size, start = self._varint(at, end)
                at = start + size
                if at > end:
                    raise MalformedMessage("it is cut short")
                if kind == "text":
                    value = self._text(name, start, at)
                elif message is not None:
                    value = self._message(message, start, at)
                elif kind == "bytes":
                    value = self._data[start:at]
                elif kind == "skipped":
                    continue
                elif kind == "refused":
                    raise RefusedField(f"it has {name}")
                else:
                    read = self._integers if kind == "ints" else self._floats
                    found.setdefault(name, []).extend(read(start, at))
                    continue
            if repeated:
                if name in found:
                    found[name].append(value)
                else:
                    found[name] = [value]
            elif name in found:
                raise MalformedMessage(f"it gives its field {name} twice")
            else:
                found[name] = value
        return found

    def _text(self, name: str, start: int, end: int) -> str:
        try:
            return self._data[start:end].decode()
        except UnicodeDecodeError:
            raise MalformedMessage(f"its field {name} is not text") from None

    def _floats(self, start: int, end: int) -> tuple[float, ...]:
        number, rest = divmod(end - start, 4)
        self._left -= number
        if rest:
            raise MalformedMessage("it is cut short")
        return struct.unpack_from(f"<{number}f", self._data, start)

    def _integers(self, start: int, end: int) -> list[int]:
        values = []
        while start < end:
            self._left -= 1
            value, start = self._varint(start, end)
            values.append(value - ((value >> 63) << 64))
        return values

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """The number at `at`, unsigned, and where it ends; it has its shortest form."""
        data = self._data
        if at < end and data[at] < 0x80:  # nearly all
            return data[at], at + 1
        value = shift = 0
        while at < end:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if (shift and not byte) or value >> 64:
                    raise MalformedMessage("a number in it is not in its shortest form")
                return value, at
            shift += 7
            if shift > 63:
                break
        raise MalformedMessage("a number in it does not end")

    def _float(self, at: int, end: int) -> tuple[float, int]:
        if at + 4 > end:
            raise MalformedMessage("it is cut short")
        return struct.unpack_from("<f", self._data, at)[0], at + 4


def _unexpected(fields: Table, number: int) -> MalformedMessage:
    for tag, field in fields.items():
        if tag >> 3 == number:
            return MalformedMessage(f"its field {field.name} is of another type")
    return MalformedMessage(f"it has an unknown field, number {number}")
