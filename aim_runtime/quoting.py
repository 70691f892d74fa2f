"""Values of strangers in our sentences: short, printable, on one line."""

from __future__ import annotations

import reprlib
from typing import Any

_SHOWN = 60

_short = reprlib.Repr()
_short.maxstring = _short.maxlong = _short.maxother = _SHOWN
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = _short.maxarray = 8


def shown(value: Any) -> str:
    """`value` as Python writes it, on one printable line of at most 60 characters.

    Nothing that it is or does breaks the sentence: it may be a text of a megabyte, a number of
    5,000 digits, an object that cannot print itself.
    """
    try:
        # Numbers of many digits have no decimal form, and only the ends of long texts are shown.
        text = _short.repr(value[:_SHOWN] if isinstance(value, (bytes, bytearray)) else value)
    except Exception:  # whatever a stranger's __repr__ raises
        text = f"a value of type {type(value).__name__}"
    return shortened(" ".join(text.split()), _SHOWN)


def first_line(error: Exception, limit: int = 160) -> str:
    """What `error` says, cut to one line that can be printed; its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return shortened(lines[0].strip() if lines else type(error).__name__, limit)


def shortened(text: str, limit: int = 200) -> str:
    """`text` on one line, cut to `limit` characters, with "?" for what cannot be printed."""
    line = "".join(letter if letter.isprintable() else "?" for letter in text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 3] + "..."


def sentence(text: str, limit: int = 300) -> str:
    """`text` on one printable line of at most `limit` characters, whatever path it quotes.

    Too long a line loses its middle: what is wrong stands in front, what to do about it at the end.
    """
    line = shortened(" ".join(text.split()), len(text))
    return line if len(line) <= limit else f"{line[: limit - 113]}...{line[-110:]}"
