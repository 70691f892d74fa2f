"""What is wrong with a data set, in one sentence, and how names from a disk are shown in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, TypeAlias

Name: TypeAlias = str | Path
"""What a file, or a place inside one, is called; a URL is no `Path`."""


class DataError(Exception):
    """The data set cannot be used; the message is one sentence for the user."""


class ImageError(DataError):
    """One image cannot be used.

    Attributes:
        path: the file, or the file and the place in it.
        reason: what is wrong with it, one line without its name.
        kind: `damaged` cannot be decoded, `oversized` has more pixels than are decoded.
    """

    def __init__(
        self, path: Name, reason: str, kind: Literal["damaged", "oversized"] = "damaged"
    ) -> None:
        super().__init__(path, reason, kind)  # what pickling hands back to this method
        self.path = path
        self.reason = reason
        self.kind = kind

    def __str__(self) -> str:
        return f"{shown(self.path)} cannot be read as an image: {self.reason}"


def shown(name: str | os.PathLike[str], limit: int = 120) -> str:
    r"""A name from the disk as it may stand in a line of text.

    Control characters, line breaks and bytes that are not UTF-8 become escapes (`\n`,
    `\xe9`); a name longer than `limit` characters loses its middle.
    """
    text = "".join(_escaped(character) for character in os.fspath(name))
    if len(text) <= limit:
        return text
    tail = (limit - 3) * 2 // 3  # the end tells files apart
    return f"{text[: limit - 3 - tail]}...{text[-tail:]}"


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that Python could not decode (PEP 383)
        return f"\\x{code - 0xDC00:02x}"
    # Joiners stay: names in many languages, and emoji, need them.
    if code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code in (0x2028, 0x2029):
        return character.encode("unicode_escape").decode()
    return character


def one_line(error: BaseException, limit: int = 120) -> str:
    """A foreign exception's message as one line; its class where it says nothing."""
    return shown(" ".join(str(error).split()) or type(error).__name__, limit)
